"""The shapes of rows, and which column of a file is which field of a shape. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mole.core.errors import DataError

QUESTION_COLUMNS = ("question", "prompt", "instruction")
ANSWER_COLUMNS = ("answer", "answerKey")
SHAPES: dict[str, tuple[tuple[str, ...], ...]] = {
    "multiple choice": (QUESTION_COLUMNS, ("choices",), ANSWER_COLUMNS),
    "messages": (("messages",),),
    "prompt/completion": (("prompt",), ("completion",)),
    "instruction/input/output": (("instruction",), ("output",)),
    "text": (("text",),),
}
"""The shapes in the order in which they are tried; a row needs one column of each group."""
OPTIONAL_FIELDS = ("input", "system", "history", "tools")
TAKES: dict[str, tuple[str, ...]] = {"text": (), "messages": ("system", "tools")}
"""The optional fields of the shapes that do not take all of them."""
FIELDS = sorted({name for groups in SHAPES.values() for group in groups for name in group} | {*OPTIONAL_FIELDS})
OTHER_NAMES: tuple[dict[str, str], ...] = (
    {"messages": "conversations"},
    {"messages": "conversation"},
    {"instruction": "instruction", "output": "response"},
    {"prompt": "prompt", "completion": "response"},
    {"prompt": "question", "completion": "answer"},
    {"prompt": "question", "completion": "response"},
)
"""Names under which columns that fit no shape are known nevertheless, in the order in which they are tried."""
OPTIONAL_NAMES = {"input": "context", "system": "system_prompt", "tools": "functions"}
"""Other names of optional fields."""
MEDIA_COLUMNS = ("image", "images", "audio", "audios", "video", "videos")
PREFERENCES = ("chosen", "rejected")
PREFERENCES_UNREAD = "A row has a good and a bad answer (chosen, rejected), and preferences are not learnt."
LABEL = "label"
"""In rows of answers: whether this is a good one. False in data that were made for KTO."""
LONGEST_NAME = 60
"""Characters of a column's name in an error."""


def shape_of(names: set[str], mapped: set[str]) -> str | None:
    """The first shape whose columns are in `names` and that uses all `mapped` fields; None if there is none."""
    for shape, groups in SHAPES.items():
        used = {name for group in groups for name in group}.union(OPTIONAL_FIELDS, ANSWER_COLUMNS)
        if mapped <= used and all(names.intersection(group) for group in groups):
            return shape
    return None


def resolve_columns(
    found: Sequence[str], columns: Mapping[str, str], shape: str | None = None
) -> tuple[str | None, dict[str, str]]:
    """The shape of a file, and for its fields the columns of other names: the user's `columns`, and known ones.

    Args:
        found: the columns of the file.
        columns: `{field: column}` as the user says.
        shape: the shape of columns that fit none.
    """
    mapping, taken = dict(columns), {*columns.values()}
    names = {column for column in found if column not in taken} | {*columns}
    fits = shape_of(names, {*columns})
    if fits is None and not columns:
        other = next((other for other in OTHER_NAMES if names.issuperset(other.values())), {})
        mapping = {field: column for field, column in other.items() if field != column}
        fits = shape_of(names | {*mapping}, {*mapping}) if mapping else None
    if fits is None:
        return shape, dict(columns)
    for field, column in OPTIONAL_NAMES.items():
        if field in TAKES.get(fits, OPTIONAL_FIELDS) and field not in names and column in names:
            mapping[field] = column
    return fits, mapping


def used_columns(found: Sequence[str], mapping: Mapping[str, str], shape: str, labelled: bool) -> set[str]:
    """The columns that the rows of a shape are made of; `labelled` if the labels of an Answer format are used."""
    taken = {*mapping.values()}
    names = {column for column in found if column not in taken} | {*mapping}
    fields = {*TAKES.get(shape, OPTIONAL_FIELDS), *(ANSWER_COLUMNS if labelled else ())}
    for group in SHAPES[shape]:
        fields.update(group if group == ANSWER_COLUMNS else [name for name in group if name in names][:1])
    return {mapping.get(field, field) for field in fields}


def ignored_columns(found: Sequence[str], mapping: Mapping[str, str], shape: str, labelled: bool) -> list[str]:
    """The columns that are not used, in their order."""
    used = used_columns(found, mapping, shape, labelled)
    return [column for column in found if column not in used]


def check_mapping(columns: Mapping[str, str], found: list[str], path: str) -> dict[str, str]:
    """`columns` as a dict. Raises `DataError` for an unknown field, or a column that is not in the file."""
    for name, column in columns.items():
        setting = f"data.columns.{name}"
        if name not in FIELDS:
            raise DataError(
                f"{setting} is not a field of an example; the fields are: {', '.join(FIELDS)}.", field=setting
            )
        if column not in found:
            there = join_names(found)
            raise DataError(f"{setting} is {column!r}, but {path} has no such column; it has: {there}.", field=setting)
    return dict(columns)


def no_shape(path: str, found: list[str], rows: Sequence[tuple[int, Any]]) -> DataError:
    """The error for columns that fit no shape: it names the shapes, or for preference data the way to use them."""
    if {*PREFERENCES} <= {*found}:
        text = (
            f"{path}: {PREFERENCES_UNREAD} To learn the good ones, map their column: "
            f"--set data.columns='{preferred(found, rows)}'."
        )
        return DataError(text, field="data.columns")
    known = "; ".join(" + ".join("/".join(group) for group in groups) for groups in SHAPES.values())
    return DataError(
        f"{path}: its columns ({join_names(found)}) fit no known shape; the shapes are: {known}. "
        "Map your columns with data.columns, e.g. data.columns.prompt=question.",
        field="data.columns",
    )


def preferred(found: Sequence[str], rows: Sequence[tuple[int, Any]]) -> str:
    """The mapping with which the good answers of preference data are learnt."""
    chosen = next((row["chosen"] for _, row in rows if isinstance(row, dict) and row.get("chosen")), None)
    if isinstance(chosen, list) and len(chosen) > 1:
        return "{messages: chosen}"
    ways = {"prompt": "{completion: chosen}", "instruction": "{output: chosen}"}
    ways["question"] = "{prompt: question, completion: chosen}"
    return next((way for name, way in ways.items() if name in found), "{text: chosen}")


def join_names(names: list[str], most: int = 20) -> str:
    """Column names on one line, at most `most` of them."""
    shown = [shortened(name, LONGEST_NAME) for name in names[:most]]
    return ", ".join(shown + ["…"] * (len(names) > most)) or "none"


def shortened(text: str, most: int) -> str:
    """A text on one line, cut to at most `most` characters."""
    text = " ".join(text[: 4 * most].split())
    return text if len(text) <= most else text[: most - 1] + "…"
