"""`kill -9` of the trainer at any moment: the run is `interrupted`, resume goes on from the newest checkpoint that
verifies, and the adapter ends up with the very bits of an undisturbed training."""

from __future__ import annotations

import os
import random
import signal
from functools import partial
from pathlib import Path

import pytest
from forks import SAVE_STEPS, Attempt, Make, Whole, finish, saved_step, weights
from operations import SAVE, SAVED, die_before, killed_before, operations_of

from mole import runs
from mole.runs.run import Run

SEED = 20_240_229
KILLS, SOAK_KILLS = 12, 350


def check_killed(run: Run) -> None:
    """What must hold of a run whose process was just killed."""
    last = run.last_event
    saved = saved_step(run)
    told = [event["step"] for event in run.events() if event["type"] == "checkpoint"]
    assert saved >= max(told, default=0), "a checkpoint that was announced is gone"
    assert last["step"] - saved <= SAVE_STEPS, "more work is lost than save_steps"
    if run.adapter_dir.exists():
        assert run.state == "finished", "the adapter was in its place already"
        return
    if last["type"] in ("created", "queued"):
        assert run.state == "queued", "it had not begun: it keeps its place in line"
    else:
        assert run.state == "interrupted"
        assert "mole runs resume" in run.details()["advice"]
    assert run.name in [row["name"] for row in map(Run.status, runs.list_runs())]


def check_finished(run: Run, whole: Whole, bad: int = 0) -> None:
    """What must hold of a run that was killed on the way, and has finished; so many checkpoints were damaged by us."""
    assert run.state == "finished"
    assert weights(run) == whole.weights, "not the bits of an undisturbed training"
    begun = [event for event in run.events() if event["type"] == "started"]
    for event in begun:
        assert event["resumed_from"] == (f"step-{event['step']}" if event["step"] else None)
    assert len(list(run.checkpoints_dir.glob("*.bad*"))) == bad, "a kill breaks no checkpoint"


# At random


def kill_at_random(make: Make, whole: Whole, kills: int, seed: int) -> None:
    """Runs, each killed and resumed up to six times and then trained to its end, until there were so many kills."""
    moments = random.Random(seed)
    done = 0
    while done < kills:
        run, left = make(), 6
        while left and run.state != "finished":
            left -= 1
            attempt = Attempt(run)
            if attempt.kill_after(moments.uniform(0, whole.cpu_seconds)):
                done += 1
                check_killed(run)
            else:
                assert attempt.code() == 0, run.log_path.read_text()
        if run.state != "finished":
            finish(run)
        check_finished(run, whole)


@pytest.mark.slow
def test_killed_at_any_moment_a_run_ends_with_the_same_bits(make_tiny: Make, whole: Whole) -> None:
    kill_at_random(make_tiny, whole, KILLS, SEED)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_killed_at_any_moment_hundreds_of_times(make_tiny: Make, whole: Whole) -> None:
    kill_at_random(make_tiny, whole, SOAK_KILLS, SEED + 1)


# At every operation on the disk


def kill_before_each(make: Make, whole: Whole, points: list[tuple[str, int]]) -> None:
    """Kill before each point; a run goes from point to point until it finishes, and another takes the rest."""
    while points:
        run, first = make(), True
        while run.state != "finished":
            what, occurrence = points[-1] if points else ("", 0)
            code = Attempt(run, partial(die_before, what, occurrence if first else 0)).code()
            if code == -signal.SIGKILL:
                check_killed(run)
                points.pop()
            else:
                assert code == 0, run.log_path.read_text()
                assert not (first and points), f"never came to {what}"
            first = False
        check_finished(run, whole)


@pytest.fixture
def operations(make_tiny: Make, tmp_path: Path) -> list[str]:
    return operations_of(make_tiny, tmp_path / "operations")


