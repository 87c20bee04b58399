"""Two who want the same at once: one holder for a run and for a device; the others queue, or say who holds it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from forks import PATIENCE, SERVER, Attempt, Forked, Make, Whole, processes_of, wait_for, work
from operations import EVENT, before, wait_to_be_stopped
from test_killed import check_finished

from mole import runs
from mole.core import locks
from mole.core.errors import BusyError, MoleError
from mole.runs import job
from mole.runs.run import Run

ROUNDS, RACERS = 4, 3


def race(act: Callable[[Any], str], given: Any) -> list[str]:
    """What several processes answer that do the same at the same moment."""
    gate, answers = SERVER.Barrier(RACERS), SERVER.SimpleQueue()
    racers = [SERVER.Process(target=_race, args=(str(runs.home()), act, given, gate, answers)) for _ in range(RACERS)]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join(PATIENCE)
        assert racer.exitcode == 0
    return [answers.get() for _ in racers]


def _race(home: str, act: Callable[[Any], str], given: Any, gate: Any, answers: Any) -> None:
    os.environ["MOLE_HOME"] = home
    gate.wait(PATIENCE)
    answers.put(act(given))


def enqueue(name: str) -> str:
    job.STARTING_SECONDS = PATIENCE
    return said(lambda: runs.enqueue(runs.get(name)))


def start(name: str) -> str:
    job.STARTING_SECONDS = PATIENCE
    return said(lambda: runs.start(runs.get(name)))


def wake(_: Any) -> str:
    job.STARTING_SECONDS = 0.0
    return said(runs.wake_queued)


def said(act: Callable[[], Any]) -> str:
    try:
        act()
    except MoleError as error:
        return f"{type(error).__name__}: {error}"
    return "mine"


def stop_all(made: list[Run]) -> None:
    for run in made:
        if run.state in ("queued", "running"):
            runs.stop(run)
    wait_for(lambda: not processes_of(runs.home()))


def holders(made: list[Run]) -> set[int]:
    """The processes that hold these runs, as far as they have noted themselves."""
    return {locks.holder(run.lock_path)["pid"] for run in made if run.held and "pid" in locks.holder(run.lock_path)}


def test_of_several_processes_that_queue_one_run_one_wins(make_tiny: Make) -> None:
    for _ in range(ROUNDS):
        run = make_tiny()
        answers = race(enqueue, run.name)
        assert answers.count("mine") == 1, answers
        others = [answer for answer in answers if answer != "mine"]
        assert all(answer.startswith(BusyError.__name__) and run.name in answer for answer in others), others
        assert [event["type"] for event in run.events()] == ["created", "queued"]


def test_of_several_processes_that_start_one_run_one_wins_and_one_worker_lives(
    make_tiny: Make, busy_cpu: locks.Lock
) -> None:
    run = make_tiny("wanted")
    answers = race(start, run.name)
    assert answers.count("mine") == 1, answers
    wait_for(lambda: len(holders([run])) == 1)
    assert processes_of(runs.home()) == holders([run])
    stop_all([run])
    assert run.state == "stopped"


def test_studios_that_wake_the_same_queue_leave_one_process_a_run_and_train_none_twice(
    make_tiny: Make, busy_cpu: locks.Lock
) -> None:
    waiting = [make_tiny(name) for name in ("a", "b")]
    for run in waiting:
        runs.enqueue(run)
    assert race(wake, None) == ["mine"] * RACERS
    wait_for(lambda: len(holders(waiting)) == len(waiting))
    wait_for(lambda: processes_of(runs.home()) == holders(waiting))
    stop_all(waiting)
    for run in waiting:
        assert run.state == "stopped"
        assert "starting" not in [event["type"] for event in run.events()]


@pytest.mark.parametrize("last", ["stopped", "failed", "step"])
def test_a_worker_that_comes_late_does_not_train_a_run_that_was_stopped_meanwhile(make_tiny: Make, last: str) -> None:
    run = make_tiny("late")
    runs.enqueue(run)
    run.append_event(last, 3)
    before = run.events()
    late = Forked(work, str(runs.home()), "late", False, None)
    assert late.ended() and late.process.exitcode == 2
    assert "does not wait to be trained" in run.log_path.read_text()
    assert run.events() == before


@pytest.mark.slow
def test_a_run_on_the_command_line_beside_another_waits_says_for_whom_and_has_its_turn(
    make_tiny: Make, whole: Whole, tmp_path: Path
) -> None:
    """A real `mole train` in the foreground, while another run is in the middle of its training."""
    first, template = make_tiny("first"), make_tiny("template")
    runs.stop(template)
    attempt = Attempt(first, partial(before, EVENT, 7, partial(wait_to_be_stopped, tmp_path / "reached", first)))
    wait_for((tmp_path / "reached").exists)
    command = [sys.executable, "-m", "mole.cli", "train", "--config", str(template.config_path), "--name", "second"]
    cli = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert cli.stderr is not None
    line = cli.stderr.readline()
    assert line == f"Waiting for cpu: run first (process {attempt.process.pid}) is using it.\n"
    run = runs.get("second")
    assert run.state == "queued" and runs.ahead_of(run) == ["first"]
    with pytest.raises(BusyError, match=f"second is held by process {cli.pid}"):
        runs.enqueue(run)
    assert attempt.kill()
    cli.communicate(timeout=PATIENCE)
    assert cli.returncode == 0 and first.state == "interrupted"
    check_finished(run, whole)


def test_a_queued_run_whose_process_was_killed_says_so_and_how_to_go_on(
    make_tiny: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No studio may be there to wake it."""
    run = make_tiny("left")
    monkeypatch.setattr(job, "STARTING_SECONDS", PATIENCE)
    runs.enqueue(run)
    assert run.details()["error"] is None, "its process may be just starting"
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + 2 * PATIENCE)
    with run.lock():
        assert run.details()["error"] is None, "somebody waits for its turn"
    details = run.details()
    assert run.state == "queued" and "no process waits" in details["error"]
    assert details["advice"] == "Start it again: mole runs resume left"


# Process numbers


@pytest.fixture
def stranger() -> Iterator[int]:
    """A living process that has nothing to do with us."""
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    yield process.pid
    assert process.poll() is None, "it was not ours to end"
    process.kill()
    process.wait()


@pytest.mark.parametrize("whose", ["stranger", "ours", "init"])
@pytest.mark.parametrize(("last", "state"), [("step", "interrupted"), ("queued", "queued"), ("stopped", "stopped")])
def test_a_process_number_that_was_given_to_another_fools_nobody(
    make_tiny: Make, stranger: int, whose: str, last: str, state: str
) -> None:
    pid = {"stranger": stranger, "ours": os.getpid(), "init": 1}[whose]
    run = make_tiny("reused")
    run.append_event(last, 3, device="cpu", pid=pid)
    device = runs.device_lock_path("cpu")
    device.parent.mkdir()
    note = json.dumps({"pid": pid, "since": time.time(), "run": "reused"})
    for path in (run.lock_path, device):
        path.write_text(note)
    assert run.state == state and not run.held
    assert runs.device_user("cpu") == ""
    if state == "queued":
        runs.stop(run)
        assert run.state == "stopped"
    runs.enqueue(run, resume=True)
    with run.lock():
        mine = runs.acquire_device("cpu", run)
        assert mine is not None
        mine.release()
    runs.delete(run)
    os.kill(stranger, signal.SIG_DFL)
