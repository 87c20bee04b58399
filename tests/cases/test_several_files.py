"""Several files as one training set: which rows an epoch has, which are held out, and what is refused by name."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pytest

from mole import runs
from mole.config import DataConfig, RunConfig
from mole.core.errors import InputError
from mole.data import Datasets, build_datasets, read_hub_dataset, read_source, readers
from mole.preflight.plan import row_lengths
from mole.preflight.preview import preview

Entries = list[Any]


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with talks.jsonl (messages), tasks.jsonl (Alpaca), terms.csv (columns of its own) and texts.json."""
    monkeypatch.chdir(tmp_path)
    ask, reply = {"role": "user"}, {"role": "assistant"}
    talks = [{"messages": [{**ask, "content": f"q{n}?"}, {**reply, "content": f"q{n}!"}]} for n in range(20)]
    tasks = [{"instruction": f"do t{n}", "input": "it", "output": f"t{n}!", "note": n} for n in range(10)]
    for name, rows in (("talks", talks), ("tasks", [*tasks, {"instruction": "none", "output": None}])):
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("terms.csv").write_text("term,meaning\n" + "".join(f"c{n}?,c{n}!\n" for n in range(7)))
    Path("texts.json").write_text(json.dumps([{"text": f"x{n}!"} for n in range(4)]))
    return tmp_path


TERMS = {"path": "terms.csv", "columns": {"prompt": "term", "completion": "meaning"}}


def built(tokenizer: Any, path: Any, seed: int = 0, **settings: Any) -> Datasets:
    return build_datasets(DataConfig(path=path, **{"eval_fraction": 0.0, **settings}), tokenizer, seed)


def answers(rows: list[dict[str, list[int]]], tokenizer: Any) -> list[str]:
    """What is learnt in each row, without the ends of turns."""
    texts = [tokenizer.decode([label for label in row["labels"] if label >= 0]) for row in rows]
    return [re.sub(r"!.*", "", text, flags=re.DOTALL) for text in texts]


def test_two_shapes_are_one_training_set(files: Path, tiny_tokenizer: Any) -> None:
    made = built(tiny_tokenizer, ["talks.jsonl", "tasks.jsonl", TERMS, "texts.json"])
    names = [f"{kind}{n}" for kind, count in (("q", 20), ("t", 10), ("c", 7), ("x", 4)) for n in range(count)]
    assert answers(made.train, tiny_tokenizer) == names
    alone = [row for name in ("talks.jsonl", "tasks.jsonl") for row in built(tiny_tokenizer, name).train]
    assert made.train[:30] == alone
    assert made.report.shape == "messages + instruction/input/output + prompt/completion + text"
    assert made.report.rejections == ["tasks.jsonl row 11: output is null"]
    assert [(part["source"], part["rows"], part["rejected"]) for part in made.report.sources] == [
        ("talks.jsonl", 20, 0), ("tasks.jsonl", 10, 1), ("terms.csv", 7, 0), ("texts.json", 4, 0),
    ]  # fmt: skip
    assert made.report.notices == ["tasks.jsonl: Columns that are not used: note."]
    assert [part["ignored_columns"] for part in made.report.sources] == [[], ["note"], [], []]


@pytest.mark.parametrize(
    ("weight", "counts"),
    [(1, {1: 20}), (2, {2: 20}), (0.5, {1: 10}), (2.25, {2: 15, 3: 5}), (0.001, {1: 1})],
)
def test_a_weight_is_how_often_the_rows_of_a_file_are_seen_per_epoch(
    files: Path, tiny_tokenizer: Any, weight: float, counts: dict[int, int]
) -> None:
    path = ["texts.json", {"path": "talks.jsonl", "weight": weight}]
    made = built(tiny_tokenizer, path)
    seen = Counter(answers(made.train, tiny_tokenizer))
    assert Counter(count for name, count in seen.items() if name.startswith("q")) == counts
    assert [seen[f"x{n}"] for n in range(4)] == [1] * 4
    assert built(tiny_tokenizer, path).train == made.train  # the same rows are drawn, by the seed
    drawn = {name for name, count in seen.items() if name.startswith("q") and count == max(counts)}
    others = Counter(answers(built(tiny_tokenizer, path, seed=1).train, tiny_tokenizer))
    assert (drawn == {name for name in drawn if others[name] == max(counts)}) == (len(counts) == 1 and weight >= 1)


