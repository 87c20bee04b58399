"""Data files made to exhaust the machine: each is refused in one line before it takes time or memory."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hostile import refusal

from mole.data import parquet, read_examples

BIG = 5_000_000


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


WIDE = 60_000


def many_columns(kind: str, folder: Path) -> Path:
    """A file with `WIDE` columns; in JSON each row brings another one."""
    file = folder / f"wide.{kind}"
    names = [f"column {number}" for number in range(WIDE if kind != "parquet" else 6_000)]
    if kind == "csv":
        file.write_text(",".join(names) + "\n" + ",".join("a" * WIDE) + "\n")
    elif kind == "parquet":
        pq.write_table(pa.table({name: ["a"] for name in names}), file)
    else:
        rows = [json.dumps({"text": "a", name: 1}) for name in names]
        file.write_text("[" + ",".join(rows) + "]" if kind == "json" else "\n".join(rows))
    return file


@pytest.mark.parametrize("kind", ["csv", "json", "jsonl", "parquet"])
def test_more_columns_than_anyone_trains_on_are_refused_at_once(folder: Path, kind: str) -> None:
    file = many_columns(kind, folder)
    begun = time.process_time()
    error = refusal(lambda: read_examples(str(file)))
    assert time.process_time() - begun < 10, "the work grows with the number of columns, not with its square"
    assert error.field == "data.path"
    for part in (file.name, "columns; the maximum is 4096", "Keep only"):
        assert part in str(error)


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_a_name_of_megabytes_is_refused_in_a_short_line(folder: Path, kind: str) -> None:
    file, name = folder / f"long-name.{kind}", "x" * BIG
    if kind == "parquet":
        pq.write_table(pa.table({"text": ["a"], name: ["a"]}), file)
    else:
        file.write_text(f"text,{name}\na,b\n" if kind == "csv" else json.dumps({"text": "a", name: "b"}))
    error = refusal(lambda: read_examples(str(file)))
    assert "column 2 has 5000000 characters; the maximum is 1024" in str(error)


def column(value: str, count: int) -> pa.Array:
    """A column of one text in `count` rows, which Parquet stores once."""
    return pa.DictionaryArray.from_arrays(pa.array(bytes(count), pa.int8()), [value])


BOMBS: dict[str, Any] = {
    "a text that is repeated": lambda: {"text": column("x" * 10_000, 100_000)},
    "messages that are repeated": lambda: {"messages": [[{"role": "user", "content": "x" * 10_000}] * 100_000]},
    "a page that is compressed": lambda: {"text": ["x" * (300 << 20)]},
    "texts that begin alike": lambda: {"text": ["x" * 20_000 + str(number) for number in range(20_000)]},
    "nulls": lambda: {str(number): pa.nulls(500_000, pa.string()) for number in range(30)},
    "empty lists in one row": lambda: {"text": ["a"], "lists": pa.array([[[]] * 10_000_000])},
}
"""Columns that Parquet stores in a few kilobytes and that decode to hundreds of megabytes."""


def write_bomb(folder: Path, name: str) -> Path:
    file = folder / f"{name}.parquet"
    alike = name == "texts that begin alike"
    options: dict[str, Any] = (
        {"use_dictionary": False, "column_encoding": {"text": "DELTA_BYTE_ARRAY"}} if alike else {}
    )
    pq.write_table(pa.table(BOMBS[name]()), file, compression="zstd", **options)
    assert file.stat().st_size < 100_000
    return file


@pytest.mark.parametrize("name", [*BOMBS])
def test_a_small_parquet_file_that_decodes_to_hundreds_of_megabytes_is_refused(folder: Path, name: str) -> None:
    """It is refused before it is decoded, so that it takes no memory."""
    file = write_bomb(folder, name)
    error = refusal(lambda: read_examples(str(file)))
    assert error.field == "data.path"
    for part in (file.name, "decodes to", "the maximum for a file of its size is 256 MB", "Split it"):
        assert part in str(error)
    assert memory_to_refuse(file) < 150


def memory_to_refuse(file: Path) -> int:
    """The memory (MiB) that a process needs to refuse a file, beyond what it needs for a small one."""
    code = (
        "import resource, sys; from mole.core.errors import DataError; from mole.data import read_examples\n"
        "for path in sys.argv[1:]:\n"
        "    try: read_examples(path)\n"
        "    except DataError: pass\n"
        "    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)"
    )
    small = file.with_name("small.parquet")
    pq.write_table(pa.table({"text": ["a"]}), small)
    command = [sys.executable, "-c", code, str(small), str(file)]
    before, after = map(int, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
    return after - before


def test_a_parquet_file_of_empty_pages_is_refused_in_time(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = folder / "pages.parquet"
    pq.write_table(pa.table({"text": [str(number) for number in range(3000)]}), file, data_page_size=1,
                   write_batch_size=1, use_dictionary=False)  # fmt: skip
    assert len(read_examples(str(file)).examples) == 3000
    monkeypatch.setattr(parquet, "MOST_PAGES", 1000)
    assert "more than 1000 pages" in str(refusal(lambda: read_examples(str(file))))


def test_a_parquet_file_of_more_description_than_rows_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = folder / "groups.parquet"
    pq.write_table(pa.table({"text": ["a"] * 300}), file, row_group_size=1)
    assert len(read_examples(str(file)).examples) == 300
    monkeypatch.setattr(parquet, "FOOTER_BYTES", 10_000)
    assert "has a footer of" in str(refusal(lambda: read_examples(str(file))))


def test_a_glance_at_a_parquet_file_or_json_array_reads_its_first_rows_only(folder: Path) -> None:
    rows = [{"text": f"{number} " + "word " * 200} for number in range(100_000)]
    pq.write_table(pa.Table.from_pylist(rows), folder / "large.parquet")
    (folder / "large.json").write_text(json.dumps(rows))
    (folder / "large16.jsonl").write_bytes("\n".join(map(json.dumps, rows)).encode("utf-16"))
    for name in ("large.parquet", "large.json", "large16.jsonl"):
        begun = time.process_time()
        seen = read_examples(str(folder / name), limit=20, peek=True)
        assert time.process_time() - begun < 0.2
        assert [example.text for example in seen.examples] == [row["text"] for row in rows[:20]]
        assert not seen.complete


@pytest.mark.parametrize("peek", [True, False])
@pytest.mark.parametrize(
    ("name", "start", "message"),
    [("endless.jsonl", '{"text": "', "line 1: more than 16 MB"), ("endless.csv", 'text\n"', "malformed CSV")],
)
def test_a_row_without_end_is_refused(folder: Path, name: str, start: str, message: str, peek: bool) -> None:
    file = folder / name
    file.write_text(start + "a line of text, without end\n".replace("\n", " " if "json" in name else "\n") * 700_000)
    error = refusal(lambda: read_examples(str(file), limit=3, peek=peek))
    assert message in str(error)
    assert error.field == "data.path"
