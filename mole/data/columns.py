"""Detecting which column of a file is what: by name, by common synonyms, or by the user's mapping. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mole.data.readers import read_records
from mole.data.shapes import (
    LABEL,
    OPTIONAL_FIELDS,
    PREFERENCES,
    PREFERENCES_UNREAD,
    SHAPES,
    check_mapping,
    ignored_columns,
    join_names,
    resolve_columns,
    shape_of,
)

SAMPLED_ROWS = 20
"""Number of rows read to find the columns."""
COMMON_NAMES = {
    "messages": ("conversations", "conversation", "chat", "dialogue", "dialog", "turns"),
    "prompt": ("question", "q", "query", "instruction", "input", "user", "problem", "request", "source"),
    "completion": ("answer", "a", "response", "reply", "output", "assistant", "solution", "target"),
    "instruction": ("prompt", "task", "question", "query"),
    "input": ("context",),
    "output": ("response", "completion", "answer", "reply", "target"),
    "question": ("query", "prompt", "problem", "stem", "sentence"),
    "choices": ("options", "endings", "candidates", "alternatives"),
    "answer": ("answerkey", "label", "correct", "gold", "target"),
    "text": ("content", "body", "document", "article"),
}
"""Synonyms under which the columns of a field are often found, in lower case."""


@dataclass(frozen=True)
class DetectedColumns:
    """The columns of a file, and the shape and fields they are read as.

    Attributes:
        columns: the names in the file.
        shape: the shape of the columns under the mapping; None if they fit none.
        fields: for each field of the shape its column, or None if it is missing.
        ignored: the columns that are not used; a label may be, which the rows decide.
    """

    columns: tuple[str, ...]
    shape: str | None
    fields: dict[str, str | None]
    ignored: tuple[str, ...] = ()


def read_columns(path: str) -> tuple[str, ...]:
    """The columns of the first rows of a file or data set. Raises `DataError` when it cannot be read."""
    return tuple(read_records(path, SAMPLED_ROWS, peek=True).columns)


def detect_columns(
    columns: Sequence[str], mapping: Mapping[str, str], path: str, shape: str | None = None
) -> DetectedColumns:
    """The shape and fields of columns under a mapping; `shape` is the fallback when they fit none.

    Raises `DataError` for a mapping to a column that is missing.
    """
    shape, mapping = resolve_columns(columns, check_mapping(mapping, list(columns), path), shape)
    taken = {*mapping.values()}
    names = {column for column in columns if column not in taken} | {*mapping}
    if shape is None:
        return DetectedColumns(tuple(columns), None, {})
    found: dict[str, str | None] = {}
    for group in (*SHAPES[shape], *optional_fields(shape)):
        name = next((name for name in group if name in names), group[0])
        found[name] = mapping.get(name, name if name in names else None)
    ignored = [column for column in ignored_columns(columns, mapping, shape, True) if column != LABEL]
    return DetectedColumns(tuple(columns), shape, found, tuple(ignored))


def optional_fields(shape: str) -> list[tuple[str, ...]]:
    """The optional fields of a shape, as groups like those of `SHAPES`."""
    return [("input",)] if shape == "instruction/input/output" else []


def guess_mapping(columns: Sequence[str], shape: str | None = None) -> dict[str, str]:
    """A mapping by common names for columns that fit no shape (or not the given one); empty if there is no guess."""
    for name in [shape] if shape else [name for name in SHAPES if name != "instruction/input/output"]:
        mapping = guess_mapping_for(columns, name)
        if mapping or shape:
            return {field: column for field, column in mapping.items() if field != column}
    return {}


def guess_mapping_for(columns: Sequence[str], shape: str) -> dict[str, str]:
    """A column for each required field of a shape; empty if one cannot be guessed."""
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
    """The first column named like the field or one of its synonyms, ignoring case, spaces and underscores."""
    wanted = (field, *COMMON_NAMES.get(field, ()))
    plain = {column.lower().replace(" ", "").replace("_", ""): column for column in reversed(columns)}
    return next((plain[name] for name in wanted if name in plain), None)


def describe_columns(found: DetectedColumns) -> str:
    """A sentence or two on the columns and what they are read as."""
    columns = join_names(list(found.columns), 12)
    if found.shape is None:
        if {*PREFERENCES} <= {*found.columns}:
            return f"Columns: {columns}. {PREFERENCES_UNREAD} To learn the good ones, map chosen below."
        return f"Columns: {columns}. They fit no known shape; map them to fields below."
    missing = [name for name, column in found.fields.items() if column is None and name not in OPTIONAL_FIELDS]
    if missing:
        return f"Columns: {columns}. For {found.shape} choose a column for: {', '.join(missing)}."
    renamed = [f"{column} as {name}" for name, column in found.fields.items() if column and column != name]
    how = f" ({', '.join(renamed)})" if renamed else ""
    unused = f" Not used: {join_names(list(found.ignored), 12)}." if found.ignored else ""
    return f"Columns: {columns}. Read as {found.shape}{how}.{unused}"


def mapping_for_shape(columns: Sequence[str], shape: str) -> dict[str, str]:
    """The mapping with which a file is read as `shape`, even if its own column names fit another shape."""
    mapping = guess_mapping(columns, shape)
    if shape_of({*columns, *mapping}, {*mapping}) != shape:
        mapping = guess_mapping_for(columns, shape)
    return mapping