def test_no_row_that_is_seen_several_times_is_held_out(files: Path, tiny_tokenizer: Any) -> None:
    path = [{"path": "talks.jsonl", "weight": 3}, {"path": "tasks.jsonl", "weight": 2}]
    made = built(tiny_tokenizer, path, eval_fraction=0.2)
    trained, held = Counter(answers(made.train, tiny_tokenizer)), Counter(answers(made.eval, tiny_tokenizer))
    assert set(held.values()) == {1} and sum(held.values()) == 6 and not trained.keys() & held.keys()
    assert {**trained} == {
        **{f"q{n}": 3 for n in range(20) if f"q{n}" not in held},
        **{f"t{n}": 2 for n in range(10) if f"t{n}" not in held},
    }
    assert sum(part["eval_rows"] for part in made.report.sources) == 6


def test_one_path_gives_the_rows_that_it_gave_as_a_list_of_one(files: Path, tiny_tokenizer: Any) -> None:
    one, same = (built(tiny_tokenizer, path, eval_fraction=0.3) for path in ("talks.jsonl", ["talks.jsonl"]))
    assert (one.train, one.eval, one.report) == (same.train, same.eval, same.report)
    assert one.report.sources == []


def test_the_preview_and_the_estimate_are_of_the_same_rows(files: Path, tiny_folder: Path, tiny_tokenizer: Any) -> None:
    path = [{"path": "talks.jsonl", "weight": 0.5}, {"path": "tasks.jsonl", "weight": 2}]
    data = {"path": path, "eval_fraction": 0.1}
    config = RunConfig.from_dict({"model": {"name": str(tiny_folder)}, "data": data})
    shown, made = preview(config, rows=4), build_datasets(config.data, tiny_tokenizer, 0)
    assert (shown.used, shown.held_out, shown.read) == (made.report.rows, made.report.eval_rows, 31)
    assert (shown.tokens, shown.learnt_tokens, shown.shape) == (
        made.report.tokens, made.report.answer_tokens, made.report.shape,
    )  # fmt: skip
    assert [(row.source, row.number) for row in shown.rows] == [
        ("talks.jsonl", 1), ("tasks.jsonl", 1), ("talks.jsonl", 2), ("tasks.jsonl", 2),
    ]  # fmt: skip
    assert [str(row) for row in shown.rejections] == ["tasks.jsonl row 11: output is null"]
    assert [(part.name, part.weight, part.used + part.held_out, part.rejected) for part in shown.sources] == [
        ("talks.jsonl", 0.5, 20, 0), ("tasks.jsonl", 2, 10, 1),
    ]  # fmt: skip
    assert abs(row_lengths(config.data, tiny_tokenizer).rows - made.report.rows) <= 1


def test_a_run_keeps_its_list_and_one_path_as_plain_text(files: Path, home: Path) -> None:
    def kept(path: Any) -> Any:
        run = runs.create(RunConfig.from_dict({"data": {"path": path}}))
        config = RunConfig.load(run.config_path)
        assert RunConfig.from_dict(config.to_dict()) == config
        return config.data.path

    assert kept("talks.jsonl") == kept(["talks.jsonl"]) == str(files / "talks.jsonl")
    assert kept("[talks.jsonl, {path: owner/name, split: test, weight: 0.5}]") == [
        str(files / "talks.jsonl"), {"path": "owner/name", "weight": 0.5, "split": "test"},
    ]  # fmt: skip


REFUSED: dict[str, tuple[Any, str]] = {
    "no entries": ([], "data.path is []; it must be a path, a hub id, or a list"),
    "a weight of nothing": ([{"path": "a", "weight": 0}], "data.path.1.weight is 0.0; it must be a number greater"),
    "a weight below nothing": (["a", {"path": "b", "weight": -1}], "data.path.2.weight is -1.0"),
    "a weight without end": ([{"path": "a", "weight": float("inf")}], "data.path.1.weight is inf"),
    "a weight that is no number": ([{"path": "a", "weight": "much"}], "data.path.1.weight is 'much'"),
    "a weight of everything": ([{"path": "a", "weight": 1e6}], "at most 1000"),
    "an unknown name": ([{"path": "a", "wieght": 2}], "data.path.1.wieght is not a setting; known: columns, name"),
    "no path": (["a", {"weight": 2}], "data.path.2.path is ''"),
    "a number": (["a", 7], "data.path.2 is 7"),
    "brackets that do not close": ("[a.jsonl, {path: b.jsonl, weight: 2]", "Mind the commas and brackets."),
    "too many": ([f"{n}" for n in range(65)], "at most 64"),
}


