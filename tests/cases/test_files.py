"""Files as people have them: compressed, wrapped, from spreadsheets and from Windows. What is guessed is said."""

from __future__ import annotations

import gzip
import io
import json
import zipfile
from pathlib import Path
from typing import Any

import pytest

from app.settings import keep_upload
from mole.config import DataConfig
from mole.core import limits
from mole.core.errors import DataError
from mole.data import Example, build_datasets, encode_example, encoding, read_records

ROWS = [{"prompt": "a?", "completion": "b"}, {"prompt": "c?", "completion": "d"}]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
CSV = "prompt,completion\na?,b\nc?,d\n"


def zipped(**files: bytes) -> bytes:
    """A zip with these files; `__` in a name stands for a dot."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name.replace("__", "."), content)
    return buffer.getvalue()


def table(value: Any) -> bytes:
    return json.dumps(value).encode()


WINDOWS = "The file is not UTF-8; it is read as Windows-1252 (Western European)."
INDEX = "The first column has no name and counts the rows; it is left out."
HELD = "The rows are those of {}, in the one object of the file."
BY_COLUMN = "The file is read as a table column by column, as pandas writes one."
SEMICOLONS = "The columns are taken to be separated by semicolons."
SPLITS = "The rows of train are read. To hold out those of test, write them to a file of their own."

READ: dict[str, tuple[str, bytes, str]] = {
    "gzip": ("d.jsonl.gz", gzip.compress(LINES), ""),
    "gzip of CSV": ("d.csv.gz", gzip.compress(CSV.encode()), ""),
    "zip": ("d.zip", zipped(rows__jsonl=LINES), ""),
    "all rows under a name, over several lines": (
        "d.json",
        json.dumps({"data": ROWS}, indent=1).encode(),
        HELD.format("data"),
    ),
    "all rows under a name, on one line": ("d.json", table({"version": 1, "data": ROWS}), HELD.format("data")),
    "splits": ("d.json", table({"train": ROWS, "test": ROWS[:1]}), SPLITS),
    "splits, one of them": ("d.json", table({"train": ROWS}), HELD.format("train")),
    "pandas, columns of values by row": (
        "d.json",
        table({name: {str(n): row[name] for n, row in enumerate(ROWS)} for name in ROWS[0]}),
        BY_COLUMN,
    ),
    "pandas, columns of lists": ("d.json", table({name: [row[name] for row in ROWS] for name in ROWS[0]}), BY_COLUMN),
    "pandas, an index column": ("d.csv", b",prompt,completion\n0,a?,b\n1,c?,d\n", INDEX),
    "a line that names the separator": ("d.csv", b"sep=;\r\nprompt;completion\r\na?;b\r\nc?;d\r\n", ""),
    "semicolons": ("d.csv", CSV.replace(",", ";").encode(), SEMICOLONS),
    "UTF-16 without a mark": ("d.jsonl", LINES.decode().encode("utf-16-le"), ""),
    "UTF-16, the other way round": ("d.csv", CSV.encode("utf-16-be"), ""),
}


@pytest.mark.parametrize("peek", [False, True], ids=["whole", "glance"])
@pytest.mark.parametrize("case", READ)
def test_the_rows_are_those_of_a_plain_file_and_a_guess_is_said(tmp_path: Path, case: str, peek: bool) -> None:
    name, content, notice = READ[case]
    (tmp_path / name).write_bytes(content)
    records = read_records(str(tmp_path / name), 20 if peek else None, peek=peek)
    assert [row for _, row in records.rows] == ROWS and records.columns == ["prompt", "completion"]
    assert records.notices == [notice] * bool(notice)


@pytest.mark.parametrize("before", ["", "a" * 100_000], ids=["at the start", "far into the file"])
def test_letters_from_windows_are_read_and_that_is_said(tmp_path: Path, before: str) -> None:
    path = tmp_path / "d.csv"
    path.write_bytes(f"prompt,completion\n{before}Grüße?,Schön – „gut“\n".encode("cp1252"))
    records = read_records(str(path))
    assert records.rows == [(1, {"prompt": f"{before}Grüße?", "completion": "Schön – „gut“"})]
    assert records.notices == [WINDOWS]


def test_a_broken_byte_among_utf_8_is_no_letter_from_windows(tmp_path: Path) -> None:
    path = tmp_path / "d.csv"
    path.write_bytes("prompt,completion\nGrüße?,Schön\n".encode() + b"a\xff,b\n")
    with pytest.raises(DataError, match=r"line 3: not valid UTF-8 text; save the file as UTF-8\.$"):
        read_records(str(path))


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "b"}]},
        {"conversations": [{"from": "human", "value": "a?"}, {"from": "gpt", "value": "b"}]},
        {"prompt": [{"role": "user", "content": "a?"}], "completion": [{"role": "assistant", "content": "b"}]},
        {"question": "a?", "choices": ["b", "c"], "answer": "b"},
        {"prompt": ["a?"], "completion": ["b"]},
        {"tokens": ["a", "b"], "tags": ["c", "d"]},
    ],
)
def test_a_file_of_one_row_is_one_row(tmp_path: Path, row: dict[str, Any]) -> None:
    (tmp_path / "d.jsonl").write_bytes(table(row))
    assert read_records(str(tmp_path / "d.jsonl")).rows == [(1, row)]


STORY = "Chapter 1\n\nOnce upon a time.\nIt was “night”.\n\nThe end."
AS_ONE_TEXT = "The file is read as one text, whose pieces of data.max_length tokens are the examples."


@pytest.mark.parametrize("peek", [False, True], ids=["whole", "glance"])
@pytest.mark.parametrize(
    ("name", "content", "notices"),
    [
        ("d.txt", f"{STORY}\n".encode(), []),
        ("d.TXT", STORY.replace("\n", "\r\n").encode("utf-8-sig"), []),
        ("d.txt", STORY.encode("cp1252"), [WINDOWS]),
        ("d.txt", STORY.encode("utf-16"), []),
        ("d.txt.gz", gzip.compress(STORY.encode()), []),
        ("d.zip", zipped(story__txt=STORY.encode()), []),
    ],
    # A name of its own for each: gzip and zip write the time of day into the bytes.
    ids=["UTF-8", "UTF-8 with a mark", "Windows-1252", "UTF-16", "gzip", "zip"],
)
def test_a_plain_text_is_one_row_and_that_is_said(
    tmp_path: Path, name: str, content: bytes, notices: list[str], peek: bool
) -> None:
    (tmp_path / name).write_bytes(content)
    records = read_records(str(tmp_path / name), 20 if peek else None, peek=peek)
    assert records.rows == [(1, {"text": STORY})] and records.complete
    assert records.notices == [*notices, AS_ONE_TEXT]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "utf-16-le"])
def test_a_glance_at_a_long_text_reads_its_beginning(tmp_path: Path, encoding: str) -> None:
    whole = "Wörter 🎉 " * 200_000
    (tmp_path / "d.txt").write_bytes(whole.encode(encoding))
    records = read_records(str(tmp_path / "d.txt"), 20, peek=True)
    text = records.rows[0][1]["text"]
    assert not records.complete and whole.startswith(text) and 100_000 < len(text) < 1_500_000


def test_the_pieces_of_a_text_are_the_examples(tmp_path: Path, tiny_tokenizer: Any) -> None:
    (tmp_path / "d.txt").write_text(f"{STORY}\n\n" * 30)
    config = DataConfig(path=str(tmp_path / "d.txt"), max_length=64, eval_fraction=0)
    rows = build_datasets(config, tiny_tokenizer, 0).train
    ids = [token for number, row in enumerate(rows) for token in row["input_ids"][number > 0 :]]
    assert len(rows) > 10 and max(len(row["input_ids"]) for row in rows) == 64
    assert tiny_tokenizer.decode(ids) == (f"{STORY}\n\n" * 30).strip() + tiny_tokenizer.eos_token


def test_a_very_long_text_is_tokenised_in_parts_like_any_other(
    monkeypatch: pytest.MonkeyPatch, tiny_tokenizer: Any
) -> None:
    example = Example(text=f"{STORY}\n" * 30 + "<|im_end|>")
    whole = encode_example(example, tiny_tokenizer, 100_000)
    monkeypatch.setattr(encoding, "LONG_TEXT", 100)
    assert encode_example(example, tiny_tokenizer, 100_000) == whole


REFUSED: dict[str, tuple[str, bytes, str]] = {
    "two files": ("d.zip", zipped(a__jsonl=LINES, b__jsonl=LINES), "has 2 files in it; give a zip with one data file."),
    "too many files": ("d.zip", zipped(**{f"f{n}": b"" for n in range(1001)}), "files or more in it"),
    "another suffix": ("d.gz", gzip.compress(LINES), "has a file in it without one of the suffixes .json, .jsonl"),
    "Parquet inside": ("d.zip", zipped(a__parquet=b"PAR1"), "has a file in it without one of the suffixes"),
    "half a file": ("d.jsonl.gz", gzip.compress(LINES * 50)[:-20], "cannot be decompressed: "),
    "no gzip": ("d.jsonl.gz", LINES, "cannot be decompressed: Not a gzipped file"),
    "no zip": ("d.zip", LINES, "cannot be decompressed: File is not a zip file."),
    "a text of nothing": ("d.txt", b" \n\n", "is empty."),
    "nothing": ("d.jsonl.gz", gzip.compress(b" \n"), "is empty."),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_read_says_why_in_one_line(tmp_path: Path, case: str) -> None:
    name, content, words = REFUSED[case]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_records(str(tmp_path / name))
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["gz", "zip"])
def test_a_small_file_that_would_fill_the_memory_is_refused(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "DECODED_BYTES", 1 << 20)
    much = b'{"text": "a"}\n' * 1_000_000
    path = tmp_path / f"d.jsonl.{kind}" if kind == "gz" else tmp_path / "d.zip"
    path.write_bytes(gzip.compress(much) if kind == "gz" else zipped(d__jsonl=much))
    with pytest.raises(DataError, match="in it, too much for its size. Decompress it first"):
        read_records(str(path))
    assert len(read_records(str(path), 5, peek=True).rows) == 5, "a glance reads no more than it needs"


def test_an_upload_keeps_both_suffixes(tmp_path: Path, home: Path) -> None:
    (tmp_path / "my rows.jsonl.gz").write_bytes(gzip.compress(LINES))
    kept = keep_upload(str(tmp_path / "my rows.jsonl.gz"))
    assert kept.name.startswith("my-rows-") and kept.name.endswith(".jsonl.gz")
    assert len(read_records(str(kept)).rows) == 2
