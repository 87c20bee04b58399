"""The rows of an atlas, and the values of the columns that it looks at. No torch."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mole.core.errors import ConfigError, DataError, brief
from mole.data import Example, read_examples
from mole.data.readers import Records, read_records
from mole.data.shapes import join_names

MOST_COLUMNS = 8
"""Columns that an atlas looks at, at the most."""
MOST_VALUES = 32
"""Values of a column that are told apart, at the most; the rarer ones are one value, `OTHER`."""
LONGEST_VALUE = 60
"""Characters of a value, at the most."""
OTHER, MISSING = "(other)", "(none)"
TOO_FEW = "an atlas needs at least 2 rows, because it compares rows with each other"


@dataclass(frozen=True)
class Corpus:
    """Rows of a data file, with the values that some of its columns have in them.

    Attributes:
        examples: the usable rows, in the file's order.
        columns: for each column its value in each of these rows.
        source: the path or hub id.
        fingerprint: sha256 of the content.
        rejected: how many rows cannot be used.
    """

    examples: list[Example]
    columns: dict[str, list[str]] = field(default_factory=dict)
    source: str = ""
    fingerprint: str = ""
    rejected: int = 0

    def classes(self, column: str, most: int = MOST_VALUES) -> tuple[list[str], list[int]]:
        """The values of a column, the commonest first, and the place among them of each row's value."""
        return classes_of(self.columns[column], most)


def classes_of(values: Sequence[str], most: int) -> tuple[list[str], list[int]]:
    """At most so many values, the commonest first and rarer ones together as `OTHER`; and the place of each among them.

    Raises `ValueError` for fewer than 2.
    """
    if most < 2:
        raise ValueError("at least 2 values are needed")
    counts = Counter(values)
    names = sorted(counts, key=lambda name: (-counts[name], name))
    if len(names) > most:
        names = [*[name for name in names if name != OTHER][: most - 1], OTHER]
    place = {name: number for number, name in enumerate(names)}
    return names, [place.get(value, len(names) - 1) for value in values]


def read_corpus(
    path: str,
    columns: Mapping[str, str] | None = None,
    limit: int | None = None,
    by: Sequence[str] = (),
    *,
    field: str = "data",
) -> Corpus:
    """Read the rows of a data file or hub data set, and the values of the columns `by`.

    Args:
        path: the file, or the hub id.
        columns: `{field: column}` where the source's column names differ, as `data.columns`.
        limit: read only the first rows.
        by: names of columns.
        field: the setting that errors name.

    Raises `DataError` as `read_examples` does, for a column that is not there and for fewer than 2 rows; `ConfigError`
    for too many columns.
    """
    by = list(dict.fromkeys(by))
    if len(by) > MOST_COLUMNS:
        raise ConfigError("by", by, f"at most {MOST_COLUMNS} columns")
    values: dict[str, dict[int, str]] = {}
    if by:
        records = read_records(path, limit, field)
        check_there(by, records, path)
        values = {name: {number: value_text(row, name) for number, row in records.rows} for name in by}
        del records  # before the rows are read again as examples
    found = read_examples(path, dict(columns or {}), limit, field=field)
    if len(found.examples) < 2:
        raise DataError(f"{path} has one usable row; {TOO_FEW}.", field=field)
    chosen = {name: [values[name].get(example.row, MISSING) for example in found.examples] for name in by}
    return Corpus(found.examples, chosen, path, found.fingerprint, len(found.rejected))


def check_there(by: Sequence[str], records: Records, path: str) -> None:
    """Raise `DataError` for a column that the data does not have."""
    for name in by:
        if name not in records.columns:
            there = join_names(records.columns, 12) or "none"
            raise DataError(f"{path} has no column {brief(name)} (--by); its columns: {there}.", field="by")


def value_text(row: Any, column: str) -> str:
    """The value of a column in a row, as a short text."""
    value = row.get(column) if isinstance(row, dict) else None
    if value is None or value == "":
        return MISSING
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    text = " ".join(text.encode(errors="replace").decode().split())  # half of a surrogate pair cannot be written
    return text if len(text) <= LONGEST_VALUE else f"{text[: LONGEST_VALUE - 1]}…"
