"""A disk that is full or read-only: a clear state and message, the last checkpoint kept, and the same bits later."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import disks
import pytest
from disks import Disk
from forks import Attempt, Make, Whole, finish, saved_step
from operations import before
from test_killed import check_finished

from mole import runs
from mole.core import checkpoint
from mole.runs.run import Run


@pytest.fixture
def disk(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    """A small disk that is this test's `$MOLE_HOME`."""
    with disks.small_disk(home) as made:
        monkeypatch.setenv("MOLE_HOME", str(made.home))
        yield made


def check_one_line(answer: Any, *words: str, code: int = 1) -> None:
    """A command that could not do its work says so in one line, the last."""
    assert answer.returncode == code, answer.stderr
    *before, last = answer.stderr.splitlines()
    assert last.startswith("mole: "), answer.stderr
    assert all("step/s" in line for line in before if line), "there is nothing before it but the progress bar"
    for word in words:
        assert word in last


SPOTS = [
    ("open train.log", 0),
    ("open events.jsonl", 1),
    ("open events.jsonl", 6),
    ("mkdir checkpoints", 0),
    ("open checkpoints/.tmp-step-N/adapter_config.json", 0),
    ("open checkpoints/.tmp-step-N/training_state.json", 1),
    ("open checkpoints/.tmp-step-N/manifest.json", 1),
    ("rename checkpoints/step-N → checkpoints/.tmp-step-N", 0),
    ("open .tmp-adapter/adapter_config.json", 0),
    ("open .tmp-adapter/manifest.json", 0),
    ("rename .tmp-adapter → adapter", 0),
]


@pytest.mark.slow
def test_a_run_whose_disk_fills_up_says_so_and_goes_on_when_there_is_room(
    disk: Disk, make_tiny: Make, whole: Whole
) -> None:
    """At each of these moments: the log, an event, the beginning, middle and end of a checkpoint and of the adapter."""
    run, failures = make_tiny("filled"), 0
    for what, occurrence in SPOTS:
        saved = checkpoint.steps(run.checkpoints_dir)
        code = Attempt(run, partial(before, what, occurrence, disk.fill())).code()
        if run.state != "finished":
            check_full(run, disk, what, code)
            failures += 1
        assert not saved or saved_step(run) >= saved[-1][0], what
        disk.free()
        if run.state == "finished":
            check_finished(run, whole)
            runs.delete(run)
            run = make_tiny("filled")
    finish(run)
    check_finished(run, whole)
    assert failures >= len(SPOTS) - 2, "pruning frees room, and behind the adapter there is only an event to write"


def check_full(run: Run, disk: Disk, what: str, code: int) -> None:
    """What must hold of a run whose disk has just filled up."""
    details = run.details()
    assert code == 1 and run.state in ("failed", "interrupted", *([] if disk.mounted else ["queued"])), (what, code)
    if run.state == "failed" or disk.mounted:
        cause = "The disk is full" if disk.mounted else "larger than this process may write"
        assert cause.lower() in details["error"].lower(), (what, details["error"])
        assert "resume" in details["advice"]
    shown = disk.mole("runs", "show", run.name)
    assert shown.returncode == 0 and (details["error"] or "") in shown.stdout


@pytest.mark.slow
def test_a_disk_without_room_for_another_file_is_a_full_disk(disk: Disk, make_tiny: Make, whole: Whole) -> None:
    """It has bytes, but no inodes: at the log, at a checkpoint and at the adapter, and for the commands."""
    if not disk.mounted:
        pytest.skip("only a disk of one's own can run out of inodes")
    run, config = make_tiny("filled"), None
    for what in ("open train.log", "mkdir checkpoints", "open .tmp-adapter/adapter_config.json"):
        code = Attempt(run, partial(before, what, 0, disk.fill_with_files())).code()
        check_full(run, disk, what, code)
        config = config or str(run.config_path)
        disk.fill_with_files()()  # what failed has removed its own
        for arguments in (("train", "--config", config, "--name", "new", "--detach"), ("train", "--config", config)):
            check_one_line(disk.mole(*arguments), "The disk is full", "df -i")
        assert disk.mole("runs", "list").returncode == 0
        disk.free()
    finish(run)
    check_finished(run, whole)
    assert [run.name for run in runs.list_runs()] == ["filled"]


def test_on_a_full_disk_nothing_is_begun_and_nothing_is_half_made(disk: Disk, make_tiny: Make) -> None:
    made = make_tiny("before")
    config = str(made.config_path)
    told = ("The disk is full", "Free some space") if disk.mounted else ("larger than this process may write", "ulimit")
    with disk.full():
        for arguments in (("train", "--config", config, "--detach"), ("runs", "resume", "before")):
            check_one_line(disk.mole(*arguments), *told)
        assert disk.mole("runs", "list").returncode == 0
        assert [run.name for run in runs.list_runs()] == ["before"]
        assert [path.name for path in runs.runs_dir().iterdir()] == ["before"]
        assert disk.mole("runs", "delete", "before", "--yes").returncode == 0
    assert list(runs.runs_dir().iterdir()) == []


def test_a_read_only_home_can_be_looked_at_and_says_what_it_refuses(disk: Disk, make_tiny: Make) -> None:
    made = make_tiny("before")
    runs.enqueue(made)
    config = str(made.config_path)
    with disk.read_only():
        for arguments in (
            ("train", "--config", config, "--detach"),
            ("train", "--config", config),
            ("runs", "resume", "before"),
            ("runs", "stop", "before"),
            ("runs", "delete", "before", "--yes"),
        ):
            answer = disk.mole(*arguments)
            check_one_line(answer, "read-only" if disk.mounted else "not permitted", "MOLE_HOME")
        for arguments in (("runs", "list"), ("runs", "show", "before"), ("runs", "queue"), ("presets",)):
            answer = disk.mole(*arguments)
            assert answer.returncode == 0 and not answer.stderr, answer.stderr
        if disk.mounted:
            assert runs.wake_queued() == []  # what a studio does when it starts
    assert made.state == "queued"
