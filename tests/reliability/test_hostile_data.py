"""Bad data files: of any shape, in any format, a row is used or rejected with its reason, a file read or refused."""

from __future__ import annotations

import csv
import datetime
import decimal
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hostile import (
    LONG,
    LONG_TEXTS,
    answer,
    attack,
    check_line,
    damaged,
    for_the_page,
    json_tree,
    mole,
    mutated,
    refusal,
    text,
)  # fmt: skip
from hypothesis import given
from hypothesis import strategies as st

from mole.config import RunConfig
from mole.core.errors import DataError, InputError
from mole.data import (
    FIELDS,
    SHAPES,
    EncodedExample,
    ExampleSet,
    describe_columns,
    detect_columns,
    encode_examples,
    guess_mapping,
    read_columns,
    read_examples,
)
from mole.preflight.preview import preview

ASKED = "Is it so?\nAnswer format: yes/no/perhaps"
ROWS: dict[str, list[dict[str, Any]]] = {
    "messages": [
        {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"},
                      {"role": "assistant", "content": "Hello"}]},
        {"messages": [{"role": "user", "content": "1 + 1"}, {"role": "assistant", "content": "2"}], "id": 7},
    ],
    "prompt/completion": [{"prompt": "say yes", "completion": "yes"}, {"prompt": "say é", "completion": "é"}],
    "instruction/input/output": [
        {"instruction": "Sort.", "input": "b a", "output": "a b"},
        {"instruction": "Sing.", "input": "", "output": "La"},
    ],
    "text": [{"text": "Once upon a time."}, {"text": "The end."}],
    "multiple choice": [
        {"question": "2 + 2?", "choices": ["3", "4"], "answer": "B"},
        {"question": "Sky?", "choices": {"text": ["blue", "red"], "label": ["1", "2"]}, "answerKey": "1"},
    ],
    "answer format": [
        {"instruction": ASKED, "output": "the answer is yes", "answer": "yes"},
        {"instruction": ASKED, "output": "the answer is no", "answer": "no"},
    ],
}  # fmt: skip
SPELLED = {
    "@400 digits": "1" + "0" * 400,
    "@minus 400 digits": "-1" + "0" * 400,
    "@5000 digits": "1" + "0" * 5000,
    "@deep": "[" * 90 + "]" * 90,
    "@deeper": '{"a":' * 50_000 + "1" + "}" * 50_000,
    "@bomb": "[" + ",".join(["[1]"] * 1000) + "]",
}
"""What JSON can say and `json.dumps` cannot, by its name."""


def as_json(value: Any) -> str:
    """A drawn tree as JSON, its names replaced by what they stand for."""
    written = json.dumps(value)
    for name, spelled in SPELLED.items():
        written = written.replace(json.dumps(name), spelled)
    return written


def as_csv(rows: list[Any]) -> str:
    """Rows as CSV, whatever they are: what is no row is a line of one value."""
    names = list(dict.fromkeys(name for row in rows if isinstance(row, dict) for name in row))
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow(names)
    for row in rows:
        cells = [row.get(name) for name in names] if isinstance(row, dict) else [row]
        writer.writerow([json.dumps(cell) if isinstance(cell, (list, dict)) else cell for cell in cells])
    return out.getvalue()


def check(path: Path, **options: Any) -> Any:
    """Read a file in every way it is read; what is used can be trained on, what is rejected has its reason."""
    rows = answer(lambda: read_examples(str(path), **options))
    some = answer(lambda: read_examples(str(path), limit=3, peek=True, **options))
    found = answer(lambda: read_columns(str(path)))
    if isinstance(rows, ExampleSet):
        assert rows.examples
        for item in rows.rejected:
            check_line(str(item))
        for example in rows.examples:
            example.target.encode()
            assert example.target.strip()
            assert all(message["content"].strip() for message in example.messages)
            assert example.answer is None or example.answer in (example.choices or ())
        for_the_page([str(item) for item in rows.rejected])
    else:
        assert rows.field == "data.path" or str(rows.field).startswith("data.columns")
    if isinstance(some, ExampleSet) and isinstance(rows, ExampleSet):
        same = [example for example in rows.examples if example.row <= (some.examples[-1].row)]
        assert some.examples == same or some.shape != rows.shape
    if isinstance(found, tuple):
        for shape in (None, *SHAPES):
            found_layout = answer(
                lambda shape=shape: detect_columns(found, guess_mapping(found, shape), str(path), shape)
            )
            if not isinstance(found_layout, InputError):
                for_the_page(describe_columns(found_layout))
    return rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


