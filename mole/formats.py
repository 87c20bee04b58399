"""Rows out of a file or a hub data set: JSON, JSONL, CSV or Parquet, read into records and nothing judged yet.

No torch. Whatever stops the reading as a whole (no such file, malformed JSON, an unreachable hub) is a `DataError`
of one line; what is wrong with a single row is left to `mole.data`.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
import threading
from codecs import BOM_UTF16_BE, BOM_UTF16_LE
from pathlib import Path
from typing import Any, NamedTuple

from mole.errors import DataError

SUFFIXES = {
    **dict.fromkeys((".json", ".jsonl", ".ndjson"), "json"),
    **dict.fromkeys((".csv", ".tsv"), "csv"),
    **dict.fromkeys((".parquet", ".pq"), "parquet"),
}
FORMATS = "JSON, JSONL, CSV or Parquet"
HUB_ID = re.compile(r"(?P<id>[\w-][\w.-]*(/[\w-][\w.-]*)?)(:(?P<config>[\w.-]*))?(:(?P<split>[\w.-]+(\[[\w:%]*\])?))?")
HUB_PATIENCE = 8.0
"""Seconds given to the hub to say that it is there."""


class Records(NamedTuple):
    """What a source holds: values as they were read, each with its row number (in JSONL its line), from 1.

    A value is a `DataError` where a CSV row does not fit its header.
    """

    rows: list[tuple[int, Any]]
    fingerprint: str
    """sha256 of the content."""


def read_records(path: str, limit: int | None = None, field: str = "data.path") -> Records:
    """Read a file (by its suffix) or a hub data set `owner/name[:config[:split]]` (split `train` unless given).

    `limit` keeps the first rows. Raises `DataError` naming the file, and the line where there is one; `field` is the
    setting to be blamed.
    """
    if not path.strip():
        raise DataError(f"{field} is empty; give a {FORMATS} file or a hub id.", field=field)
    try:
        file = Path(path).expanduser()
        if file.is_dir():
            raise DataError(f"{path} is a folder; give one {FORMATS} file ({field}).", field=field)
        if file.exists():
            return read_file(file, limit)
        hub_id = None if file.suffix.lower() in SUFFIXES else HUB_ID.fullmatch(path)
        if hub_id is None:
            raise DataError(f"There is no file {path} ({field}); give a {FORMATS} file or a hub id.", field=field)
        return read_hub(hub_id["id"], hub_id["config"] or None, hub_id["split"] or "train", limit)
    except DataError as error:
        error.field = field
        raise
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or one_line(error)
        raise DataError(f"{path} cannot be read: {reason} ({field}).", field=field) from None


def read_file(file: Path, limit: int | None) -> Records:
    """The records of one local file. Raises `DataError`, or `OSError` when it cannot be opened."""
    kind = SUFFIXES.get(file.suffix.lower())
    if kind is None:
        raise DataError(f"{file} has none of the endings {', '.join(SUFFIXES)}, by which the format is known.")
    content = file.read_bytes()
    if not content.strip():
        raise DataError(f"{file} is empty.")
    if kind == "parquet":
        rows = parse_parquet(file)
    else:
        text = decode(content, file)
        rows = parse_json(text, file) if kind == "json" else parse_csv(text, file)
    if not rows:
        raise DataError(f"{file} holds no rows.")
    return Records(rows[:limit], hashlib.sha256(content).hexdigest())


def decode(content: bytes, file: Path) -> str:
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


def parse_parquet(file: Path) -> list[tuple[int, Any]]:
    """One record a row. Raises `DataError` when it is no Parquet file."""
    import pyarrow
    import pyarrow.parquet

    try:
        return list(enumerate(pyarrow.parquet.read_table(file).to_pylist(), start=1))
    except (pyarrow.ArrowException, ValueError) as error:
        raise DataError(f"{file} is not a Parquet file that can be read: {one_line(error)}.") from None


def read_hub(name: str, config: str | None, split: str, limit: int | None) -> Records:
    """A split of a data set on the Hugging Face hub, or of its cached copy when `HF_HUB_OFFLINE` is set.

    Code that comes with a data set is never run. Raises `DataError` within seconds when the hub cannot be reached.
    """
    import datasets

    check_hub(name)
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
    return Records(list(enumerate(rows, start=1)), hashlib.sha256(content).hexdigest())


def check_hub(name: str) -> None:
    """Ask the hub once whether it has the data set. Raises `DataError` within `HUB_PATIENCE` seconds when not."""
    from huggingface_hub import HfApi, is_offline_mode
    from huggingface_hub.errors import RepositoryNotFoundError

    if is_offline_mode():
        return
    failures: list[Exception] = []

    def ask() -> None:
        try:
            HfApi().dataset_info(name, timeout=HUB_PATIENCE / 2)
        except Exception as error:
            failures.append(error)

    # In a thread: the client's own timeout does not cover a name look-up that hangs.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(HUB_PATIENCE)
    if failures and isinstance(failures[0], RepositoryNotFoundError):
        raise DataError(f"There is no file {name}, and no such data set on the Hugging Face hub (or it is private).")
    if failures or asking.is_alive():
        why = one_line(failures[0]) if failures else f"no answer in {HUB_PATIENCE:g} s"
        raise DataError(
            f"There is no file {name}, and the Hugging Face hub cannot be reached ({why}); give a local file, or set "
            "HF_HUB_OFFLINE=1 to use a cached copy."
        )


def one_line(error: Exception) -> str:
    """An exception's message on one line, cut to a readable length, without its final stop."""
    text = " ".join(str(error).split()) or type(error).__name__
    return (text if len(text) <= 200 else text[:199] + "…").rstrip(".")