@pytest.mark.parametrize(("path", "words"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_list_of_files_is_refused_by_name(path: Any, words: str) -> None:
    with pytest.raises(InputError) as caught:
        DataConfig(path=path)
    assert words in str(caught.value)
    assert str(caught.value.field).startswith("data.path")


@pytest.mark.parametrize(
    ("path", "words"),
    [
        (["talks.jsonl", "nowhere.csv"], "There is no file nowhere.csv"),
        (["talks.jsonl", "terms.csv"], "terms.csv: its columns (term, meaning) fit no known shape"),
        (["talks.jsonl", {**TERMS, "columns": {"prompt": "word"}}], "data.columns.prompt is 'word', but terms.csv has"),
        (["talks.jsonl", {"path": "./talks.jsonl", "weight": 2}], "talks.jsonl and ./talks.jsonl are given twice"),
        (["talks.jsonl", {"path": "tasks.jsonl", "split": "test"}], "tasks.jsonl is a file, which has no split 'test'"),
    ],
)
def test_a_file_that_cannot_be_used_is_named(files: Path, tiny_tokenizer: Any, path: Entries, words: str) -> None:
    with pytest.raises(InputError, match=re.escape(words)):
        built(tiny_tokenizer, path)


def test_columns_of_the_run_are_those_of_files_without_their_own(files: Path) -> None:
    data = DataConfig(
        path=["a", {"path": "b", "columns": {}}, {"path": "c", "columns": {"text": "t"}}], columns={"q": "p"}
    )
    assert [source.columns for source in data.sources] == [{"q": "p"}, {}, {"text": "t"}]
    Path("[a].csv").write_text("text\nx\n")
    Path("a,b.csv").write_text("text\nx\n")
    for name in ("[a].csv", "a,b.csv"):  # names of files, not lists
        assert [row.text for row in read_source(DataConfig(path=name).sources[0]).examples] == ["x"]


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A data set with two configurations of two splits each, in a folder: there is no hub here."""
    monkeypatch.setattr(readers, "check_dataset_exists", lambda name: None)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder, lines = tmp_path / "repository", ["---", "configs:"]
    for config in ("easy", "hard"):
        lines += [f"- config_name: {config}", "  data_files:"]
        for split in ("train", "test"):
            lines += [f"  - split: {split}", f"    path: {config}/{split}.jsonl"]
            (folder / config).mkdir(parents=True, exist_ok=True)
            (folder / config / f"{split}.jsonl").write_text(json.dumps({"text": f"{config} {split}"}) + "\n")
    (folder / "README.md").write_text("\n".join([*lines, "---", ""]))
    return str(folder)


def test_a_hub_set_is_read_by_configuration_and_split(repository: str) -> None:
    for config in ("easy", "hard"):
        for split in ("train", "test"):
            assert read_hub_dataset(repository, config, split, None).rows == [(1, {"text": f"{config} {split}"})]


@pytest.mark.parametrize(
    ("config", "split", "words"),
    [
        (None, "train", "has several configurations; name one, as in .*: easy, hard."),
        ("soft", "train", "has no configuration 'soft'; it has: easy, hard."),
        ("hard", "dev", "has no split 'dev'; it has: train, test."),
        ("hard", "train+dev[:10%]", "has no split 'dev'; it has: train, test."),
    ],
)
def test_a_wrong_name_is_one_line_with_those_there_are(
    repository: str, config: str | None, split: str, words: str
) -> None:
    with pytest.raises(InputError, match=words) as caught:
        read_hub_dataset(repository, config, split, None)
    assert len(str(caught.value).splitlines()) == 1


def test_configuration_and_split_stand_beside_the_id_or_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def read(*arguments: Any) -> readers.Records:
        asked.append(arguments[:3])
        return readers.Records([(1, {"text": "x"})], "", ["text"])

    monkeypatch.setattr(readers, "read_hub_dataset", read)
    for settings in ({"path": "o/n", "name": "c", "split": "s"}, {"path": "o/n:c:s"}, {"path": "o/n:c", "split": "s"}):
        for source in (DataConfig(**settings).sources[0], DataConfig(path=[settings, "o/m"]).sources[0]):
            read_source(source)
    assert set(asked) == {("o/n", "c", "s")}
    with pytest.raises(InputError, match="names a split, and 't' is given beside it"):
        read_source(DataConfig(path="o/n:c:s", split="t").sources[0])
    with pytest.raises(InputError, match="data.split is 't'; it must be empty where data.path is a list"):
        DataConfig(path=["a", "b"], split="t")
