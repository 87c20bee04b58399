"""The studio is killed, with its whole process group, and another takes its place: the run never notices."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from forks import ROOT, Make, Whole, finish, processes_of, session_of, wait_for
from serving import free_port
from test_killed import check_finished, check_killed

from mole import runs
from mole.core import checkpoint
from mole.runs.run import Run


@contextmanager
def studio(home: Path) -> Iterator[tuple[subprocess.Popen[bytes], Any]]:
    """A real studio, in a process group of its own, and a client of it."""
    from gradio_client import Client

    port = free_port()
    with (home / "studio.log").open("ab") as log:
        command = [sys.executable, "-m", "mole.cli", "studio", "--port", str(port)]
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, start_new_session=True)
    try:
        wait_for(lambda: is_served(f"http://127.0.0.1:{port}"))
        yield process, Client(f"http://127.0.0.1:{port}", verbose=False)
    finally:
        process.kill()
        process.wait()


def is_served(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=5).read()
    except OSError:
        return False
    return True


def goes_on(run: Run, steps: int = 5) -> None:
    """See that a run does some more steps."""
    before = run.step
    wait_for(lambda: run.step >= before + steps or run.state != "running")
    assert run.state == "running", run.log_path.read_text()


def trainer(run: Run) -> int:
    """The process that trains it, which is the first of its session."""
    pid = [int(event["pid"]) for event in run.events() if event["type"] == "started"][-1]
    assert pid in session_of(pid) and os.getsid(pid) == pid
    return pid


@pytest.mark.slow
def test_a_run_outlives_its_studio_and_obeys_the_next_one(home: Path, make_tiny: Make) -> None:
    template = make_tiny("template", **{"training.max_steps": 1_000_000})
    config = {**template.config.to_dict(), "name": "survivor"}
    runs.delete(template)
    with studio(home) as (first, client):
        client.predict(config, api_name="/start_run")
        run = runs.get("survivor")
        wait_for(lambda: run.step >= 3 or run.state == "failed")
        begun = trainer(run)
        os.kill(first.pid, signal.SIGSTOP)
        goes_on(run)
        os.kill(first.pid, signal.SIGCONT)
        assert client.predict("survivor", api_name="/show_run")["step"] > 3, "a suspended studio misses nothing"
        os.killpg(first.pid, signal.SIGKILL)
        first.wait()
    goes_on(run)
    assert trainer(run) == begun
    wait_for(lambda: processes_of(home) == session_of(begun))  # the studio is gone, the run is all that is left

    os.kill(begun, signal.SIGSTOP)  # it need not train while the next studio starts
    with studio(home) as (second, client):
        os.kill(begun, signal.SIGCONT)
        assert client.predict("survivor", api_name="/show_run")["state"] == "running"
        client.predict("survivor", api_name="/stop_run")
        wait_for(lambda: not session_of(begun))
        assert run.state == "stopped"
        stopped = run.step
        assert checkpoint.newest_good(run.checkpoints_dir) == run.checkpoints_dir / f"step-{stopped}"

        client.predict("survivor", api_name="/resume_run")
        wait_for(lambda: (run.state == "running" and run.step > stopped) or run.state == "failed")
        goes_on(run)
        assert [event["step"] for event in run.events() if event["type"] == "started"] == [0, stopped]
        resumed = trainer(run)
        subprocess.run([sys.executable, "-m", "mole.cli", "runs", "stop", "survivor"], check=True)
        wait_for(lambda: not session_of(resumed))
        assert run.state == "stopped"
        assert processes_of(home) == {second.pid}, "no orphan, and no zombie of the studio's"
    assert not processes_of(home)


@pytest.mark.slow
def test_killed_moments_after_mole_train_detach_it_resumes_to_the_same_bits(
    home: Path, make_tiny: Make, whole: Whole
) -> None:
    """The real detached process is killed while python starts, while torch is imported, and while it trains."""
    template = make_tiny("template")
    runs.stop(template)
    train = ["train", "--config", str(template.config_path), "--name", "detached", "--detach"]
    command = [sys.executable, "-m", "mole.cli", *train]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout == "detached\n"
    run = runs.get("detached")
    for reached in (
        lambda: bool(processes_of(home)),
        lambda: run.last_event["type"] == "starting",
        lambda: run.step >= 4,
    ):
        wait_for(reached)
        for pid in processes_of(home):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        wait_for(lambda: not processes_of(home) and not run.held)
        check_killed(run)
        if run.step < 4:
            runs.start(run, resume=True)
    finish(run)
    check_finished(run, whole)
