"""Damaged checkpoints, half-written lines, a clock that jumps: what is broken is set aside, and order stays order."""

from __future__ import annotations

import os
import random
import shutil
import time
from functools import partial
from pathlib import Path

import pytest
from forks import PATIENCE, Attempt, Make, Whole, finish
from operations import SAVED, killed_before
from test_killed import check_finished

from mole import runs
from mole.core import checkpoint
from mole.runs import job
from mole.runs.run import Run

SEED = 1_970
FLIPS, CUTS = 12, 4
"""Of each file of a checkpoint."""


def flip(path: Path, chance: random.Random) -> None:
    """Turn over one bit."""
    data = bytearray(path.read_bytes())
    data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    path.write_bytes(data)


def cut(path: Path, chance: random.Random) -> None:
    """Lose the end."""
    os.truncate(path, chance.randrange(path.stat().st_size))


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def saved(make_tiny: Make) -> Run:
    """A run with two good checkpoints."""
    run = make_tiny("saved", **{"training.max_steps": 9})
    finish(run)
    assert [step for step, _ in checkpoint.steps(run.checkpoints_dir)] == [6, 9]
    return run


@pytest.mark.slow
def test_whatever_bit_of_a_checkpoint_is_wrong_it_is_set_aside_and_the_one_before_is_taken(
    saved: Run, tmp_path: Path
) -> None:
    chance = random.Random(SEED)
    files = sorted(content(saved.checkpoints_dir / "step-9"))
    assert {"adapter_model.safetensors", "training_state.safetensors", "trainer_state.json", "manifest.json"} <= {
        *files
    }
    for number, (name, damage) in enumerate((name, way) for name in files for way in [flip] * FLIPS + [cut] * CUTS):
        copy = tmp_path / str(number)
        shutil.copytree(saved.checkpoints_dir, copy)
        damage(copy / "step-9" / name, chance)
        damaged = content(copy / "step-9")
        assert checkpoint.newest_good(copy) == copy / "step-6", (name, damage, number)
        assert {path.name for path in copy.iterdir()} == {"step-6", "step-9.bad"}
        assert content(copy / "step-9.bad") == damaged, "what was set aside is kept as it is"
        shutil.rmtree(copy)


@pytest.mark.slow
@pytest.mark.parametrize("broken", [1, 2])
def test_a_run_with_damaged_checkpoints_ends_with_the_same_bits(make_tiny: Make, whole: Whole, broken: int) -> None:
    """With the newest broken it goes on from the one before; with all broken, from the start."""
    chance = random.Random(SEED + broken)
    run = make_tiny("damaged")
    killed_before(SAVED, 2, run)
    kept = checkpoint.steps(run.checkpoints_dir)[-2:]
    for _, folder in kept[-broken:]:
        flip(folder / chance.choice(["adapter_model.safetensors", "training_state.safetensors"]), chance)
    finish(run)
    again = [event for event in run.events() if event["type"] == "started"][-1]
    assert again["resumed_from"] == (kept[0][1].name if broken == 1 else None)
    names = {path.name for path in run.checkpoints_dir.iterdir()}
    assert {f"{folder.name}.bad" for _, folder in kept[-broken:]} <= names
    check_finished(run, whole, bad=broken)


def test_pruning_never_counts_a_broken_one(tmp_path: Path) -> None:
    """A flipped bit keeps a file's size: only its sum tells. Were it counted, one more damage would cost everything."""

    def write(step: int, limit: int) -> Path:
        return checkpoint.write(
            tmp_path, step, lambda folder: (folder / "w").write_bytes(bytes(99)) and None, limit=limit
        )

    write(1, 3), flip(write(2, 3) / "w", random.Random(SEED))
    write(3, 2)
    assert {path.name for path in tmp_path.iterdir()} == {"step-1", "step-2.bad", "step-3"}


# The clock


def jumping_clock(seed: int, run: Run) -> None:
    """In the trainer: each look at the clock is years before or after the last."""
    chance = random.Random(seed)
    time.time = lambda: chance.uniform(0, 4e9)


@pytest.mark.slow
def test_a_clock_that_jumps_changes_no_state_and_no_bit(make_tiny: Make, whole: Whole) -> None:
    run = make_tiny("jumping")
    assert Attempt(run, partial(jumping_clock, SEED)).code() == 0, run.log_path.read_text()
    check_finished(run, whole)
    steps = [event for event in run.events() if event["type"] == "step"]
    assert [event["step"] for event in steps] == list(range(1, 13))
    for event in steps:
        assert 0 <= event["eta_s"] < 600 and event["tokens_per_second"] > 0, "they are not told by that clock"
    assert 0 < run.details()["metrics"].get("seconds", 1) < 600


@pytest.mark.parametrize("jump", [-10 * 365 * 86_400, -3600, -1, 3600, 10 * 365 * 86_400])
def test_who_comes_later_stands_behind_whatever_the_clock_says(
    make_tiny: Make, monkeypatch: pytest.MonkeyPatch, jump: float
) -> None:
    now = time.time
    line = [make_tiny(name) for name in ("b", "c", "a")]
    runs.enqueue(line[0])
    monkeypatch.setattr(time, "time", lambda: now() + jump)
    runs.enqueue(line[1])
    monkeypatch.setattr(time, "time", now)
    runs.enqueue(line[2])
    assert runs.waiting_runs("cpu") == line
    assert runs.move(line[2], 1) == [line[2], line[0], line[1]]
    later = make_tiny("later")
    runs.enqueue(later)
    assert runs.waiting_runs("cpu")[-1] == later
    assert {run.name for run in runs.list_runs()} == {"a", "b", "c", "later"}
    assert [run.state for run in runs.list_runs()] == ["queued"] * 4


def test_a_run_made_before_the_clock_was_set_back_is_not_taken_for_one_that_is_just_starting(
    make_tiny: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, now = make_tiny("future"), time.time
    monkeypatch.setattr(job, "STARTING_SECONDS", PATIENCE)
    monkeypatch.setattr(time, "time", lambda: now() + 86_400)
    runs.enqueue(run)
    monkeypatch.setattr(time, "time", now)
    runs.enqueue(run)
    assert run.state == "queued"
