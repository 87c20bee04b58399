"""The beginning of a text file that holds its first rows, so that a glance at a huge file stays cheap. No torch."""

from __future__ import annotations

import codecs
import io
import json
from codecs import BOM_UTF8
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, AnyStr

from mole.core import limits
from mole.core.errors import DataError
from mole.data.encodings import guess_encoding

CHUNK = 1 << 16
OBJECT_BYTES = 64 << 20
"""Bytes of a file whose rows are all in one JSON object or that is one text, which has to be read whole."""
TEXT_HEAD = 1 << 20
"""Bytes of a text that are read for a glance."""


def read_head(opened: IO[bytes], rows: int, kind: str, file: Path) -> bytes:
    """The part of an open file that contains its first `rows` rows.

    Some lines, the first elements of a JSON array (as an array), or the start of a Parquet file or of a text, which is
    one row. Raises `DataError` for a row that is too long.
    """
    if kind == "text":
        return read_text_head(opened)
    start = opened.read(CHUNK)
    if kind == "parquet":
        return start
    opened.seek(0)
    encoding = guess_encoding(start)
    wide = encoding.startswith("utf-16")
    begun = start.removeprefix(BOM_UTF8).lstrip()
    array = kind == "json" and begun.startswith(b"[")
    first, line_ends, _ = begun.partition(b"\n")
    if kind == "json" and line_ends and is_object_over_lines(first.decode(errors="replace")):
        return opened.read(OBJECT_BYTES + 1)
    if not wide and not array:
        return b"".join(first_lines(opened.readline, rows, kind, file, b'"'))
    text: Any = io.TextIOWrapper(opened, encoding=encoding, newline="")
    try:
        if wide and not (kind == "json" and text.read(CHUNK).lstrip().startswith("[")):
            text.seek(0)
            return "".join(first_lines(text.readline, rows, kind, file, '"')).encode()
        text.seek(0)
        return first_elements(text, rows, file).encode(errors="surrogatepass")
    except UnicodeDecodeError:
        name = "UTF-16" if wide else "UTF-8"
        raise DataError(f"{file}: not valid {name} text; save the file as UTF-8.") from None
    finally:
        text.detach()


def read_text_head(opened: IO[bytes]) -> bytes:
    """The beginning of a text, up to the end of a line: in most encodings a character has several bytes."""
    head = opened.read(TEXT_HEAD)
    if len(head) == TEXT_HEAD:
        head += opened.readline(TEXT_HEAD)
    encoding = guess_encoding(head)
    if encoding.startswith("utf-16"):
        return codecs.getincrementaldecoder(encoding)().decode(head).encode()
    return head


def is_object_over_lines(first_line: str) -> bool:
    """Whether a JSON object begins on this line and does not end there."""
    if not first_line.lstrip().startswith("{"):
        return False
    try:
        json.loads(first_line)
    except json.JSONDecodeError as error:
        return error.pos >= len(first_line.rstrip())
    except (ValueError, RecursionError):
        return False
    return False


def first_lines(readline: Callable[[int], AnyStr], rows: int, kind: str, file: Path, quote: AnyStr) -> list[AnyStr]:
    """The lines of the first `rows` rows of JSONL or CSV."""
    read, whole, quotes, pending = list[AnyStr](), 0, 0, 0
    while line := readline(limits.ROW_BYTES + 1):
        check_row_size(len(line), len(read) + 1, file)
        read.append(line)
        quotes += line.count(quote)
        pending += len(line)
        # A line break inside quotes does not end a CSV row. The header counts as a row, hence > below.
        if line.strip() and (kind == "json" or quotes % 2 == 0):
            whole, pending = whole + 1, 0
        if whole > rows or pending > limits.ROW_BYTES:
            break
    return read


def first_elements(text: io.TextIOWrapper, rows: int, file: Path) -> str:
    """A JSON array's text up to its first `rows` elements, closed; or what there is, if it is short or malformed."""
    decoder = json.JSONDecoder()
    read = text.read(CHUNK)
    at, found, size = read.index("[") + 1, 0, CHUNK
    while found < rows:
        begin = at
        while begin < len(read) and read[begin] in " \t\r\n,":
            begin += 1
        try:
            _, end = decoder.raw_decode(read, begin)
        except (ValueError, RecursionError):
            end = len(read)
        if end < len(read):  # a number at the end may go on
            at, found, size = end, found + 1, CHUNK
            continue
        check_row_size(len(read) - begin, found + 1, file, "element")
        more = text.read(size)
        if not more:
            return read
        read, size = read + more, size * 2
    return read[:at] + "]"


def check_row_size(size: int, number: int, file: Path, what: str = "line") -> None:
    """Raise `DataError` for a row of more than `limits.ROW_BYTES`."""
    if size > limits.ROW_BYTES:
        raise DataError(
            f"{file}, {what} {number}: more than {limits.ROW_BYTES >> 20} MB; a row may have at most so many. "
            "Split the row."
        )
