"""Processes that are suspended (SIGSTOP, Ctrl-Z): nothing breaks, others go on, and what stands still is said."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from forks import Attempt, Make, Whole, wait_for, weights
from operations import EVENT, before, suspend
from test_run_life import linux, worker_pid

from app.services.live_updates import live_status
from mole import runs
from mole.core import locks
from mole.core.errors import BusyError
from mole.runs import job
from mole.runs.run import Run

pytestmark = linux


def suspended(run: Run) -> int:
    """The process of a run, once it is suspended."""
    wait_for(lambda: run.suspended)
    pid = locks.suspended_holder(run.lock_path)
    assert pid is not None
    return pid


def half_way(run: Run) -> Attempt:
    """A training that suspends itself half-way."""
    return Attempt(run, partial(before, EVENT, 7, suspend))


@pytest.mark.slow
def test_a_suspended_training_says_so_and_goes_on_to_the_same_weights(make_tiny: Make, whole: Whole) -> None:
    run = make_tiny("suspended")
    attempt = half_way(run)
    pid = suspended(run)
    assert run.held and run.state == "running"
    details = run.details()
    assert f"Its process {pid} is suspended" in details["error"] and details["advice"].endswith(f"kill -CONT {pid}")
    assert f"kill -CONT {pid}" in live_status(run)["note"]
    with pytest.raises(BusyError, match=rf"held by process {pid}, which is suspended"):
        runs.enqueue(run, resume=True)
    os.kill(pid, signal.SIGCONT)
    assert attempt.code() == 0
    assert run.details()["error"] is None
    assert weights(run) == whole.weights


def test_a_suspended_training_can_be_stopped(make_tiny: Make) -> None:
    run = make_tiny("suspended")
    attempt = half_way(run)
    suspended(run)
    runs.stop(run)
    assert attempt.code() == 0
    assert run.state == "stopped" and run.step > 0


def test_who_waits_for_a_suspended_training_is_told(make_tiny: Make) -> None:
    first, second = make_tiny("first"), make_tiny("second")
    attempt = half_way(first)
    suspended(first)
    waiting = Attempt(second)
    worker_pid(second)
    assert "run first (process" in second.log_path.read_text() and "suspended" in second.log_path.read_text()
    for run, each in ((second, waiting), (first, attempt)):
        runs.stop(run)
        assert each.code() == 0 and run.state == "stopped"


def test_a_suspended_process_in_the_queue_lets_others_pass_and_keeps_its_place(
    make_tiny: Make, busy_cpu: locks.Lock
) -> None:
    first, second = make_tiny("first"), make_tiny("second")
    attempts = [Attempt(first), Attempt(second)]
    os.kill(worker_pid(first), signal.SIGSTOP)
    pid = suspended(first)
    worker_pid(second)
    busy_cpu.release()
    assert attempts[1].code() == 0 and second.state == "finished"
    assert first.state == "queued" and "suspended" in first.details()["error"]
    assert [run.name for run in runs.waiting_runs("cpu")] == ["first"]
    assert runs.wake_queued() == [], "it has a process"
    os.kill(pid, signal.SIGCONT)
    assert attempts[0].code() == 0 and first.state == "finished"


def test_a_suspended_child_of_the_studio_ends_when_it_is_cancelled(tmp_path: Path) -> None:
    path = tmp_path / "x.lock"
    code = (
        "import sys, time; from pathlib import Path; from mole.core import locks\n"
        "lock = locks.acquire(Path(sys.argv[1])); print(flush=True); time.sleep(600)"
    )
    child = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.readline()
    os.kill(child.pid, signal.SIGSTOP)
    wait_for(lambda: locks.suspended_holder(path) == child.pid)
    job.signal_holder(path, signal.SIGTERM)  # as cancelling an evaluation does
    assert child.wait(60) == -signal.SIGTERM
    assert locks.suspended_holder(path) is None
