"""Reading files and hub ids: every format gives the same rows, and whatever stops the reading is one clear line."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub.constants
import pytest

from mole.core.errors import DataError
from mole.data import read_hub_dataset, read_records, readers

ROWS = [{"prompt": f"question {i}", "completion": f"réponse, {i}\u2028«ok»"} for i in range(5)]


def written(folder: Path, name: str, rows: list[dict[str, Any]] = ROWS) -> str:
    """The path of `rows` written in the format of the name's ending."""
    path = folder / name
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix in (".csv", ".tsv"):
        import csv

        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    else:
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def error_of(path: str | Path, **options: Any) -> str:
    """The one line with which reading fails."""
    with pytest.raises(DataError) as caught:
        read_records(str(path), **options)
    message = str(caught.value)
    assert "\n" not in message and caught.value.exit_code == 2 and caught.value.field is not None
    return message


@pytest.mark.parametrize("name", ["d.json", "d.jsonl", "d.ndjson", "d.csv", "d.tsv", "d.parquet"])
def test_every_format_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    assert read_records(written(tmp_path, name)).rows == list(enumerate(ROWS, start=1))


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
@pytest.mark.parametrize("name", ["d.json", "d.jsonl", "d.csv"])
def test_a_byte_order_mark_is_no_part_of_the_data(tmp_path: Path, name: str, encoding: str) -> None:
    path = Path(written(tmp_path, name))
    path.write_bytes(path.read_bytes().decode().encode(encoding))
    assert [row for _, row in read_records(str(path)).rows] == ROWS


