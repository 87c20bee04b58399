"""The rows of JSON, JSONL, CSV and plain text. No torch."""

from __future__ import annotations

import csv
import io
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

from mole.core import limits
from mole.core.errors import DataError, brief
from mole.data.checks import check_columns
from mole.data.heads import OBJECT_BYTES, check_row_size, is_object_over_lines

WHOLE_NAMES = ("data", "rows", "examples", "items", "records", "instances", "samples", "conversations", "dialogues")
"""Names under which a JSON object holds all rows of a file."""
TRAIN_NAMES = ("train", "training")
HELD_OUT_NAMES = ("test", "testing", "validation", "valid", "val", "dev", "eval", "evaluation")
"""Names under which a JSON object holds the rows of a split."""
SEPARATOR_LINE = re.compile(r'"?sep=(.)"?\r?\n')
"""The line with which some spreadsheets say what separates a CSV file's values."""


def parse_json(text: str, file: Path, notices: list[str], by_line: bool = False) -> list[tuple[int, Any]]:
    """The elements of a JSON array, one value per line (JSONL), or the rows that an object holds.

    Args:
        text: of the file.
        file: named by errors.
        notices: what is guessed is added to them.
        by_line: whether each line is a row, by the file's name: then a line is no table of pandas.

    Raises `DataError` with line and column.
    """
    if text.lstrip().startswith("["):
        return list(enumerate(load_json(text, file, first_line=1), start=1))
    # Not splitlines(): it also splits at U+2028 and the like, which JSON strings may contain.
    lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if lines and is_object_over_lines(lines[0][1]):
        if len(text) > OBJECT_BYTES:
            raise DataError(f"{file} is one object of more than {OBJECT_BYTES >> 20} MB; write one object per line.")
        held = rows_in_object(load_json(text, file, first_line=1), notices)
        if held is None:
            raise DataError(
                f"{file} contains an object over several lines; use an array of objects, or one object per line."
            )
        return list(enumerate(held, start=1))
    rows = []
    for number, line in lines:
        check_row_size(len(line), number, file)
        rows.append((number, load_json(line, file, number)))
    if len(rows) == 1 and isinstance(rows[0][1], dict):
        held = rows_in_object(rows[0][1], notices, table=not by_line)
        if held is not None:
            return list(enumerate(held, start=1))
    return rows


def rows_in_object(value: dict[str, Any], notices: list[str], table: bool = True) -> list[Any] | None:
    """The rows that an object holds; None if it is a row itself.

    They are a list under a usual name, the training split of several, or the columns of a `table` as pandas writes one.
    """
    splits = {name: rows for name, rows in value.items() if name.lower() in (*TRAIN_NAMES, *HELD_OUT_NAMES)}
    splits = {name: rows for name, rows in splits.items() if is_list_of_rows(rows)}
    train = next((name for name in splits if name.lower() in TRAIN_NAMES), None)
    if train is not None:
        others = ", ".join(name for name in splits if name != train)
        if others:
            notices.append(
                f"The rows of {train} are read. To hold out those of {others}, write them to a file of their own."
            )
        else:
            notices.append(f"The rows are those of {train}, in the one object of the file.")
        return splits[train]
    whole = [name for name in value if name.lower() in WHOLE_NAMES and is_list_of_rows(value[name])]
    if len(whole) == 1:
        notices.append(f"The rows are those of {whole[0]}, in the one object of the file.")
        return value[whole[0]]
    rows = rows_of_columns(value) if table else None
    if rows is not None:
        notices.append("The file is read as a table column by column, as pandas writes one.")
    return rows


def is_list_of_rows(value: Any) -> bool:
    """Whether a value is a list of objects, and not the messages of a conversation."""
    if not isinstance(value, list) or not value or not all(isinstance(row, dict) for row in value[:100]):
        return False
    return not {"role", "from", "content", "value"} & value[0].keys()


def rows_of_columns(value: dict[str, Any]) -> list[dict[str, Any]] | None:
    """The rows of a table whose columns are lists, or objects with the rows' numbers as keys; None if it is none."""
    columns = list(value.values())
    if len(columns) < 2:
        return None
    if all(isinstance(column, dict) and column.keys() == columns[0].keys() for column in columns) and all(
        str(key).isdecimal() for key in columns[0]
    ):
        return [{name: column[key] for name, column in value.items()} for key in columns[0]]
    if all(isinstance(column, list) and column and len(column) == len(columns[0]) for column in columns) and not any(
        isinstance(entry, dict) for column in columns for entry in column
    ):
        return [dict(zip(value, row, strict=True)) for row in zip(*columns, strict=True)]
    return None


def load_json(text: str, file: Path, first_line: int) -> Any:
    """Parse one JSON value that starts on line `first_line` of the file. Raises `DataError` with the line."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise DataError(f"{file}: malformed JSON on line {line}, column {error.colno}: {error.msg}.") from None
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else "a number with too many digits"
        raise DataError(f"{file}: malformed JSON on line {first_line}: {reason}.") from None


def parse_text(text: str, file: Path, notices: list[str]) -> list[tuple[int, Any]]:
    """A plain text as one row, whatever its paragraphs. Raises `DataError` for one that is too long."""
    if len(text) > OBJECT_BYTES:
        raise DataError(f"{file} has more than {OBJECT_BYTES >> 20} million characters. Split the file.")
    notices.append("The file is read as one text, whose pieces of data.max_length tokens are the examples.")
    return [(1, {"text": text.replace("\r\n", "\n").strip("\n")})]


def parse_csv(text: str, file: Path, notices: list[str]) -> list[tuple[int, Any]]:
    """One record per row, keyed by the header.

    The delimiter is what a first line `sep=` says, else the one of `,`, `;` and tab the header has most of. A first
    column without a name that counts the rows, as pandas writes one, is left out.
    """
    named = SEPARATOR_LINE.match(text.lstrip())
    text = text.lstrip()[named.end() :] if named else text
    header = text.lstrip().partition("\n")[0]
    delimiter = named[1] if named else max(",;\t", key=header.count)
    if delimiter == ";" and not named:
        notices.append("The columns are taken to be separated by semicolons.")
    csv.field_size_limit(limits.ROW_BYTES)  # of every reader in this process
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    rows: list[tuple[int, Any]] = []
    try:
        lines = (line for line in reader if line)
        names = [name.strip() for name in next(lines, [])]
        check_columns(names, file)
        doubled = next((name for name, count in Counter(names).items() if count > 1), None)
        if doubled is not None:
            raise DataError(f"{file}: two columns have the name {brief(doubled)}.")
        for number, values in enumerate(lines, start=1):
            if len(values) == len(names):
                rows.append((number, dict(zip(names, values, strict=True))))
            else:
                rows.append((number, DataError(f"has {len(values)} values for {len(names)} columns")))
    except csv.Error as error:
        raise DataError(f"{file}: malformed CSV on line {max(reader.line_num, 1)}: {error}.") from None
    return without_index(rows, names, notices)


def without_index(rows: list[tuple[int, Any]], names: list[str], notices: list[str]) -> list[tuple[int, Any]]:
    """The rows without a first column that has no name and counts them."""
    if len(names) < 2 or names[0] not in ("", "Unnamed: 0"):
        return rows
    if any(isinstance(row, dict) and not row[names[0]].isdecimal() for _, row in rows):
        return rows
    notices.append("The first column has no name and counts the rows; it is left out.")
    for _, row in rows:
        if isinstance(row, dict):
            del row[names[0]]
    return rows
