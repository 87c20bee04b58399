"""Two atlases of the same data side by side. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mole.analysis.atlas.stored import FORMAT
from mole.core.errors import InputError

SAME = ("sha256", "rows", "seed")
"""What two atlases have in common when they are of the same rows."""


def side_by_side(atlases: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One atlas, or two and their comparison. Raises `InputError` if two are not of the same rows, or damaged."""
    try:
        comparison = compare_atlases(*atlases) if len(atlases) == 2 else None
    except (KeyError, IndexError, TypeError, AttributeError):  # a file in a run's folder may be anyone's
        raise InputError("One of the two atlases is damaged; compute it again.", field="atlas") from None
    return {"atlases": list(atlases), "comparison": comparison}


def as_json(atlases: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What `mole atlas --json` writes: an atlas, or two and their comparison. Raises as `side_by_side` does."""
    return atlases[0] if len(atlases) == 1 else {"format": FORMAT, **side_by_side(atlases)}


def compare_atlases(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """What differs between two atlases, for the projections and variables that both have.

    An expert's number means nothing outside its router, so experts are not matched: what is compared is how much each
    router tells of the data, how sharply it chooses, and how evenly it uses its experts.

    Returns:
        `targets`, `projections` (names), for each variable in `specialisation` the `excess` of both,
        [target][projection], and `entropy`, `active` and `strongest` likewise.

    Raises:
        InputError: they are of different rows, or have no projection in common.
    """
    for name in SAME:
        if one.get(name) != other.get(name):
            raise InputError(
                f"The atlases of {one['target']} and {other['target']} are not of the same rows: {name} is "
                f"{one.get(name)} and {other.get(name)}."
            )
    both = (one, other)
    places = [{entry["name"]: place for place, entry in enumerate(atlas["projections"])} for atlas in both]
    names = [name for name in places[0] if name in places[1]]
    if not names:
        raise InputError(f"{one['target']} and {other['target']} have no adapted projection in common.")
    variables = [{entry["name"]: entry for entry in atlas["variables"]} for atlas in both]

    def column(values: list[list[Any]]) -> list[list[Any]]:
        return [[of_target[place[name]] for name in names] for of_target, place in zip(values, places, strict=True)]

    return {
        "targets": [atlas["target"] for atlas in both],
        "projections": names,
        "specialisation": {
            name: column([known[name]["specialisation"]["excess"] for known in variables])
            for name in variables[0]
            if name in variables[1]
        },
        **{
            name: column([[entry[name] for entry in atlas["projections"]] for atlas in both])
            for name in ("entropy", "active", "strongest")
        },
    }