def test_windows_line_ends_and_blank_lines_are_skipped_and_lines_keep_their_numbers(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_bytes(b'\r\n{"text": "a"}\r\n\r\n  \r\n{"text": "b"}\r\n')
    assert read_records(str(path)).rows == [(2, {"text": "a"}), (5, {"text": "b"})]


def test_a_json_file_may_hold_one_object_a_line(tmp_path: Path) -> None:
    path = Path(written(tmp_path, "d.jsonl")).rename(tmp_path / "lines.json")
    assert [row for _, row in read_records(str(path)).rows] == ROWS


def test_a_csv_of_a_spreadsheet_in_german_uses_semicolons(tmp_path: Path) -> None:
    path = tmp_path / "d.csv"
    path.write_text('prompt;completion\n"a; b";"c, d"\n')
    assert read_records(str(path)).rows == [(1, {"prompt": "a; b", "completion": "c, d"})]


def test_a_quoted_csv_cell_may_span_lines_and_be_long(tmp_path: Path) -> None:
    long = "x\n" * 100_000
    path = written(tmp_path, "d.csv", [{"text": long}])
    assert read_records(path).rows == [(1, {"text": long})]


@pytest.mark.parametrize("name", ["d.jsonl", "d.json"])
def test_malformed_json_names_its_line(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    lines = ['{"text": "fine"}'] * 6 + ['{"text": "not fine'] + ['{"text": "fine"}']
    path.write_text("\n".join(lines))
    assert "malformed JSON on line 7, column 10" in error_of(path)


def test_malformed_json_in_an_array_names_its_line(tmp_path: Path) -> None:
    path = tmp_path / "d.json"
    path.write_text("[\n" + '{"text": "fine"},\n' * 5 + '{"text" "not fine"},\n{"text": "fine"}\n]')
    assert "malformed JSON on line 7, column 9" in error_of(path)


@pytest.mark.parametrize("value", ["1" * 5000, "[" * 100_000], ids=["too many digits", "too deep"])
def test_json_that_python_refuses_is_malformed_too(tmp_path: Path, value: str) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text('{"text": "fine"}\n{"text": ' + value + "}\n")
    assert "malformed JSON on line 2" in error_of(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("d.jsonl", b"", "is empty"),
        ("d.csv", b" \r\n\n", "is empty"),
        ("d.json", b"[]", "contains no rows"),
        ("d.csv", b"prompt,completion\n", "contains no rows"),
        ("d.json", b'{\n "text": "a"\n}', "an object over several lines"),
        ("d.jsonl", b'{"text": "\xc3\xa9"}\n{"text": "\xff"}', "line 2: not valid UTF-8 text"),
        ("d.csv", b'text\n"a\n', "malformed CSV on line 2"),
        ("d.csv", b"text,text\na,b\n", "two columns have the name 'text'"),
        ("d.parquet", b"not parquet at all", "cannot be read as Parquet"),
        ("d.doc", b"hello", "has none of the known suffixes: .json, .jsonl"),
    ],
)
def test_a_file_that_cannot_be_read_says_why(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    assert message in error_of(path)


@pytest.mark.timed
@pytest.mark.parametrize("name", ["missing.jsonl", "a/b/missing", "data/missing.csv", "C:\\data\\missing", "nul\0.csv"])
def test_a_missing_file_is_not_looked_for_on_the_hub(name: str) -> None:
    started = time.monotonic()
    message = error_of(name, field="data.eval_path")
    assert name in message and "data.eval_path" in message and time.monotonic() - started < 1


def test_a_folder_is_not_a_file(tmp_path: Path) -> None:
    assert "is a folder" in error_of(tmp_path)


def test_an_empty_path_names_the_setting() -> None:
    assert error_of("  ").startswith("data.path is empty")


def test_the_limit_keeps_the_first_rows_and_the_fingerprint_of_the_whole(tmp_path: Path) -> None:
    path = written(tmp_path, "d.jsonl")
    some, whole = read_records(path, 2), read_records(path)
    assert some.rows == whole.rows[:2] and some.fingerprint == whole.fingerprint


def test_the_fingerprint_follows_the_content_and_not_the_name(tmp_path: Path) -> None:
    one, same, other = (
        written(tmp_path, name, ROWS[:n]) for name, n in (("a.jsonl", 3), ("b.jsonl", 3), ("c.jsonl", 2))
    )
    prints = [read_records(path).fingerprint for path in (one, same, other)]
    assert prints[0] == prints[1] != prints[2]


@pytest.fixture
def silent_server() -> Iterator[str]:
    """The address of a server that takes connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.timed
def test_a_hub_that_refuses_is_one_line_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
    started = time.monotonic()
    message = error_of("owner/name")
    assert "no file owner/name" in message and "hub cannot be reached" in message
    assert time.monotonic() - started < 5


@pytest.mark.timed
def test_a_hub_that_never_answers_is_one_line_within_seconds(
    monkeypatch: pytest.MonkeyPatch, silent_server: str
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", silent_server)
    started = time.monotonic()
    assert "hub cannot be reached" in error_of("owner/name:config:test")
    assert time.monotonic() - started < readers.HUB_TIMEOUT + 4


def test_a_hub_data_set_is_read_by_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "check_dataset_exists", lambda name: None)  # the repository is a local folder
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "repository"
    folder.mkdir()
    for split in ("train", "test"):
        written(folder, f"{split}.jsonl", [{"text": f"{split} {i}"} for i in range(3)])
    assert read_hub_dataset(str(folder), None, "test", 2).rows == [(1, {"text": "test 0"}), (2, {"text": "test 1"})]
    with pytest.raises(DataError, match="has no split 'nosuchsplit'; it has: train, test"):
        read_hub_dataset(str(folder), None, "nosuchsplit", None)
    with pytest.raises(DataError, match="cannot be loaded"):
        read_hub_dataset(str(folder), None, "test[:many]", None)


def test_a_hub_id_may_name_configuration_and_split() -> None:
    match = readers.DATASET_ID.fullmatch("allenai/ai2_arc:ARC-Easy:test")
    assert match and match.group("id", "config", "split") == ("allenai/ai2_arc", "ARC-Easy", "test")
    match = readers.DATASET_ID.fullmatch("owner/name::validation[:10%]")
    assert match and match.group("id", "config", "split") == ("owner/name", "", "validation[:10%]")
