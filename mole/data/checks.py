"""What every data file must keep to, whatever its format: how many columns and rows. No torch."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from mole.core import limits
from mole.core.errors import DataError


def columns_of(rows: Iterable[tuple[int, Any]], source: Path | str) -> list[str]:
    """The names in the rows that are records, in the order in which they first occur. Raises `DataError`."""
    names: dict[str, None] = {}
    for _, row in rows:
        # Most rows bring no new name, and comparing the keys is quicker than adding them.
        if isinstance(row, dict) and not row.keys() <= names.keys():
            names.update(dict.fromkeys(row))
            if len(names) > limits.COLUMNS:
                break
    check_columns(names, source)
    return list(names)


def check_columns(names: Collection[str], source: Path | str) -> None:
    """Raise `DataError` for more than `limits.COLUMNS` columns, or a name of more than `limits.NAME` characters."""
    if len(names) > limits.COLUMNS:
        raise DataError(
            f"{source} has {len(names)} columns; the maximum is {limits.COLUMNS}. Keep only the columns to train on."
        )
    for number, name in enumerate(names, start=1):
        if len(name) > limits.NAME:
            raise DataError(
                f"{source}: the name of column {number} has {len(name)} characters; the maximum is {limits.NAME}. "
                "Rename the column, or add a header if there is none."
            )


def check_row_count(count: int, source: Path | str) -> None:
    """Raise `DataError` for more than `limits.ROWS` rows."""
    if count > limits.ROWS:
        raise DataError(f"{source} contains {count} rows; the maximum is {limits.ROWS}. Split the file.")