NEEDED = (
    "rename checkpoints/.tmp-step-N → checkpoints/step-N",
    "rename checkpoints/step-N → checkpoints/.tmp-step-N",
    "fsync checkpoints/.tmp-step-N/manifest.json",
    "rmdir checkpoints/.tmp-step-N",
    "rename .tmp-adapter → adapter",
    "fsync .tmp-adapter/adapter_model.safetensors",
    "open events.jsonl",
)
"""A checkpoint before and after its rename and before its event, the prune, the adapter."""
SAMPLE = 8


def kill_before_kinds(make: Make, whole: Whole, operations: list[str], kinds: list[str]) -> None:
    """Kill before one operation of each kind, the how-manieth of its kind is drawn."""
    chance = random.Random(SEED)
    points = [(what, chance.randrange(operations.count(what))) for what in kinds]
    chance.shuffle(points)
    kill_before_each(make, whole, points)


@pytest.mark.slow
def test_killed_before_operations_on_its_files(make_tiny: Make, whole: Whole, operations: list[str]) -> None:
    """Before those that matter most, and a sample of the others."""
    assert set(NEEDED) <= set(operations), "the hook does not see them"
    others = sorted(set(operations) - set(NEEDED))
    kill_before_kinds(make_tiny, whole, operations, [*NEEDED, *random.Random(SEED).sample(others, SAMPLE)])


@pytest.mark.soak
def test_killed_before_each_kind_of_operation_on_its_files(
    make_tiny: Make, whole: Whole, operations: list[str]
) -> None:
    kill_before_kinds(make_tiny, whole, operations, sorted(set(operations)))


def die_in_the_middle_of_an_event(number: int, run: Run) -> None:
    """In the trainer: SIGKILL with half of the line written."""
    left, write = number, os.write

    def written(descriptor: int, data: bytes) -> int:
        nonlocal left
        if b'"type": ' in data:
            left -= 1
            if left < 0:
                write(descriptor, data[: len(data) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
        return write(descriptor, data)

    os.write = written


@pytest.mark.slow
def test_killed_in_the_middle_of_an_event_s_line(make_tiny: Make, whole: Whole) -> None:
    """The half line is no event, and does not swallow the next."""
    run = make_tiny()
    for number in (5, 1, 9):
        assert Attempt(run, partial(die_in_the_middle_of_an_event, number)).code() == -signal.SIGKILL
        assert not run.events_path.read_bytes().endswith(b"\n")
        check_killed(run)
        assert run.events() == list(run.events_backwards())[::-1]
    finish(run)
    check_finished(run, whole)
    lines = run.events_path.read_bytes().splitlines()
    assert len(lines) == len(run.events()) + 3


# What a kill leaves behind


@pytest.mark.slow
def test_with_one_checkpoint_to_keep_there_is_always_a_good_one(make_tiny: Make, whole: Whole, tmp_path: Path) -> None:
    """Killed before every operation of the second save and its prune."""
    limit = {"training.save_total_limit": 1}
    operations = operations_of(lambda: make_tiny(**limit), tmp_path / "operations")
    operations = [what for what in operations if "checkpoints" in what]
    first, second = [place for place, what in enumerate(operations) if what == SAVED][:2]
    save = range(first + 1, operations.index(SAVE, second))
    assert {"rename checkpoints/step-N → checkpoints/.tmp-step-N", SAVED} <= {operations[place] for place in save}
    for place in list(save)[:: max(1, len(save) // 6)]:
        what = operations[place]
        run = make_tiny(**limit)
        killed_before(what, operations[:place].count(what), run)
        assert saved_step(run), what
        check_killed(run)
    finish(run)
    check_finished(run, whole)
    assert [path.name for path in run.checkpoints_dir.iterdir()] == ["step-12"]


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_killed_before_every_single_operation_on_its_files(
    make_tiny: Make, whole: Whole, operations: list[str]
) -> None:
    for place, what in enumerate(operations):
        run = make_tiny()
        killed_before(what, operations[:place].count(what), run)
        check_killed(run)
        if run.state != "finished":
            finish(run)
        check_finished(run, whole)
        runs.delete(run)
