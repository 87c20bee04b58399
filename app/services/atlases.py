"""The atlases that there are to look at: that of the demo adapter, and those kept with runs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from app import settings
from app.services.listing import LISTING
from mole import runs
from mole.analysis.atlas.comparison import as_json
from mole.analysis.atlas.job import AtlasJob
from mole.analysis.atlas.page import atlas_page
from mole.analysis.atlas.stored import read_atlas
from mole.core.errors import InputError, MoleError

DEMO = "demo"
OFFERED = 100
"""Atlases offered, at the most."""


def atlas_choices() -> list[tuple[str, str]]:
    """All atlases as (label, key), the newest run's first and the demo's last; the key of a run's one is `NAME/3`."""
    kept = [(row["name"], number) for row in LISTING.rows() for number in row["atlases"]]
    choices = [(atlas_label(name, number), f"{name}/{number}") for name, number in kept[:OFFERED]]
    if settings.asset("demo", "atlas.json"):
        choices.append(("Demo: four skills (DynMoLE) · held-out rows", DEMO))
    return choices


def atlas_label(name: str, number: int) -> str:
    """What a kept atlas is of, in a few words."""
    try:
        record = AtlasJob(runs.get(name), number).record()
    except MoleError:  # deleted meanwhile
        record = {}
    data = Path(record.get("data") or "").name
    rows = f"{record['rows']} rows" if record.get("rows") else ""
    return " · ".join(filter(None, [record.get("target") or name, data, rows, f"no. {number}"]))


def read_kept(key: str) -> dict[str, Any]:
    """The atlas of a key. Raises `InputError` if there is none."""
    if key == DEMO and (path := settings.asset("demo", "atlas.json")):
        return read_atlas(path)
    name, _, number = key.rpartition("/")
    if not name or not (number.isascii() and number.isdecimal()):
        raise InputError("Choose an atlas first.", field="atlas")
    return AtlasJob(runs.get(name), int(number)).atlas()


def exported(atlases: Sequence[dict[str, Any]], suffix: str) -> str:
    """The content of the file that `mole atlas --html` or `--json` writes. Raises as `side_by_side` does."""
    if suffix == "html":
        return atlas_page(atlases)
    return json.dumps(as_json(atlases), ensure_ascii=False, indent=1) + "\n"
