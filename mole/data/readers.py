"""Rows out of a file or a hub data set: JSON, JSONL, CSV or Parquet, read into records and nothing judged yet.

No torch. Whatever stops the reading as a whole (no such file, malformed JSON, an unreachable hub) is a `DataError`
of one line; what is wrong with a single row is left to `mole.data.encoding`.
"""

from __future__ import annotations

import csv
import hashlib
import io
import itertools
import json
import re
import threading
from codecs import BOM_UTF8, BOM_UTF16_BE, BOM_UTF16_LE
from pathlib import Path
from typing import Any, NamedTuple

from mole.core import limits
from mole.core.errors import DataError
from mole.core.paths import local_path
from mole.core.text import one_line

FILE_FORMATS = {
    **dict.fromkeys((".json", ".jsonl", ".ndjson"), "json"),
    **dict.fromkeys((".csv", ".tsv"), "csv"),
    **dict.fromkeys((".parquet", ".pq"), "parquet"),
}
FORMAT_NAMES = "JSON, JSONL, CSV or Parquet"
DATASET_ID = re.compile(
    r"(?P<id>[\w-][\w.-]*(/[\w-][\w.-]*)?)(:(?P<config>[\w.-]*))?(:(?P<split>[\w.-]+(\[[\w:%]*\])?))?"
)
HUB_TIMEOUT = 8.0
"""Seconds given to the hub to say that it is there."""


class Records(NamedTuple):
    """What a source holds: values as they were read, each with its row number (in JSONL its line), from 1.

    A value is a `DataError` where a CSV row does not fit its header.
    """

    rows: list[tuple[int, Any]]
    fingerprint: str
    """sha256 of the content, or of what was read of it."""
    complete: bool = True
    """Whether these are all the rows there are."""


