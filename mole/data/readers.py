"""Reading JSON, JSONL, CSV, Parquet and text files and hub data sets into records. No torch.

What stops the reading as a whole (no such file, malformed JSON, an unreachable hub) is a `DataError` of one line;
single rows are checked in `mole.data.examples`.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mole.core import limits
from mole.core.errors import DataError
from mole.core.files import regular
from mole.core.paths import local_path
from mole.core.text import one_line
from mole.data.checks import check_columns, check_row_count, columns_of
from mole.data.compressed import SUFFIXES, decompressed, read_whole
from mole.data.encodings import decode_text
from mole.data.heads import read_head
from mole.data.parquet import parse_parquet
from mole.data.shapes import join_names
from mole.data.text_formats import parse_csv, parse_json, parse_text

FILE_FORMATS = {
    **dict.fromkeys((".json", ".jsonl", ".ndjson"), "json"),
    **dict.fromkeys((".csv", ".tsv"), "csv"),
    **dict.fromkeys((".parquet", ".pq"), "parquet"),
    ".txt": "text",
}
FILE_SUFFIXES = (*FILE_FORMATS, *SUFFIXES)
"""Suffixes of data files, with those of compressed ones."""
FORMAT_NAMES = "JSON, JSONL, CSV, Parquet or text"
DATASET_ID = re.compile(
    r"(?P<id>[\w-][\w.-]*(/[\w-][\w.-]*)?)(:(?P<config>[\w.-]*))?(:(?P<split>[\w.-]+(\[[\w:%]*\])?))?"
)
HUB_TIMEOUT = 8.0
"""Seconds to wait for an answer of the hub."""


@dataclass(frozen=True)
class Records:
    """The rows of a file or data set, unchecked.

    Attributes:
        rows: (number, value) pairs; the number counts from 1 (in JSONL, it is the line). The value is a `DataError`
            where a CSV row does not match the header.
        fingerprint: sha256 of the content that was read.
        columns: the names in the rows, in the order in which they first occur.
        complete: whether these are all rows of the source.
        notices: what was guessed about the source, in sentences.
    """

    rows: list[tuple[int, Any]]
    fingerprint: str
    columns: list[str]
    complete: bool = True
    notices: list[str] = field(default_factory=list)


def read_records(
    path: str,
    limit: int | None = None,
    field: str = "data.path",
    *,
    peek: bool = False,
    name: str | None = None,
    split: str | None = None,
) -> Records:
    """Read a file (its suffix gives the format) or a hub data set `owner/name[:config[:split]]` (split: `train`).

    Args:
        path: the file, or the hub id when there is no such file.
        limit: keep only the first rows.
        field: the setting that errors name.
        peek: read no more of a file than `limit` rows need.
        name, split: configuration and split of a hub data set, if the id does not name them.

    Raises `DataError` naming the file, and the line where there is one.
    """
    if not path.strip():
        raise DataError(f"{field} is empty; give a {FORMAT_NAMES} file or a hub id.", field=field)
    try:
        file = local_path(path)
        if file.is_dir():
            raise DataError(f"{path} is a folder; give a {FORMAT_NAMES} file ({field}).", field=field)
        if file.exists():
            check_file_alone(path, name, split)
            return read_file(file, limit, peek)
        hub_id = None if file.suffix.lower() in FILE_SUFFIXES else DATASET_ID.fullmatch(path)
        if hub_id is None:
            raise DataError(f"There is no file {path} ({field}); give a {FORMAT_NAMES} file or a hub id.", field=field)
        config = one_of(path, "configuration", hub_id["config"], name)
        return read_hub_dataset(hub_id["id"], config, one_of(path, "split", hub_id["split"], split) or "train", limit)
    except DataError as error:
        error.field = field
        raise
    except (OSError, ValueError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or one_line(error)
        raise DataError(f"{path} cannot be read: {reason} ({field}).", field=field) from None


def check_file_alone(path: str, name: str | None, split: str | None) -> None:
    """Raise `DataError` for a configuration or a split of a file."""
    for what, given in (("configuration", name), ("split", split)):
        if given:
            raise DataError(f"{path} is a file, which has no {what} {given!r}; those are of hub data sets.")


def one_of(path: str, what: str, inside: str | None, beside: str | None) -> str | None:
    """The configuration or split in a hub id, or the one given beside it. Raises `DataError` where they differ."""
    if inside and beside and inside != beside:
        raise DataError(f"{path} names a {what}, and {beside!r} is given beside it; give one of them.")
    return inside or beside or None


def read_file(file: Path, limit: int | None, peek: bool = False) -> Records:
    """The records of one local file. Raises `DataError`, or `OSError` when it cannot be opened."""
    suffix = file.suffix.lower()
    if suffix not in FILE_SUFFIXES:
        raise DataError(f"{file} has none of the known suffixes: {', '.join(FILE_SUFFIXES)}.")
    if not file.is_file():  # reading a pipe may never end
        raise DataError(f"{file} is not a regular file but a device or a pipe.")
    size = file.stat().st_size
    if size > limits.FILE_BYTES:
        raise DataError(f"{file} has {size >> 20} MB; the maximum is {limits.FILE_BYTES >> 20} MB. Split the file.")
    part = limit + 1 if peek and limit is not None else None  # one more than asked for shows whether there are more
    notices: list[str] = []
    with open(file, "rb", opener=regular) as opened:
        if suffix in SUFFIXES:
            with decompressed(opened, file) as (inside, suffix):
                kind = FILE_FORMATS.get(suffix)
                if kind is None or kind == "parquet":
                    known = ", ".join(name for name in FILE_FORMATS if FILE_FORMATS[name] != "parquet")
                    raise DataError(f"{file} has a file in it without one of the suffixes {known}.")
                content = read_head(inside, part, kind, file) if part else read_whole(inside, size, file)
                more = kind == "text" and bool(inside.read(1))
        else:
            kind = FILE_FORMATS[suffix]
            content = read_head(opened, part, kind, file) if part else opened.read()
            more = kind == "text" and bool(opened.read(1))
        if not content.strip():
            raise DataError(f"{file} is empty.")
        if kind == "parquet":
            rows = parse_parquet(opened if part else content, file, size, part)
        else:
            text = decode_text(content, file, notices)
            if kind == "json":
                rows = parse_json(text, file, notices, suffix != ".json")
            else:
                rows = (parse_csv if kind == "csv" else parse_text)(text, file, notices)
    if not rows:
        raise DataError(f"{file} contains no rows.")
    check_row_count(len(rows), file)
    complete = (limit is None or len(rows) <= limit) and not more
    rows = rows[:limit]
    return Records(rows, hashlib.sha256(content).hexdigest(), columns_of(rows, file), complete, notices)


def read_hub_dataset(name: str, config: str | None, split: str, limit: int | None) -> Records:
    """Read a split of a data set from the Hugging Face hub, or from its cache when `HF_HUB_OFFLINE` is set.

    Never runs a data set's code. Raises `DataError`, within seconds when the hub cannot be reached.
    """
    import datasets

    check_dataset_exists(name)
    datasets.disable_progress_bars()
    try:
        check_names(name, config, split)
        data = datasets.load_dataset(name, config, split=split)
    except DataError:
        raise
    except Exception as error:  # of many unrelated types: wrong files, no connection, no space
        raise DataError(f"The data set {name} on the hub cannot be loaded: {one_line(error)}.") from error
    finally:
        datasets.enable_progress_bars()
    check_columns(data.column_names, f"The data set {name} on the hub")
    rows = data.select(range(min(limit, len(data)))).to_list() if limit is not None else data.to_list()
    if not rows:
        raise DataError(f"The split {split} of the data set {name} on the hub contains no rows.")
    content = json.dumps(rows, sort_keys=True, default=str).encode()
    return Records(
        list(enumerate(rows, start=1)), hashlib.sha256(content).hexdigest(), data.column_names, len(rows) == len(data)
    )


def check_names(name: str, config: str | None, split: str) -> None:
    """Raise `DataError` with those that exist unless a data set has the configuration and the split.

    Nothing is downloaded but what describes the data set.
    """
    import datasets

    try:
        builder = datasets.load_dataset_builder(name, config)
    except ValueError as error:
        known = datasets.get_dataset_config_names(name)
        if config in known:
            raise
        if config is None and len(known) > 1:
            asked = f"has several configurations; name one, as in {name}:{known[0]}; there are"
        else:
            asked = f"has no configuration {config!r}; it has"
        raise DataError(f"The data set {name} on the hub {asked}: {join_names(known)}.") from error
    there = list(builder.info.splits or getattr(builder.config, "data_files", None) or [])
    wanted = [part.partition("[")[0].strip() for part in split.split("+")]
    if missing := [part for part in wanted if there and part not in (*there, "all")]:
        raise DataError(f"The data set {name} on the hub has no split {missing[0]!r}; it has: {join_names(there)}.")


def check_dataset_exists(name: str) -> None:
    """Raise `DataError` within `HUB_TIMEOUT` seconds unless the hub has the data set."""
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

    # In a thread, because the client's timeout does not cover a DNS look-up that hangs.
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
