"""Reading Parquet files into records, bounded by the bytes they decode to. No torch.

A Parquet file of 2 kB can decode to gigabytes: a page is compressed, a text that is repeated is stored once, and a
count stands for any number of values. So the headers of a row group's pages are read before it is decoded (`scan`), and
texts that are repeated are decoded as indices into a dictionary, measured, and only then turned into rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from mole.core import limits
from mole.core.errors import DataError
from mole.core.text import one_line
from mole.data.checks import check_columns, check_row_count
from mole.data.thrift import read_struct

BATCH_BYTES = 64 << 20
"""Decoded bytes of the rows that are decoded at a time, about."""
BATCH_ROWS = 16_384
REPEATED_BYTES = 4 * BATCH_BYTES
"""What the repeated texts of a row group may decode to before they are measured."""
VALUE_BYTES = 32
"""Bytes of a value in memory beside its content, at least: its place in a row."""
FOOTER_BYTES = 32 << 20
"""It takes sixteen times as much memory, or more."""
MOST_PAGES = 1_000_000
"""A page usually has 1 MB, so that the largest file has a few thousand."""
HEADER_BYTES = (256, 1 << 16)
"""Bytes to read of a page's header: of most, and of those with long texts in their statistics."""
DATA_PAGE, DICTIONARY_PAGE, DATA_PAGE_V2 = 0, 2, 3
PLAIN, DELTA_LENGTH, DELTA_PREFIX = 0, 6, 7
DICTIONARY_ENCODINGS = (2, 8)


class Pages(NamedTuple):
    """The pages of a column in a row group.

    Attributes:
        bytes: their bytes without compression.
        values: the number of values, nulls and empty lists included.
        repeated: the number of values that are references to a dictionary, or prefixed by an earlier one.
        longest: bytes that one of these has at most.
        by_dictionary: whether all of these are references to a dictionary of texts.
    """

    bytes: int
    values: int
    repeated: int
    longest: int
    by_dictionary: bool


@dataclass
class Budget:
    """The bytes that a file may still decode to; `take` raises `DataError` when they are used up."""

    file: Path
    size: int
    used: int = 0
    pages: int = 0

    @property
    def allowed(self) -> int:
        """Bytes in all: a multiple of the file's size, but not too few for a small file or too many for a machine."""
        return min(max(limits.DECODED_TIMES * self.size, limits.DECODED_BYTES), limits.FILE_BYTES)

    def take(self, more: int) -> None:
        """Count bytes."""
        self.check(more)
        self.used += more

    def turn_page(self) -> None:
        """Count a page, whose header takes time to read."""
        self.pages += 1
        if self.pages > MOST_PAGES:
            raise DataError(f"{self.file} has more than {MOST_PAGES} pages, the maximum. Write it with larger pages.")

    def check(self, more: int) -> None:
        """Raise `DataError` if so many bytes more were too many."""
        if self.used + more > self.allowed:
            raise DataError(
                f"{self.file} of {max(self.size >> 10, 1)} kB decodes to {(self.used + more) >> 20} MB or more; the "
                f"maximum for a file of its size is {self.allowed >> 20} MB. Split it, or save its rows as JSONL."
            )


def parse_parquet(content: Any, file: Path, size: int, limit: int | None = None) -> list[tuple[int, Any]]:
    """One record per row, at most `limit` if given, of a file of `size` bytes: its content, or opened.

    Raises `DataError` when it is not a readable Parquet file, or decodes to more than is allowed.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        source = pyarrow.BufferReader(content) if isinstance(content, bytes) else content
        check_footer(source, file, size)
        metadata = pyarrow.parquet.read_metadata(source)
        check_columns(metadata.schema.names, file)
        if limit is None:
            check_row_count(metadata.num_rows, file)  # a small file can declare millions of rows
        rows: list[Any] = []
        budget = Budget(file, size)
        for group in range(metadata.num_row_groups):
            for part in decode_group(source, metadata, group, budget, None if limit is None else limit - len(rows)):
                rows += part
            if limit is not None and len(rows) >= limit:
                break
        return list(enumerate(rows[:limit], start=1))
    except (OSError, DataError):
        raise
    except Exception as error:  # of many types, e.g. dates that Python cannot represent
        raise DataError(f"{file} cannot be read as Parquet: {one_line(error)}.") from None


def check_footer(source: Any, file: Path, size: int) -> None:
    """Raise `DataError` when the description of the columns and row groups, at the file's end, is too long."""
    source.seek(max(size - 8, 0))
    length = int.from_bytes(source.read(4), "little")
    if FOOTER_BYTES < length < size:  # a length beyond the file's is an error for the reader
        raise DataError(
            f"{file} has a footer of {length >> 20} MB; the maximum is {FOOTER_BYTES >> 20} MB. Write it with larger "
            "row groups."
        )