def read_records(path: str, limit: int | None = None, field: str = "data.path", *, peek: bool = False) -> Records:
    """Read a file (by its suffix) or a hub data set `owner/name[:config[:split]]` (split `train` unless given).

    `limit` keeps the first rows; with `peek` no more of a file is read than they need. Raises `DataError` naming the
    file, and the line where there is one; `field` is the setting to be blamed.
    """
    if not path.strip():
        raise DataError(f"{field} is empty; give a {FORMAT_NAMES} file or a hub id.", field=field)
    try:
        file = local_path(path)
        if file.is_dir():
            raise DataError(f"{path} is a folder; give one {FORMAT_NAMES} file ({field}).", field=field)
        if file.exists():
            return read_file(file, limit, peek)
        hub_id = None if file.suffix.lower() in FILE_FORMATS else DATASET_ID.fullmatch(path)
        if hub_id is None:
            raise DataError(f"There is no file {path} ({field}); give a {FORMAT_NAMES} file or a hub id.", field=field)
        return read_hub_dataset(hub_id["id"], hub_id["config"] or None, hub_id["split"] or "train", limit)
    except DataError as error:
        error.field = field
        raise
    except (OSError, ValueError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or one_line(error)
        raise DataError(f"{path} cannot be read: {reason} ({field}).", field=field) from None


def read_file(file: Path, limit: int | None, peek: bool = False) -> Records:
    """The records of one local file. Raises `DataError`, or `OSError` when it cannot be opened."""
    kind = FILE_FORMATS.get(file.suffix.lower())
    if kind is None:
        raise DataError(f"{file} has none of the endings {', '.join(FILE_FORMATS)}, by which the format is known.")
    if not file.is_file():  # a pipe may never end
        raise DataError(f"{file} is not a plain file but a device or a pipe.")
    size = file.stat().st_size
    if size > limits.FILE_BYTES:
        raise DataError(f"{file} has {size >> 20} MB; it may have {limits.FILE_BYTES >> 20}. Split it, or take a part.")
    part = limit + 1 if peek and limit is not None else None  # one row more tells that there are more
    content = read_head(file, part, kind) if part else file.read_bytes()
    if not content.strip():
        raise DataError(f"{file} is empty.")
    if kind == "parquet":
        rows = parse_parquet(file, part)
    else:
        text = decode_text(content, file)
        rows = parse_json(text, file) if kind == "json" else parse_csv(text, file)
    if not rows:
        raise DataError(f"{file} holds no rows.")
    check_row_count(len(rows), file)
    return Records(rows[:limit], hashlib.sha256(content).hexdigest(), limit is None or len(rows) <= limit)


def check_row_count(count: int, file: Path) -> None:
    """See that there are not too many. Raises `DataError`."""
    if count > limits.ROWS:
        raise DataError(f"{file} holds {count} rows; it may hold {limits.ROWS}. Split it, or take a part of it.")


def read_head(file: Path, rows: int, kind: str) -> bytes:
    """So many lines of a file that they hold its first `rows` rows; all of UTF-16 text and of a JSON array."""
    with file.open("rb") as lines:
        start = lines.read(1 << 16)
        if kind == "parquet":
            return start
        lines.seek(0)
        if start.startswith((BOM_UTF16_LE, BOM_UTF16_BE)) or start.removeprefix(BOM_UTF8).lstrip().startswith(b"["):
            return lines.read()
        read, whole, quotes = [], 0, 0
        for line in lines:
            read.append(line)
            quotes += line.count(b'"')
            # A line break inside quotes ends no row of CSV; the header is one row more.
            whole += bool(line.strip()) and (kind == "json" or quotes % 2 == 0)
            if whole > rows:
                break
    return b"".join(read)


def decode_text(content: bytes, file: Path) -> str:
    """Text of UTF-8, or of UTF-16 with its byte order mark, which is dropped. Raises `DataError` with the line."""
    encoding = "utf-16" if content.startswith((BOM_UTF16_LE, BOM_UTF16_BE)) else "utf-8-sig"
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        name = encoding.removesuffix("-sig").upper()
        raise DataError(f"{file}, line {line}: not valid {name} text; save the file as UTF-8.") from None


def parse_json(text: str, file: Path) -> list[tuple[int, Any]]:
    """An array's elements, or one value a line (blank lines skipped). Raises `DataError` with the line and column."""
    if text.lstrip().startswith("["):
        return list(enumerate(load_json(text, file, first_line=1), start=1))
    rows = []
    # Not splitlines: JSON text may hold U+2028 and its like, which are no ends of lines.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            if number == 1 and line.strip() == "{":
                raise DataError(f"{file} holds an object over several lines; give an array of objects, or one a line.")
            rows.append((number, load_json(line, file, number)))
    return rows


def load_json(text: str, file: Path, first_line: int) -> Any:
    """The value `text` spells. Raises `DataError` with the line in the file."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise DataError(f"{file}: malformed JSON on line {line}, column {error.colno}: {error.msg}.") from None
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else "a number with too many digits"
        raise DataError(f"{file}: malformed JSON on line {first_line}: {reason}.") from None


def parse_csv(text: str, file: Path) -> list[tuple[int, Any]]:
    """One record a row under the header's names; comma, semicolon or tab, whichever the header uses."""
    header = text.lstrip().partition("\n")[0]
    delimiter = max(",;\t", key=header.count)
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    rows: list[tuple[int, Any]] = []
    try:
        lines = (line for line in reader if line)
        names = [name.strip() for name in next(lines, [])]
        doubled = {name for name in names if names.count(name) > 1}
        if doubled:
            raise DataError(f"{file}: two columns are called {doubled.pop()!r}.")
        for number, values in enumerate(lines, start=1):
            if len(values) == len(names):
                rows.append((number, dict(zip(names, values, strict=True))))
            else:
                rows.append((number, DataError(f"has {len(values)} values for {len(names)} columns")))
    except csv.Error as error:
        raise DataError(f"{file}: malformed CSV on line {max(reader.line_num, 1)}: {error}.") from None
    return rows


def parse_parquet(file: Path, limit: int | None = None) -> list[tuple[int, Any]]:
    """One record a row, the first `limit` only if given. Raises `DataError` when it is no Parquet file."""
    import pyarrow
    import pyarrow.parquet

    try:
        if limit is None:
            check_row_count(
                pyarrow.parquet.read_metadata(file).num_rows, file
            )  # a few bytes can stand for millions of rows
            table = pyarrow.parquet.read_table(file)
        else:
            with pyarrow.parquet.ParquetFile(file) as opened:
                batches = list(itertools.islice(opened.iter_batches(batch_size=limit), 1))
                table = pyarrow.Table.from_batches(batches, schema=opened.schema_arrow)
        return list(enumerate(table.to_pylist(), start=1))
    except OSError:
        raise
    except Exception as error:  # of many kinds: what a value can be here, Python's dates, for example, may not hold
        raise DataError(f"{file} is not a Parquet file that can be read: {one_line(error)}.") from None


def read_hub_dataset(name: str, config: str | None, split: str, limit: int | None) -> Records:
    """A split of a data set on the Hugging Face hub, or of its cached copy when `HF_HUB_OFFLINE` is set.

    Code that comes with a data set is never run. Raises `DataError` within seconds when the hub cannot be reached.
    """
    import datasets

    check_dataset_exists(name)
    datasets.disable_progress_bars()
    try:
        data = datasets.load_dataset(name, config, split=split)
    except Exception as error:  # the library raises many unrelated kinds; each is a wrong name, config or split here
        raise DataError(f"The hub's data set {name} cannot be loaded: {one_line(error)}.") from error
    finally:
        datasets.enable_progress_bars()
    rows = data.select(range(min(limit, len(data)))).to_list() if limit is not None else data.to_list()
    if not rows:
        raise DataError(f"The split {split} of the hub's data set {name} holds no rows.")
    content = json.dumps(rows, sort_keys=True, default=str).encode()
    return Records(list(enumerate(rows, start=1)), hashlib.sha256(content).hexdigest(), len(rows) == len(data))


def check_dataset_exists(name: str) -> None:
    """Ask the hub once whether it has the data set. Raises `DataError` within `HUB_PATIENCE` seconds when not."""
    from huggingface_hub import HfApi, is_offline_mode
    from huggingface_hub.errors import RepositoryNotFoundError

    if is_offline_mode():
        return
    failures: list[Exception] = []

    def ask() -> None:
        try:
            HfApi().dataset_info(name, timeout=HUB_TIMEOUT / 2)
        except Exception as error:
            failures.append(error)

    # In a thread: the client's own timeout does not cover a name look-up that hangs.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(HUB_TIMEOUT)
    if failures and isinstance(failures[0], RepositoryNotFoundError):
        raise DataError(f"There is no file {name}, and no such data set on the Hugging Face hub (or it is private).")
    if failures or asking.is_alive():
        why = one_line(failures[0]) if failures else f"no answer in {HUB_TIMEOUT:g} s"
        raise DataError(
            f"There is no file {name}, and the Hugging Face hub cannot be reached ({why}); give a local file, or set "
            "HF_HUB_OFFLINE=1 to use a cached copy."
        )
