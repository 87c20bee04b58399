"""The life of a run, attacked with real processes: killed, stopped, queued, started twice, its parent gone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from forks import ROOT

from mole import runs
from mole.config import RunConfig
from mole.core import checkpoint, locks
from mole.core.errors import BusyError, MoleError
from mole.runs import job
from mole.runs.run import Run

PATIENCE = 240.0
"""Seconds a busy machine may take to import torch and train a few steps of a tiny model."""

linux = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at processes in /proc")


def wait_for(condition: Callable[[], Any], seconds: float = PATIENCE) -> None:
    """Wait until the condition holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def wait_for_state(run: Run, state: str) -> None:
    wait_for(lambda: run.state == state or run.state == "failed")
    assert run.state == state, run.log_path.read_text()


def alive(pid: int) -> bool:
    """Whether there is such a process, be it a zombie."""
    return Path(f"/proc/{pid}").exists()


def worker_pid(run: Run) -> int:
    """The process that holds the run."""
    wait_for(lambda: run.held, 30)
    wait_for(lambda: "pid" in locks.holder(run.lock_path), 5)
    return int(locks.holder(run.lock_path)["pid"])


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> dict[str, Any]:
    """A short training of a tiny model on the CPU."""
    rows = tmp_path_factory.mktemp("data") / "rows.jsonl"
    words = ("apple", "pear", "fig", "plum", "kiwi", "lime", "date", "nut")
    rows.write_text(
        "".join(json.dumps({"prompt": f"say {a} {b}", "completion": f"{b} {a}"}) + "\n" for a in words for b in words)
    )
    return {
        "model": {"name": str(tiny_folder), "device": "cpu"},
        "data": {"path": str(rows), "eval_fraction": 0.05},
        "adapter": {"router": "dynmole", "num_experts": 2, "r": 2},
        "training": {"max_steps": 40, "save_steps": 5, "per_device_train_batch_size": 4, "warmup_steps": 2},
    }