def decode_group(source: Any, metadata: Any, group: int, budget: Budget, limit: int | None) -> Iterator[list[Any]]:
    """The rows of a row group, at most `limit` if given, in parts. Raises `DataError`."""
    import pyarrow
    import pyarrow.parquet

    columns = [metadata.row_group(group).column(index) for index in range(metadata.num_columns)]
    scanned = [scan(source, column, metadata.schema.column(index), budget) for index, column in enumerate(columns)]
    size = sum(pages.bytes + VALUE_BYTES * pages.values for pages in scanned)
    budget.check(size)
    share = REPEATED_BYTES // max(len(scanned), 1)
    repeated = {i: pages for i, pages in enumerate(scanned) if pages.repeated * pages.longest > share}
    count = max(min(BATCH_ROWS, BATCH_BYTES * metadata.row_group(group).num_rows // max(size, 1)), 1)
    names = [metadata.schema.column(index).path for index, pages in repeated.items() if pages.by_dictionary]
    for index, pages in repeated.items():
        if not pages.by_dictionary:
            if metadata.schema.column(index).max_repetition_level:
                budget.check(pages.repeated * pages.longest)  # a single row may have all of them
            count = max(min(count, share // pages.longest), 1)
    count = count if limit is None else min(count, limit)
    plain = metadata.schema.to_arrow_schema()
    with pyarrow.parquet.ParquetFile(source, metadata=metadata, read_dictionary=names, pre_buffer=False) as opened:
        for batch in opened.iter_batches(count, row_groups=[group], use_threads=limit is None):
            measured = sum(map(decoded_bytes, batch.columns)) + VALUE_BYTES * batch.num_rows * batch.num_columns
            budget.take(measured)
            step = max(batch.num_rows * BATCH_BYTES // max(measured, BATCH_BYTES), 1)
            for start in range(0, batch.num_rows, step):
                table = pyarrow.Table.from_batches([batch.slice(start, step)])
                yield (without_dictionaries(table, plain) if names else table).to_pylist()
            if limit is not None:
                limit -= batch.num_rows
                if limit <= 0:
                    return


def without_dictionaries(table: Any, schema: Any) -> Any:
    """The table with the types of the schema, which Python reads faster than dictionaries."""
    import pyarrow

    try:
        return table.cast(schema)
    except (pyarrow.ArrowNotImplementedError, pyarrow.ArrowInvalid):
        return table


def decoded_bytes(array: Any) -> int:
    """Bytes of an array with its texts repeated."""
    import pyarrow.compute as compute
    from pyarrow import types

    kind = array.type
    if types.is_dictionary(kind):
        if not (types.is_string(kind.value_type) or types.is_binary(kind.value_type)):
            return array.nbytes
        lengths = compute.binary_length(array.dictionary).cast("int64")
        return (compute.sum(lengths.take(array.indices)).as_py() or 0) + array.indices.nbytes
    if types.is_struct(kind):
        return sum(decoded_bytes(array.field(index)) for index in range(kind.num_fields)) + len(array)
    if types.is_list(kind) or types.is_large_list(kind) or types.is_map(kind):
        return decoded_bytes(array.flatten() if not types.is_map(kind) else array.values) + VALUE_BYTES * len(array)
    return array.nbytes


def scan(source: Any, column: Any, schema: Any, budget: Budget) -> Pages:
    """What the pages of a column hold in a row group, from their headers. Raises `ValueError` for broken ones."""
    at = column.data_page_offset
    if column.has_dictionary_page and 0 < column.dictionary_page_offset < at:
        at = column.dictionary_page_offset
    end = at + column.total_compressed_size
    size = values = repeated = longest = 0
    by_dictionary = schema.physical_type == "BYTE_ARRAY"
    dictionary: tuple[int, int, int] | None = None
    while at < end:
        budget.turn_page()
        header, length = read_header(source, at)
        unpacked, packed = header[2], header[3]
        size += unpacked
        about = header.get(8 if header.get(1) == DATA_PAGE_V2 else 7 if header.get(1) == DICTIONARY_PAGE else 5, {})
        if header.get(1) == DICTIONARY_PAGE:
            dictionary = (at + length, packed, unpacked)
        elif header.get(1) in (DATA_PAGE, DATA_PAGE_V2):
            count = max(about.get(1, 0), 0)
            encoding = about.get(4 if header[1] == DATA_PAGE_V2 else 2, PLAIN)
            values += count
            if schema.physical_type == "FIXED_LEN_BYTE_ARRAY":
                repeated, longest = repeated + count, schema.length
            elif encoding in DICTIONARY_ENCODINGS and schema.physical_type == "BYTE_ARRAY":
                repeated += count
            elif encoding == DELTA_PREFIX:
                repeated, longest, by_dictionary = repeated + count, max(longest, unpacked), False
        at += length + packed
    if dictionary is not None and by_dictionary and repeated:
        longest = max(longest, longest_text(source, dictionary, column.compression, repeated))
    return Pages(size, values, repeated, longest, by_dictionary)


def read_header(source: Any, at: int) -> tuple[dict[int, Any], int]:
    """The header of the page at a place of the file, and its length. Raises `ValueError` when it is broken."""
    for most in HEADER_BYTES:
        source.seek(at)
        try:
            header, length = read_struct(source.read(most))
            break
        except ValueError:
            if most == HEADER_BYTES[-1]:
                raise
    if not all(isinstance(header.get(number), int) and header[number] >= 0 for number in (1, 2, 3)):
        raise ValueError("a page's header lacks its sizes")
    return header, length


def longest_text(source: Any, page: tuple[int, int, int], compression: str, repeated: int) -> int:
    """Bytes of the longest text of a dictionary page, or of the page if that is small or cannot be read."""
    import pyarrow

    at, packed, unpacked = page
    if repeated * unpacked <= BATCH_BYTES or unpacked > BATCH_BYTES:
        return unpacked
    source.seek(at)
    content = source.read(packed)
    if compression != "UNCOMPRESSED":
        try:
            content = pyarrow.decompress(content, unpacked, compression.lower(), asbytes=True)
        except (pyarrow.ArrowException, ValueError):
            return unpacked
    at = longest = 0
    while at + 4 <= len(content):
        length = int.from_bytes(content[at : at + 4], "little")
        longest = max(longest, length)
        at += 4 + length
    return longest
