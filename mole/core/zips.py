"""Zip files from elsewhere: how much is in one, before anything of it is read. No torch."""

from __future__ import annotations

from typing import BinaryIO

TAIL_BYTES = (1 << 16) + 22
"""The end of a zip file that holds the record of how many files are in it."""
ENTRY_BYTES = 1 << 10
"""Bytes of the list for each file; the longest names and comments take more."""


def count_files(opened: BinaryIO, most: int) -> int:
    """How many files a zip says it has, or would need for its list to be so long; read from its end alone.

    A number above `most` means that reading the list could take the memory. 0 if it is no zip file.
    """
    opened.seek(0, 2)
    opened.seek(max(opened.tell() - TAIL_BYTES, 0))
    tail = opened.read()
    opened.seek(0)
    record = tail[tail.rfind(b"PK\x05\x06") :]
    if record[:2] != b"PK":
        return 0
    count, size = int.from_bytes(record[10:12], "little"), int.from_bytes(record[12:16], "little")
    return max(count, size // ENTRY_BYTES if size > most * ENTRY_BYTES else 0)