drawn_rows = st.sampled_from([*ROWS]).flatmap(lambda shape: mutated(ROWS[shape], most=2))


# Rows


@attack(250)
@given(drawn_rows, st.booleans())
def test_damaged_rows_of_json_are_used_or_rejected(folder: Path, rows: Any, lines: bool) -> None:
    file = folder / ("rows.jsonl" if lines else "rows.json")
    file.write_text("\n".join(map(as_json, rows)) if lines else as_json(rows), encoding="utf-8")
    check(file)


@attack(60)
@given(st.lists(json_tree, max_size=5), st.booleans())
def test_any_json_is_used_or_refused(folder: Path, rows: Any, lines: bool) -> None:
    file = folder / "any.json"
    file.write_text("\n".join(map(as_json, rows)) if lines else as_json(rows), encoding="utf-8")
    check(file)


@attack(120)
@given(drawn_rows, st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "latin-1", "utf-32", "cp500"]))
def test_damaged_rows_of_csv_in_any_encoding_are_used_or_rejected(folder: Path, rows: Any, encoding: str) -> None:
    file = folder / "rows.csv"
    written = as_csv(rows)
    for name in LONG_TEXTS:
        written = written.replace(name, LONG[name]())
    file.write_bytes(written.encode(encoding, errors="surrogatepass" if encoding.startswith("utf") else "replace"))
    check(file)


@attack(80)
@given(drawn_rows, st.dictionaries(st.one_of(st.sampled_from(FIELDS), text), text, max_size=3), st.booleans())
def test_any_mapping_of_columns_is_followed_or_refused(
    folder: Path, rows: Any, mapping: dict[str, str], known: bool
) -> None:
    file = folder / "mapped.json"
    file.write_text(as_json(rows), encoding="utf-8")
    if known and rows and isinstance(rows[0], dict):
        mapping = {name: next(iter(rows[0]), "") for name in mapping}
    if isinstance(answer(lambda: RunConfig.from_dict({"data": {"columns": mapping}})), RunConfig):
        check(file, columns=mapping)


# Bytes


def whole(shape: str, kind: str) -> bytes:
    """A good file of so many bytes."""
    rows = ROWS[shape]
    if kind == "parquet":
        sink = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows[:1] * 20), sink)
        return sink.getvalue()
    if kind == "csv":
        return as_csv(rows).encode()
    return (as_json(rows) if kind == "json" else "".join(f"{as_json(row)}\n" for row in rows)).encode()


@pytest.mark.parametrize("kind", ["json", "jsonl", "csv", "parquet"])
@attack(90)
@given(data=st.data())
def test_a_file_with_damaged_bytes_is_read_or_refused(folder: Path, kind: str, data: st.DataObject) -> None:
    content = data.draw(damaged(whole(data.draw(st.sampled_from([*ROWS])), kind)))
    file = folder / f"damaged.{kind}"
    file.write_bytes(content)
    check(file)


@attack(40)
@given(st.binary(max_size=200), st.sampled_from(["json", "jsonl", "csv", "tsv", "parquet", "txt", "", "JSON"]))
def test_any_bytes_are_read_or_refused(folder: Path, content: bytes, suffix: str) -> None:
    file = folder / f"any.{suffix}"
    file.write_bytes(content)
    check(file)


# Parquet columns

