"""Which column of a file is what: told by name, guessed from usual names, or mapped by hand. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mole.data.examples import OPTIONAL_FIELDS, SHAPES, check_mapping, join_names, shape_of
from mole.data.readers import read_records

SAMPLED_ROWS = 20
"""Rows whose columns are looked at."""
COMMON_NAMES = {
    "messages": ("conversations", "conversation", "chat", "dialogue", "dialog", "turns"),
    "prompt": ("question", "q", "query", "instruction", "input", "user", "problem", "request", "source"),
    "completion": ("answer", "a", "response", "reply", "output", "assistant", "solution", "target", "chosen"),
    "instruction": ("prompt", "task", "question", "query"),
    "input": ("context",),
    "output": ("response", "completion", "answer", "reply", "target"),
    "question": ("query", "prompt", "problem", "stem", "sentence"),
    "choices": ("options", "endings", "candidates", "alternatives"),
    "answer": ("answerkey", "label", "correct", "gold", "target"),
    "text": ("content", "body", "document", "article"),
}
"""Other names that columns of a field often have."""


@dataclass(frozen=True)
class DetectedColumns:
    """A file's columns and what they are read as.

    Attributes:
        shape: the shape that the columns have under the mapping; None when they have none.
        fields: each field of the shape with the column that gives it, or None.
    """

    columns: tuple[str, ...]
    shape: str | None
    fields: dict[str, str | None]


def read_columns(path: str) -> tuple[str, ...]:
    """The columns of a file's or data set's first rows. Raises `DataError` when it cannot be read."""
    records = read_records(path, SAMPLED_ROWS, peek=True)
    return tuple(dict.fromkeys(str(key) for _, row in records.rows if isinstance(row, dict) for key in row))


def detect_columns(
    columns: Sequence[str], mapping: Mapping[str, str], path: str, shape: str | None = None
) -> DetectedColumns:
    """What the columns are read as; `shape` is taken when their names and the mapping tell none.

    Raises `DataError` for a mapping to a column that is not there.
    """
    mapping = check_mapping(mapping, list(columns), path)
    taken = {*mapping.values()}
    names = {column for column in columns if column not in taken} | {*mapping}
    shape = shape_of(names, {*mapping}) or shape
    if shape is None:
        return DetectedColumns(tuple(columns), None, {})
    found: dict[str, str | None] = {}
    for group in (*SHAPES[shape], *optional_fields(shape)):
        name = next((name for name in group if name in names), group[0])
        found[name] = mapping.get(name, name if name in names else None)
    return DetectedColumns(tuple(columns), shape, found)


def optional_fields(shape: str) -> list[tuple[str, ...]]:
    """The fields that a shape may have beside those it needs."""
    return [OPTIONAL_FIELDS] if shape == "instruction/input/output" else []


def guess_mapping(columns: Sequence[str], shape: str | None = None) -> dict[str, str]:
    """The mapping for columns whose own names fit no shape (or not this one): by usual names; empty without a guess."""
    for name in [shape] if shape else [name for name in SHAPES if name != "instruction/input/output"]:
        mapping = guess_mapping_for(columns, name)
        if mapping or shape:
            return {field: column for field, column in mapping.items() if field != column}
    return {}


def guess_mapping_for(columns: Sequence[str], shape: str) -> dict[str, str]:
    """The columns of one shape's fields; empty when one that it needs cannot be guessed."""
    mapping: dict[str, str] = {}
    for group in SHAPES[shape]:
        column = next((name for name in group if name in columns), None)
        field = column or group[0]
        column = column or match_column(group[0], [name for name in columns if name not in mapping.values()])
        if column is None:
            return {}
        mapping[field] = column
    return mapping


def match_column(field: str, columns: Sequence[str]) -> str | None:
    """The first column that is called like the field, or as such columns usually are."""
    wanted = (field, *COMMON_NAMES.get(field, ()))
    plain = {column.lower().replace(" ", "").replace("_", ""): column for column in reversed(columns)}
    return next((plain[name] for name in wanted if name in plain), None)


def describe_columns(found: DetectedColumns) -> str:
    """The columns and what they are read as, in a sentence or two."""
    columns = join_names(list(found.columns), 12)
    if found.shape is None:
        return f"Columns: {columns}. They fit no known shape: say below which is which."
    missing = [name for name, column in found.fields.items() if column is None and name not in OPTIONAL_FIELDS]
    if missing:
        return f"Columns: {columns}. For {found.shape} choose a column for: {', '.join(missing)}."
    renamed = [f"{column} as {name}" for name, column in found.fields.items() if column and column != name]
    how = f" ({', '.join(renamed)})" if renamed else ""
    return f"Columns: {columns}. Read as {found.shape}{how}."


def mapping_for_shape(columns: Sequence[str], shape: str) -> dict[str, str]:
    """The mapping that makes a file be read as this shape: as guessed, and said where the names tell another one."""
    mapping = guess_mapping(columns, shape)
    if shape_of({*columns, *mapping}, {*mapping}) != shape:
        mapping = guess_mapping_for(columns, shape)
    return mapping
