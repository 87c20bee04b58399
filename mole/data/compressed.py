"""Compressed data files: gzip, and zip with one file in it; read no further than a file may be large. No torch."""

from __future__ import annotations

import gzip
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, BinaryIO, cast

from mole.core import limits, zips
from mole.core.errors import DataError

SUFFIXES = (".gz", ".zip")
ZIP_FILES = 1000
"""Files in a zip, those that are not data included."""


@contextmanager
def decompressed(opened: BinaryIO, file: Path) -> Iterator[tuple[IO[bytes], str]]:
    """A compressed file's content, and the suffix of the name of what is in it. Raises `DataError`."""
    try:
        if file.suffix.lower() == ".gz":
            with gzip.GzipFile(fileobj=opened) as content:
                yield cast(IO[bytes], content), Path(file.stem).suffix.lower()
        else:
            check_zip(opened, file)
            with zipfile.ZipFile(opened) as archive:
                member = only_member(archive, file)
                with archive.open(member) as content:
                    yield content, Path(member.filename).suffix.lower()
    except (EOFError, zlib.error, gzip.BadGzipFile, zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:
        reason = str(error).rstrip(".") or "it ends early"
        raise DataError(f"{file} cannot be decompressed: {reason}.") from None


def check_zip(opened: BinaryIO, file: Path) -> None:
    """Raise `DataError` for a zip with too many files: reading their list would take the memory."""
    if (count := zips.count_files(opened, ZIP_FILES)) > ZIP_FILES:
        raise DataError(f"{file} has {count} files or more in it; give a zip with one data file.")


def only_member(archive: zipfile.ZipFile, file: Path) -> zipfile.ZipInfo:
    """The one file in a zip, without what a Mac adds. Raises `DataError`."""
    members = [item for item in archive.infolist() if not item.is_dir() and not item.filename.startswith("__MACOSX/")]
    if len(members) != 1:
        raise DataError(f"{file} has {len(members)} files in it; give a zip with one data file.")
    if members[0].flag_bits & 1:
        raise DataError(f"{file} is encrypted; give it without a password.")
    return members[0]


def read_whole(content: IO[bytes], size: int, file: Path) -> bytes:
    """All of a compressed file's content. Raises `DataError` where it is too large for the file's `size` in bytes."""
    most = min(limits.FILE_BYTES, max(limits.DECODED_BYTES, limits.DECODED_TIMES * size))
    read = content.read(most + 1)
    if len(read) > most:
        raise DataError(f"{file} has more than {most >> 20} MB in it, too much for its size. Decompress it first.")
    return read