NOW = datetime.datetime(2024, 1, 1)
ODD_COLUMNS: dict[str, Any] = {
    "null": lambda: pa.nulls(2),
    "bool": lambda: pa.array([True, None]),
    "uint64": lambda: pa.array([2**64 - 1, 0], pa.uint64()),
    "half": lambda: pa.array([1.5, float("nan")], pa.float16()),
    "nan": lambda: pa.array([float("nan"), float("-inf")]),
    "decimal": lambda: pa.array([decimal.Decimal("1e30"), None], pa.decimal256(60, 2)),
    "date": lambda: pa.array([2**31 - 1, -(2**31)], pa.int32()).cast(pa.date32()),
    "date in ms": lambda: pa.array([86_400_000 * 10**8, 0], pa.int64()).cast(pa.date64()),
    "time": lambda: pa.array([1, 86_399_999_999_999], pa.int64()).cast(pa.time64("ns")),
    "a far time": lambda: pa.array([2**62, -(2**62)], pa.int64()).cast(pa.timestamp("us")),
    "a far second": lambda: pa.array([2**33, 2**40], pa.int64()).cast(pa.timestamp("s")),
    "nanoseconds": lambda: pa.array([1, 2**62], pa.int64()).cast(pa.timestamp("ns")),
    "a zone that is none": lambda: pa.array([NOW, NOW], pa.timestamp("us", tz="Nowhere/At_All")),
    "an odd zone": lambda: pa.array([NOW, NOW], pa.timestamp("ms", tz="+99:99")),
    "duration": lambda: pa.array([2**62, 1], pa.int64()).cast(pa.duration("s")),
    "bytes": lambda: pa.array([b"\xff\x00", b"text"]),
    "no text": lambda: pa.Array.from_buffers(
        pa.string(), 2, [None, pa.py_buffer(b"\0\0\0\0\2\0\0\0\4\0\0\0"), pa.py_buffer(b"\xff\xfea\0")]
    ),
    "large text": lambda: pa.array(["a", "b"], pa.large_string()),
    "a text view": lambda: pa.array(["a", "b"], pa.string_view()),
    "dictionary": lambda: pa.array(["a", "b"]).dictionary_encode(),
    "map": lambda: pa.array([[("a", 1)], None], pa.map_(pa.string(), pa.int64())),
    "struct": lambda: pa.array([{"text": ["a", None], "label": [1, 2]}, None]),
    "messages": lambda: pa.array([[{"role": "user", "content": None}], []]),
    "fixed lists": lambda: pa.array([["a", "b"], None], pa.list_(pa.string(), 2)),
    "deep": lambda: pa.array([[[[[["a"]]]]], None]),
    "uuid": lambda: pa.array([b"0" * 16, None], pa.binary(16)).cast(pa.uuid()),
    "text": lambda: pa.array(["a", None]),
    "a digit": lambda: pa.array(["0", "1"]),
}  # fmt: skip


@attack(120)
@given(
    st.dictionaries(
        st.one_of(st.sampled_from(FIELDS), st.text(max_size=5)), st.sampled_from([*ODD_COLUMNS]), min_size=1,
        max_size=4,
    )
)  # fmt: skip
def test_parquet_columns_of_any_type_are_used_or_rejected(folder: Path, made: dict[str, str]) -> None:
    file = folder / "odd.parquet"
    pq.write_table(pa.table({name: ODD_COLUMNS[kind]() for name, kind in made.items()}), file)
    check(file)