@pytest.fixture
def make(home: Path, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Run]]:
    """`make(name)`: a run that has not started. Every process it gets is gone after the test."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    yield lambda name: runs.create(RunConfig.from_dict({"name": name, **settings}))
    for run in runs.list_runs():
        while run.held:
            os.kill(worker_pid(run), signal.SIGKILL)
            time.sleep(0.1)


@pytest.fixture
def busy_cpu(home: Path) -> Iterator[locks.Lock]:
    """Somebody else's lock on the CPU: runs started meanwhile wait in line."""
    path = runs.device_lock_path("cpu")
    path.parent.mkdir()
    lock = locks.acquire(path)
    assert lock is not None
    with lock:
        yield lock


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, settings: dict[str, Any]) -> bytes:
    """The adapter's weights after a training that nothing disturbed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOLE_HOME", str(tmp_path_factory.mktemp("undisturbed")))
        patch.setenv("OMP_NUM_THREADS", "1")
        run = runs.create(RunConfig.from_dict({"name": "whole", **settings}))
        runs.start(run)
        wait_for_state(run, "finished")
        return (run.adapter_dir / "adapter_model.safetensors").read_bytes()


def mole(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "mole.cli", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


# Killed and stopped


@pytest.mark.slow
def test_a_killed_run_is_interrupted_and_resumes_to_the_same_weights(
    make: Callable[[str], Run], uninterrupted: bytes
) -> None:
    run = make("killed")
    runs.start(run)
    wait_for(lambda: run.step >= 13 or run.state == "failed")
    os.kill(worker_pid(run), signal.SIGKILL)
    wait_for(lambda: not run.held, 10)
    reached = run.step
    assert run.state == "interrupted"
    assert "mole runs resume killed" in run.details()["advice"]
    assert not run.adapter_dir.exists()

    runs.start(run, resume=True)
    wait_for_state(run, "finished")
    again = [event for event in run.events() if event["type"] == "started"][1]
    assert again["resumed_from"]
    assert reached - again["step"] <= 5
    checkpoint.verify(run.adapter_dir)
    assert (run.adapter_dir / "adapter_model.safetensors").read_bytes() == uninterrupted


@pytest.mark.slow
def test_ctrl_c_saves_and_stops_and_resume_ends_with_the_same_weights(
    make: Callable[[str], Run], settings: dict[str, Any], tmp_path: Path, uninterrupted: bytes
) -> None:
    make("template")
    process = mole("train", "--config", str(runs.get("template").config_path), "--name", "stopped")
    wait_for(lambda: (runs.runs_dir() / "stopped").exists() and runs.get("stopped").step >= 7)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    run = runs.get("stopped")
    assert process.returncode == 0, err
    assert run.state == "stopped"
    assert f"Stopped at step {run.step}. Continue: mole runs resume stopped" in out
    assert run.step < 40
    assert checkpoint.newest_good(run.checkpoints_dir) == run.checkpoints_dir / f"step-{run.step}"
    assert "Traceback" not in err

    out, err = mole("runs", "resume", "stopped").communicate(timeout=PATIENCE)
    assert run.state == "finished", err
    assert f"Adapter: {run.adapter_dir}" in out
    assert "mole chat stopped" in out
    assert (run.adapter_dir / "adapter_model.safetensors").read_bytes() == uninterrupted


@pytest.mark.slow
def test_data_that_is_gone_fails_with_its_name_and_no_traceback(make: Callable[[str], Run], tmp_path: Path) -> None:
    config = make("template").config
    rows = tmp_path / "gone.jsonl"
    rows.write_text("")
    config.data.path, config.name = str(rows), "failing"
    run = runs.create(config)
    rows.unlink()
    runs.enqueue(run)
    answer = subprocess.run([sys.executable, "-m", "mole.training.worker", "failing"], capture_output=True, text=True)
    assert answer.returncode == 2
    assert run.state == "failed"
    assert "gone.jsonl" in run.details()["error"]
    assert "Traceback" in run.log_path.read_text()
    assert "Traceback" not in answer.stderr


# The detached process


@pytest.mark.timed
@linux
def test_the_worker_stands_alone_and_leaves_no_zombie(make: Callable[[str], Run], busy_cpu: locks.Lock) -> None:
    run = make("alone")
    began = time.monotonic()
    runs.start(run)
    assert time.monotonic() - began < 2
    assert run.state == "queued"
    pid = worker_pid(run)
    assert os.getsid(pid) == pid
    assert os.readlink(f"/proc/{pid}/cwd") == str(runs.home())
    environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    assert any(entry.startswith(f"PYTHONPATH={ROOT}:".encode()) for entry in environment), "it runs the same sources"
    files = {os.readlink(file) for file in Path(f"/proc/{pid}/fd").iterdir()}
    assert files <= {"/dev/null", str(run.log_path), str(run.lock_path)}
    assert "libtorch" not in Path(f"/proc/{pid}/maps").read_text()

    runs.stop(run)
    wait_for(lambda: not alive(pid), 10)
    assert run.state == "stopped"
    assert not run.stop_requested()


@linux
def test_the_worker_outlives_the_one_that_started_it(make: Callable[[str], Run], busy_cpu: locks.Lock) -> None:
    run = make("orphan")
    code = "import time; from mole import runs; runs.start(runs.get('orphan')); print(flush=True); time.sleep(600)"
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, start_new_session=True)
    assert parent.stdout is not None
    parent.stdout.readline()
    pid = worker_pid(run)
    os.killpg(parent.pid, signal.SIGKILL)
    parent.wait()
    time.sleep(0.3)
    assert alive(pid)
    assert run.state == "queued"
    runs.stop(run)
    wait_for(lambda: not alive(pid), 10)
    assert run.state == "stopped"


def test_a_polite_kill_of_a_waiting_run_stops_it(make: Callable[[str], Run], busy_cpu: locks.Lock) -> None:
    run = make("polite")
    runs.start(run)
    pid = worker_pid(run)
    wait_for(lambda: run.last_event["type"] == "queued", 10)
    time.sleep(0.5)
    os.kill(pid, signal.SIGTERM)
    wait_for(lambda: not run.held, 10)
    assert run.state == "stopped"


def test_a_killed_waiting_run_is_still_in_line_and_can_be_woken(
    make: Callable[[str], Run], busy_cpu: locks.Lock, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make("rebooted")
    runs.start(run)
    os.kill(worker_pid(run), signal.SIGKILL)
    wait_for(lambda: not run.held, 10)
    assert run.state == "queued"
    assert runs.wake_queued() == []  # so fresh that its process may just be starting
    monkeypatch.setattr(job, "STARTING_SECONDS", 0.0)
    assert runs.wake_queued() == [run]
    worker_pid(run)
    assert runs.wake_queued() == []


# Two at once


def test_of_many_starts_at_once_one_wins_and_the_others_are_told(
    make: Callable[[str], Run], busy_cpu: locks.Lock
) -> None:
    run = make("wanted")

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


def test_a_second_worker_of_a_run_says_who_holds_it_and_changes_nothing(
    make: Callable[[str], Run], busy_cpu: locks.Lock
) -> None:
    run = make("held")
    runs.start(run)
    pid = worker_pid(run)
    before = run.events()
    answer = subprocess.run([sys.executable, "-m", "mole.training.worker", "held"], capture_output=True, text=True)
    assert answer.returncode == 1
    assert answer.stderr == f"mole: The run held is held by process {pid}.\n"
    assert run.events() == before


@pytest.mark.slow
def test_queued_runs_get_the_device_one_after_the_other_in_order(
    make: Callable[[str], Run], busy_cpu: locks.Lock
) -> None:
    first, cancelled, last = make("b"), make("c"), make("a")
    for run in (first, cancelled, last):
        runs.start(run)
        worker_pid(run)
    assert [run.name for run in runs.waiting_runs("cpu")] == ["b", "c", "a"]
    runs.stop(cancelled)
    wait_for_state(cancelled, "stopped")
    busy_cpu.release()
    wait_for(lambda: first.state == "running", 30)
    assert last.state == "queued"
    assert "run b (process" in locks.describe_holder(runs.device_lock_path("cpu"))
    wait_for_state(last, "finished")
    assert first.state == "finished"
    ended = next(event["time"] for event in first.events() if event["type"] == "finished")
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
