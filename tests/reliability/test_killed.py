"""`kill -9` of the trainer at any moment: the run is `interrupted`, resume goes on from the newest checkpoint that
verifies, and the adapter ends up with the very bits of an undisturbed training."""

from __future__ import annotations

import os
import random
import re
import signal
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from forks import SAVE_STEPS, Attempt, Make, Whole, finish, saved_step, weights

from mole import runs
from mole.runs.run import Run

SEED = 20_240_229
KILLS, SOAK_KILLS = 50, 300


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
    """Runs, each killed and resumed until it has finished, until there were so many kills."""
    moments = random.Random(seed)
    done = 0
    while done < kills:
        run = make()
        while run.state != "finished":
            attempt = Attempt(run)
            if not attempt.ended(moments.uniform(0, whole.seconds)) and attempt.kill():
                done += 1
                check_killed(run)
            else:
                assert attempt.code() == 0, run.log_path.read_text()
        check_finished(run, whole)


@pytest.mark.slow
def test_killed_at_any_moment_a_run_ends_with_the_same_bits(make_tiny: Make, whole: Whole) -> None:
    kill_at_random(make_tiny, whole, KILLS, SEED)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_killed_at_any_moment_hundreds_of_times(make_tiny: Make, whole: Whole) -> None:
    kill_at_random(make_tiny, whole, SOAK_KILLS, SEED + 1)


# At every operation on the disk


WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
AUDITED = {"os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.truncate"}


def operation(run: Run, event: str, arguments: tuple[Any, ...]) -> str | None:
    """A file operation in a run's folder as `rename checkpoints/.tmp-step-N → checkpoints/step-N`; None elsewhere."""
    if event == "open":
        path, _, flags = arguments
        if not isinstance(path, str) or not isinstance(flags, int) or not flags & WRITING:
            return None
        paths = [path]
    elif event in AUDITED:
        paths = [os.fspath(part) for part in arguments if isinstance(part, (str, os.PathLike))]
        if event == "os.remove" and arguments[1] >= 0:  # by name within an open folder, as shutil.rmtree does
            paths = [os.path.join(os.readlink(f"/proc/self/fd/{arguments[1]}"), paths[0])]
    else:
        return None
    if not any(Path(path).is_relative_to(run.path) for path in paths):
        return None
    names = " → ".join(os.path.relpath(path, run.path) for path in paths)
    names = re.sub(r"step-\d+", "step-N", re.sub(r"-[0-9a-f]{8}\b", "", names))
    return f"{event.removeprefix('os.')} {re.sub(r'[.][0-9a-f]{8}(?= |$)', '.#', names)}"


def watch(run: Run, tell: Any) -> None:
    """In the trainer: call `tell(operation)` before each operation on the run's files."""

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if (what := operation(run, event, arguments)) is not None:
            tell(what)

    sys.addaudithook(hook)
    sync = os.fsync

    def synced(descriptor: int) -> None:
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        if (what := operation(run, "open", (path, "", os.O_WRONLY))) is not None:
            tell(what.replace("open", "fsync", 1))
        sync(descriptor)

    os.fsync = synced


def note_operations(to: Path, run: Run) -> None:
    """In the trainer: write each operation to a file."""
    descriptor = os.open(to, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    watch(run, lambda what: os.write(descriptor, f"{what}\n".encode()))


def die_before(what: str, occurrence: int, run: Run) -> None:
    """In the trainer: SIGKILL right before the given operation."""
    left = occurrence

    def tell(now: str) -> None:
        nonlocal left
        left -= now == what
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)

    watch(run, tell)


def operations_of(make: Make, file: Path) -> list[str]:
    """The operations on the disk of a whole training, in order."""
    run = make()
    assert Attempt(run, partial(note_operations, file)).code() == 0
    return file.read_text().splitlines()


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
def operations(make_tiny: Make, tmp_path: Path) -> Iterator[list[str]]:
    yield operations_of(make_tiny, tmp_path / "operations")


@pytest.mark.slow
def test_killed_before_each_kind_of_operation_on_its_files(
    make_tiny: Make, whole: Whole, operations: list[str]
) -> None:
    """In the middle of a checkpoint, before and after its rename, before its event, in the prune, in the adapter, …"""
    for needed in (
        "rename checkpoints/.tmp-step-N → checkpoints/step-N",
        "rename checkpoints/step-N → checkpoints/.tmp-step-N",
        "fsync checkpoints/.tmp-step-N/manifest.json",
        "rmdir checkpoints/.tmp-step-N",
        "rename .tmp-adapter → adapter",
        "fsync .tmp-adapter/adapter_model.safetensors",
        "open events.jsonl",
    ):
        assert needed in operations, f"the hook does not see it: {needed}"
    shuffled = random.Random(SEED)
    points = [(what, shuffled.randrange(operations.count(what))) for what in sorted(set(operations))]
    shuffled.shuffle(points)
    kill_before_each(make_tiny, whole, points)


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
    run = make_tiny(**limit)
    assert Attempt(run, partial(note_operations, tmp_path / "operations")).code() == 0
    operations = [what for what in (tmp_path / "operations").read_text().splitlines() if "checkpoints" in what]
    rename = "rename checkpoints/.tmp-step-N → checkpoints/step-N"
    first, second = [place for place, what in enumerate(operations) if what == rename][:2]
    last = operations.index("mkdir checkpoints/.tmp-step-N", second)
    save = range(first + 1, last)
    assert {"rename checkpoints/step-N → checkpoints/.tmp-step-N", rename} <= {operations[place] for place in save}
    for place in list(save)[:: max(1, len(save) // 6)]:
        what = operations[place]
        run = make_tiny(**limit)
        assert Attempt(run, partial(die_before, what, operations[:place].count(what))).code() == -signal.SIGKILL
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
        assert Attempt(run, partial(die_before, what, operations[:place].count(what))).code() == -signal.SIGKILL, what
        check_killed(run)
        if run.state != "finished":
            finish(run)
        check_finished(run, whole)
        runs.delete(run)