def test_parquet_columns_of_one_name_are_refused_or_read(folder: Path) -> None:
    file = folder / "twice.parquet"
    pq.write_table(pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"]), file)
    check(file)


# Sizes, places, and files that are none

BIG = 5_000_000


@pytest.mark.parametrize(
    "what",
    ["text", "one word", "spaces", "answer format", "NULs", "choices", "labels", "messages", "a line without end", "é",
     "digits", "columns", "quotes"],
)  # fmt: skip
def test_huge_fields_are_used_or_rejected_in_time(folder: Path, what: str, capsys: pytest.CaptureFixture[str]) -> None:
    asked = "Answer format: a" + " " * BIG + "b"
    rows: dict[str, Any] = {
        "text": {"text": "ten bytes " * (BIG // 5)},
        "one word": {"prompt": "a", "completion": "x" * 2 * BIG},
        "spaces": {"text": " " * BIG},
        "answer format": {"instruction": asked, "output": "a", "answer": "a"},
        "NULs": {"text": "\x00" * BIG},
        "choices": {"question": "?", "choices": ["a"] * (BIG // 4), "answer": "a"},
        "labels": {"instruction": "Answer format: " + "a/" * BIG, "output": "a" * 1000, "answer": "a"},
        "messages": {"messages": [{"role": "user", "content": "a"}] * (BIG // 40)},
        "a line without end": {"text": "a\u2028" * (BIG // 6)},
        "é": {"text": "é" * (BIG // 2)},
        "digits": {"question": "?", "choices": ["a", "b"], "answer": "1" * BIG},
        "columns": {f"column {number}": number for number in range(BIG // 90)},
        "quotes": {"text": '"' * (BIG // 2)},
    }
    file = folder / "huge.jsonl"
    file.write_text(json.dumps(rows[what]) + '\n{"text": "a", "prompt": "b", "completion": "c"}\n', encoding="utf-8")
    check(file)
    mole(capsys, "data", "check", str(file))


def test_what_is_no_plain_file_is_no_data(folder: Path, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo(folder / "pipe.jsonl")
    (folder / "zero.json").symlink_to("/dev/zero")
    (folder / "null.csv").symlink_to("/dev/null")
    (folder / "circle.json").symlink_to("circle.json")
    (folder / "empty.parquet").touch()
    (folder / "empty.jsonl").touch()
    (folder / "folder.json").mkdir()
    names = ["pipe.jsonl", "zero.json", "null.csv", "circle.json", "empty.parquet", "empty.jsonl", "folder.json"]
    paths = [str(folder / name) for name in names]
    paths += [
        "/dev/zero",
        "/dev/stdin",
        "/proc/self/mem",
        "/",
        "",
        " ",
        ".",
        "..",
        "a\x00b.json",
        "~nobody-here/x.json",
    ]
    for path in [*paths, f"{'x' * 5000}.json", "/" * 5000, "\ud800.json", "\n.json", f"{folder}/empty.jsonl/x.json"]:
        refusal(lambda path=path: read_examples(path))
        assert mole(capsys, "data", "check", path) == 2


@pytest.fixture(scope="module", params=["million.jsonl", "million.csv"])
def million(request: pytest.FixtureRequest, folder: Path) -> Path:
    """A file of a million rows."""
    head = "prompt,completion\n" if request.param.endswith("csv") else ""
    row = "say {0},{0}\n" if head else '{{"prompt": "say {0}", "completion": "{0}"}}\n'
    with (folder / request.param).open("w") as file:
        file.write(head)
        file.writelines(row.format(number) for number in range(1_000_000))
    return folder / request.param


def test_a_glance_at_a_million_rows_takes_next_to_no_memory(million: Path) -> None:
    before, _ = read_in_a_process(million, "peek=True, limit=1")
    after, rows = read_in_a_process(million, "peek=True, limit=2000")
    assert rows == 2000
    assert after - before < 20


def test_a_hundred_thousand_rows_take_a_kilobyte_each_at_most(folder: Path) -> None:
    file = folder / "rows.jsonl"
    rows = (json.dumps({"prompt": f"say {number}", "completion": f"{number}"}) for number in range(100_000))
    file.write_text("\n".join(rows))
    before, _ = read_in_a_process(file, "peek=True, limit=1")
    after, rows_read = read_in_a_process(file, "")
    assert rows_read == 100_000
    assert after - before < 100


@pytest.mark.soak
def test_a_million_rows_take_a_kilobyte_each_at_most(million: Path) -> None:
    after, rows = read_in_a_process(million, "")
    assert rows == 1_000_000
    assert after < 1000


def read_in_a_process(file: Path, options: str) -> tuple[int, int]:
    """The most memory (MiB) a process needs to read a file, and how many examples it has then."""
    code = (
        "import resource, sys; from mole.data.examples import read_examples\n"
        f"rows = read_examples(sys.argv[1], {options})\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024, len(rows.examples))"
    )
    out = subprocess.run([sys.executable, "-c", code, str(file)], capture_output=True, text=True, check=True).stdout
    memory, rows = map(int, out.split())
    return memory, rows


# As the model sees it, and on the command line


@attack(60)
@given(drawn_rows, st.integers(8, 600))
def test_damaged_rows_become_tokens_and_a_preview_or_are_rejected(
    folder: Path, tiny_folder: Path, tiny_tokenizer: Any, rows: Any, longest: int
) -> None:
    file = folder / "seen.json"
    file.write_text(as_json(rows), encoding="utf-8")
    data = {"path": str(file), "max_length": longest}
    config = RunConfig.from_dict({"model": {"name": str(tiny_folder)}, "data": data})
    seen = answer(lambda: preview(config))
    if not isinstance(seen, InputError):
        for_the_page(json.loads(json.dumps(seen.to_dict())))
        assert seen.used >= 1
        for item in encode_examples(read_examples(str(file)).examples, tiny_tokenizer, longest):
            assert isinstance(item, DataError) or (
                isinstance(item, EncodedExample) and 2 <= len(item.input_ids) <= longest
            )


@attack(60)
@given(drawn_rows, st.booleans())
def test_mole_data_check_answers_with_one_line_or_the_reasons(
    folder: Path, capsys: pytest.CaptureFixture[str], rows: Any, as_numbers: bool
) -> None:
    file = folder / "checked.jsonl"
    file.write_text("\n".join(map(as_json, rows)), encoding="utf-8")
    mole(capsys, "data", "check", str(file), *(["--json"] if as_numbers else []))
