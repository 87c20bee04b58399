"""The character encoding of a text file: UTF-8 or UTF-16, else the one that Windows wrote for decades. No torch."""

from __future__ import annotations

import codecs
from codecs import BOM_UTF8, BOM_UTF16_BE, BOM_UTF16_LE
from pathlib import Path

from mole.core.errors import DataError

SAMPLED = 1 << 16
"""Bytes that are looked at."""
WINDOWS = "cp1252"
AS_WINDOWS = "The file is not UTF-8; it is read as Windows-1252 (Western European)."


def guess_encoding(start: bytes) -> str:
    """The encoding of a text that begins with these bytes, as Python's codecs name it.

    UTF-16 is known by its mark, or by every second byte being 0, as in most texts with markup. What is no UTF-8 is
    Windows-1252, unless most of its letters beyond ASCII are UTF-8: then a byte is broken.
    """
    start = start[:SAMPLED]
    if start.startswith((BOM_UTF16_LE, BOM_UTF16_BE)):
        return "utf-16"
    if start.startswith(BOM_UTF8):
        return "utf-8-sig"
    for first, encoding in ((1, "utf-16-le"), (0, "utf-16-be")):
        if start[first::2].count(0) * 2 > len(start[first::2]) and not start[1 - first :: 2].count(0):
            return encoding
    text = codecs.getincrementaldecoder("utf-8")("replace").decode(start)
    broken = text.count("\ufffd")
    letters = sum(character > "\x7f" for character in text) - broken
    return WINDOWS if broken > letters and windows_text(start) else "utf-8-sig"


def windows_text(content: bytes) -> bool:
    """Whether these bytes can be text in Windows-1252."""
    try:
        content.decode(WINDOWS)
    except UnicodeDecodeError:
        return False
    return 0 not in content


def decode_text(content: bytes, file: Path, notices: list[str]) -> str:
    """The text of a file, without a byte order mark; a guess of the encoding is added to `notices`.

    Raises `DataError` with the line that cannot be decoded.
    """
    encoding = guess_encoding(content)
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        rest = content[error.start :]  # the first letter beyond ASCII may stand far into the file
        if content[: error.start].isascii() and guess_encoding(rest) == WINDOWS and windows_text(rest):
            notices.append(AS_WINDOWS)
            return content.decode(WINDOWS)
        line = content[: error.start].count(b"\n") + 1
        name = encoding.removesuffix("-sig").upper()
        raise DataError(f"{file}, line {line}: not valid {name} text; save the file as UTF-8.") from None
    if encoding == WINDOWS:
        notices.append(AS_WINDOWS)
    return text
