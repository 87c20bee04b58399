"""The sample data: made by its script, several skills, and held out for real."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from mole.data import read_examples

FOLDER = Path(__file__).parents[3] / "assets" / "data"
FILES = ("skills_train.jsonl", "skills_heldout.jsonl")


def rows_of(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (FOLDER / name).read_text().splitlines()]


def words(row: dict[str, str]) -> set[str]:
    return set(re.findall(r"[\w']+", row["prompt"]))


def test_the_script_makes_the_files_byte_for_byte(tmp_path: Path) -> None:
    subprocess.run([sys.executable, FOLDER / "make_skills.py", tmp_path], check=True)
    for name in FILES:
        assert (tmp_path / name).read_bytes() == (FOLDER / name).read_bytes()


def test_there_are_four_skills_and_rows_enough_of_each() -> None:
    train, heldout = (Counter(row["skill"] for row in rows_of(name)) for name in FILES)
    assert len(train) >= 4 and train.keys() == heldout.keys()
    assert train.total() >= 1000 and heldout.total() >= 200
    assert min(train.values()) >= 200 and min(heldout.values()) >= 40


def test_no_held_out_row_is_in_training_and_none_comes_twice() -> None:
    prompts = [row["prompt"] for name in FILES for row in rows_of(name)]
    assert len(set(prompts)) == len(prompts)


@pytest.mark.parametrize("skill", ["units", "extraction", "sorting"])
def test_numbers_names_cities_and_sets_of_digits_held_out_are_new(skill: str) -> None:
    train, heldout = ([substance(row) for row in rows_of(name) if row["skill"] == skill] for name in FILES)
    assert not set[str]().union(*train) & set[str]().union(*heldout)


def substance(row: dict[str, str]) -> set[str]:
    """What a row is about, whatever its wording."""
    if row["skill"] == "units":
        return set(re.findall(r"\d+", row["prompt"]))
    return set(json.loads(row["completion"]).values()) if row["skill"] == "extraction" else {row["completion"]}


def test_every_held_out_tone_has_a_word_that_training_never_shows() -> None:
    train, heldout = ([words(row) for row in rows_of(name) if row["skill"] == "tone"] for name in FILES)
    seen = set[str]().union(*train)
    assert all(sentence - seen for sentence in heldout)


@pytest.mark.parametrize("name", FILES)
def test_every_row_is_accepted_and_short(name: str) -> None:
    rows = read_examples(str(FOLDER / name))
    assert rows.shape == "prompt/completion" and not rows.rejected
    assert (
        max(len(example.prompt[0]["content"].split()) + len(example.target.split()) for example in rows.examples) < 32
    )


def test_no_answer_to_a_held_out_prompt_is_the_same_for_a_fifth_of_the_rows() -> None:
    (_, most), *_ = Counter(row["completion"] for row in rows_of(FILES[1])).most_common(1)
    assert most < 0.2 * len(rows_of(FILES[1])), "a constant answer must not look like learning"
