"""A model's tokenizer.json of any content: it works, or is refused in one line, also where its library panics."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hostile import answer, attack, json_tree, mutated, refusal
from hypothesis import given
from hypothesis import strategies as st
from test_hostile_data import as_json

from mole.core.errors import ModelError, MoleError
from mole.models.loading import load_tokenizer
from mole.models.tokenizer_guard import MAX_FILE


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Path:
    """A base model's folder whose tokenizer is replaced."""
    return Path(shutil.copytree(tiny_folder, tmp_path_factory.mktemp("tokenizers") / "base"))


@pytest.fixture(scope="module")
def good(tiny_folder: Path) -> dict[str, Any]:
    """A tokenizer with a part of each kind."""
    values = json.loads((tiny_folder / "tokenizer.json").read_text())
    replace = {"type": "Replace", "pattern": {"Regex": "x+"}, "content": "y"}
    split = {"type": "Split", "pattern": {"Regex": r" ?\w+"}, "behavior": "Isolated", "invert": False}
    values["normalizer"] = {"type": "Sequence", "normalizers": [replace, {"type": "Prepend", "prepend": "a"}]}
    values["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, values["pre_tokenizer"]]}
    values["decoder"] = {"type": "Sequence", "decoders": [replace, values["decoder"]]}
    values["truncation"] = {"direction": "Right", "max_length": 20, "strategy": "LongestFirst", "stride": 2}
    values["model"] |= {"vocab": dict(list(values["model"]["vocab"].items())[:300]), "merges": []}
    return dict(values)


def use(folder: Path, values: Any, text: str = "ab a xx _") -> Any:
    """The text after it was encoded and decoded by such a tokenizer."""
    (folder / "tokenizer.json").write_text(values if isinstance(values, str) else as_json(values))
    tokenizer = load_tokenizer("hostile", folder)
    ids = tokenizer(text, return_offsets_mapping=True)["input_ids"]
    tokenizer([text, text], add_special_tokens=False)
    return tokenizer.decode(ids)


def test_the_good_one_works(folder: Path, good: dict[str, Any]) -> None:
    assert "a" in use(folder, good)


@attack(100)
@given(data=st.data())
def test_any_tokenizer_works_or_is_refused(folder: Path, good: dict[str, Any], data: Any) -> None:
    values = as_json(data.draw(mutated(good, json_tree)))
    assert isinstance(answer(lambda: use(folder, values), MoleError), (str, ModelError))


PATTERN = {"Regex": "(a+)+$"}
"""Backtracks longer than the library allows where `a` is repeated before something else: it panics then."""
PANICS: dict[str, dict[str, Any]] = {
    "split": {"pre_tokenizer": {"type": "Split", "pattern": PATTERN, "behavior": "Isolated", "invert": False}},
    "replace": {"normalizer": {"type": "Replace", "pattern": PATTERN, "content": "x"}},
}


@pytest.mark.parametrize("what", PANICS)
def test_a_pattern_that_backtracks_without_end_is_one_line(what: str, folder: Path, good: dict[str, Any]) -> None:
    line = str(refusal(lambda: use(folder, {**good, **PANICS[what]}, "a" * 40 + "!"), MoleError))
    assert "The tokenizer of hostile failed" in line and "retry-limit" in line
    assert "b" in use(folder, {**good, **PANICS[what]}, "b"), "other texts are encoded"


def test_a_tokenizer_larger_than_any_in_use_is_not_read(folder: Path, good: dict[str, Any]) -> None:
    path = folder / "tokenizer.json"
    path.write_text("{")
    with path.open("ab") as file:
        file.truncate(4 * MAX_FILE)  # takes no room on the disk
    line = str(refusal(lambda: load_tokenizer("hostile", folder), MoleError))
    assert "tokenizer.json has 536,870,912 bytes" in line


def test_a_guarded_tokenizer_is_copied_and_saved_as_before(folder: Path, good: dict[str, Any], tmp_path: Path) -> None:
    use(folder, good)
    tokenizer = load_tokenizer("hostile", folder)
    tokenizer.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert saved["tokenizer_class"] == json.loads((folder / "tokenizer_config.json").read_text())["tokenizer_class"]
    for other in (copy.copy(tokenizer), copy.deepcopy(tokenizer), load_tokenizer("again", tmp_path)):
        assert other("abc")["input_ids"] == tokenizer("abc")["input_ids"]
