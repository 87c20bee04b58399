"""The life of a run, attacked with real processes: stopped, queued, started twice, its parent gone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
from forks import (
    PATIENCE,
    ROOT,
    STEPS,
    Attempt,
    Command,
    Make,
    Whole,
    environment_of,
    stat_of,
    wait_for,
    weights,
)
from operations import EVENT, before, wait_to_be_stopped

from mole import runs
from mole.core import checkpoint, locks
from mole.core.errors import BusyError, MoleError
from mole.runs import job
from mole.runs.run import Run

linux = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at processes in /proc")


def alive(pid: int) -> bool:
    """Whether there is such a process, be it a zombie."""
    return Path(f"/proc/{pid}").exists()


def worker_pid(run: Run) -> int:
    """The process that holds the run, once it waits for its device."""
    wait_for(lambda: run.held and "Waiting for cpu" in run.log_path.read_text())
    return int(locks.holder(run.lock_path)["pid"])


def open_files(pid: int) -> set[str]:
    """The files a process has open at the moment."""
    found = set()
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        try:
            found.add(os.readlink(descriptor))
        except FileNotFoundError:
            continue  # closed meanwhile
    return found


# Stopped


@pytest.mark.slow
def test_ctrl_c_saves_and_stops_and_resume_ends_with_the_same_weights(
    make_tiny: Make, whole: Whole, tmp_path: Path
) -> None:
    """The signal comes from outside, in the middle of the training."""
    template = make_tiny("template")
    runs.stop(template)
    run, reached = Run("stopped", runs.runs_dir() / "stopped"), tmp_path / "reached"
    middle = partial(before, EVENT, 9, partial(wait_to_be_stopped, reached, run), run)
    command = Command(tmp_path, "train", "--config", str(template.config_path), "--name", "stopped", prepare=middle)
    wait_for(lambda: reached.exists() or command.ended(0))
    assert command.process.pid is not None
    os.kill(command.process.pid, signal.SIGINT)
    code, out, err = command.answer()
    assert code == 0, err
    assert run.state == "stopped"
    assert f"Stopped at step {run.step}. To continue: mole runs resume stopped" in out
    assert 0 < run.step < STEPS
    assert checkpoint.newest_good(run.checkpoints_dir) == run.checkpoints_dir / f"step-{run.step}"
    assert "Traceback" not in err

    _, out, err = Command(tmp_path, "runs", "resume", "stopped").answer()
    assert run.state == "finished", err
    assert f"Adapter: {run.adapter_dir}" in out
    assert "mole chat stopped" in out
    assert weights(run) == whole.weights


def test_data_that_is_gone_fails_with_its_name_and_no_traceback(make_tiny: Make, tmp_path: Path) -> None:
    rows = tmp_path / "gone.jsonl"
    rows.write_text("")
    run = make_tiny("failing", **{"data.path": str(rows)})
    rows.unlink()
    code, _, err = Command(tmp_path, "runs", "resume", "failing").answer()
    assert code == 2
    assert run.state == "failed"
    assert "gone.jsonl" in run.details()["error"] and "gone.jsonl" in err
    assert "Traceback" in run.log_path.read_text()
    assert "Traceback" not in err


# The detached process


@linux
def test_the_worker_stands_alone_and_leaves_no_zombie(make_tiny: Make, busy_cpu: locks.Lock) -> None:
    run = make_tiny("alone")
    runs.start(run)  # returns, though the run has to wait
    assert run.state == "queued"
    pid = worker_pid(run)
    assert os.getsid(pid) == pid
    assert os.readlink(f"/proc/{pid}/cwd") == str(runs.home())
    (path,) = [entry for entry in environment_of(pid) if entry.startswith(b"PYTHONPATH=")]
    assert path.decode().removeprefix("PYTHONPATH=").split(":")[0] == str(ROOT), "it runs the same sources"
    own = {"/dev/null", str(run.log_path), str(run.lock_path)}
    wait_for(lambda: open_files(pid) <= own)  # it looks at the queue now and then; what it inherited would stay open
    assert "libtorch" not in Path(f"/proc/{pid}/maps").read_text()

    runs.stop(run)
    wait_for(lambda: not alive(pid))
    assert run.state == "stopped"
    assert not run.stop_requested()


@linux
def test_the_worker_outlives_the_one_that_started_it(make_tiny: Make, busy_cpu: locks.Lock) -> None:
    run = make_tiny("orphan")
    code = "import time; from mole import runs; runs.start(runs.get('orphan')); print(flush=True); time.sleep(600)"
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, start_new_session=True)
    assert parent.stdout is not None
    parent.stdout.readline()
    pid = worker_pid(run)
    assert stat_of(pid)[1] == str(parent.pid)
    os.killpg(parent.pid, signal.SIGKILL)
    parent.wait()
    wait_for(lambda: stat_of(pid)[1:2] != [str(parent.pid)])
    assert alive(pid) and run.held and run.state == "queued"
    runs.stop(run)
    wait_for(lambda: not alive(pid))
    assert run.state == "stopped"


def test_a_polite_kill_of_a_waiting_run_stops_it(make_tiny: Make, busy_cpu: locks.Lock) -> None:
    run = make_tiny("polite")
    runs.start(run)
    os.kill(worker_pid(run), signal.SIGTERM)
    wait_for(lambda: not run.held)
    assert run.state == "stopped"


def test_a_killed_waiting_run_is_still_in_line_and_can_be_woken(
    make_tiny: Make, busy_cpu: locks.Lock, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_tiny("rebooted")
    monkeypatch.setattr(job, "STARTING_SECONDS", PATIENCE)
    runs.start(run)
    os.kill(worker_pid(run), signal.SIGKILL)
    wait_for(lambda: not run.held)
    assert run.state == "queued"
    assert runs.wake_queued() == []  # so fresh that its process may just be starting
    monkeypatch.setattr(job, "STARTING_SECONDS", 0.0)
    assert runs.wake_queued() == [run]
    wait_for(lambda: run.held)
    assert runs.wake_queued() == []


# Two at once


def test_of_many_starts_at_once_one_wins_and_the_others_are_told(
    make_tiny: Make, busy_cpu: locks.Lock, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_tiny("wanted")
    monkeypatch.setattr(job, "STARTING_SECONDS", PATIENCE)

    def start(_: int) -> str:
        try:
            runs.start(run)
        except BusyError as error:
            return str(error)
        return "started"

    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(start, range(6)))
    assert answers.count("started") == 1
    assert all("wanted" in answer for answer in answers if answer != "started")
    worker_pid(run)
    assert [event["type"] for event in run.events()] == ["created", "queued"]


def test_a_second_worker_of_a_run_says_who_holds_it_and_changes_nothing(make_tiny: Make, busy_cpu: locks.Lock) -> None:
    run = make_tiny("held")
    runs.start(run)
    pid = worker_pid(run)
    before = run.events()
    command = [sys.executable, "-m", "mole.training.worker", "held"]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert answer.returncode == 1
    assert answer.stderr == f"mole: The run held is held by process {pid}.\n"
    assert run.events() == before


@pytest.mark.slow
def test_queued_runs_get_the_device_one_after_the_other_in_order(
    make_tiny: Make, busy_cpu: locks.Lock, tmp_path: Path
) -> None:
    first, cancelled, last = make_tiny("b"), make_tiny("c"), make_tiny("a")
    reached = tmp_path / "reached"
    attempts = [Attempt(first, partial(before, EVENT, 7, partial(wait_to_be_stopped, reached, first)))]
    for run in (cancelled, last):
        attempts.append(Attempt(run))
    for run in (first, cancelled, last):
        worker_pid(run)
    assert [run.name for run in runs.waiting_runs("cpu")] == ["b", "c", "a"]
    runs.stop(cancelled)
    wait_for(lambda: cancelled.state == "stopped")
    busy_cpu.release()
    wait_for(reached.exists)
    assert first.state == "running" and last.state == "queued"
    assert "run b (process" in locks.describe_holder(runs.device_lock_path("cpu"))
    runs.stop(first)
    assert [attempt.code() for attempt in attempts] == [0, 0, 0]
    assert first.state == "stopped" and last.state == "finished"
    ended = next(event["time"] for event in first.events() if event["type"] == "stopped")
    began = next(event["time"] for event in last.events() if event["type"] == "starting")
    assert ended < began


def test_a_forked_child_does_not_keep_the_lock_of_its_dead_parent(tmp_path: Path) -> None:
    code = (
        "import os, sys, time; from pathlib import Path; from mole.core import locks\n"
        "lock = locks.acquire(Path(sys.argv[1]))\n"
        "if not os.fork(): print(os.getpid(), flush=True)\n"
        "time.sleep(600)"
    )
    path = tmp_path / "x.lock"
    parent = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    try:
        assert locks.is_held(path)
        parent.kill()
        parent.wait()
        os.kill(child, 0)
        assert not locks.is_held(path)
    finally:
        os.kill(child, signal.SIGKILL)


# Failures in words


@pytest.mark.parametrize(
    ("error", "cause", "advice"),
    [
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 8 GB"), "Out of memory", "batch_size"),
        (MemoryError(), "Out of memory", "gradient_checkpointing"),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), "Out of memory", "max_length"),
        (
            RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"),
            "Out of memory",
            "batch_size",
        ),
        (RuntimeError("cuDNN error: CUDNN_STATUS_NOT_INITIALIZED"), "Out of memory", "batch_size"),
        (OSError(28, "No space left on device"), "disk is full", "resume"),
        (ValueError("Input contains NaN"), "not finite", "learning_rate"),
        (KeyError("strange"), "KeyError: 'strange'", "train.log"),
        (MoleError("All said."), "All said.", ""),
    ],
)
def test_failures_come_with_cause_and_advice(error: Exception, cause: str, advice: str) -> None:
    from mole.core.text import explain

    found, what_to_do = explain(error)
    assert cause in found
    assert advice in what_to_do
    assert "\n" not in found + what_to_do
