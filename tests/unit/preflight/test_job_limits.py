"""A preflight ends at its limit of processor time, also where a library keeps the interpreter, and of memory."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mole.config import RunConfig
from mole.core import processes
from mole.preflight import job
from mole.preflight.job import PreflightJob
from mole.runs import job as jobs

ROOT = Path(__file__).resolve().parents[3]
LOOP = "while True: pass"
HANG = "sum(range(10**15))"
"""In C, and with the interpreter's lock: no signal's handler gets its turn."""
SCRIPT = """
import sys
from mole.preflight import job
from mole.runs import job as jobs

def work(*arguments, **more):
    {work}

job.CPU_MINUTES = dict.fromkeys(job.CPU_MINUTES, 1 / 60 / {share})
jobs.CPU_GRACE = 2
job.run_estimate = job.run_measurement = work
sys.exit(job.main([{key!r}]))
"""


@pytest.fixture
def check(home: Path, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PreflightJob:
    """A job that was asked for, and whose process has not begun."""
    (tmp_path / "data.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 4)
    config = RunConfig.from_dict({"model": {"name": str(tiny_folder)}, "data": {"path": str(tmp_path / "data.jsonl")}})
    monkeypatch.setattr(job.processes, "detach", lambda *arguments, **more: None)
    found = PreflightJob.of(config)
    found.start(config, "estimate")
    monkeypatch.setattr(jobs, "STARTING_SECONDS", 0.0)
    return found


def process(check: PreflightJob, work: str, kind: str) -> int:
    """Do the job in a process of its own, with a limit of a second → its exit code."""
    check.write("request", **{**check.read("request"), "kind": kind})
    check.tell(kind, "working", "…")
    share = 1 if kind == "estimate" else os.cpu_count() or 1
    script = SCRIPT.format(work=work, key=check.key, share=share)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-c", script], env=environment, timeout=600, check=False).returncode


@pytest.mark.parametrize("kind", ["estimate", "measurement"])
def test_a_job_that_works_for_too_long_says_so_and_ends(kind: str, check: PreflightJob) -> None:
    assert process(check, LOOP, kind) == 1
    state = check.state()
    assert state["phase"] == "failed" and "minutes of work" in state["text"]


@pytest.mark.parametrize(("kind", "phase"), [("estimate", "failed"), ("measurement", "no_memory")])
def test_a_job_that_hangs_where_no_handler_runs_is_killed(kind: str, phase: str, check: PreflightJob) -> None:
    assert process(check, HANG, kind) == -signal.SIGKILL
    assert check.state()["phase"] == phase and not check.alive


def test_an_estimate_has_a_limit_of_memory_too(check: PreflightJob, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def estimate(config: RunConfig) -> Any:
        seen.append(resource.getrlimit(resource.RLIMIT_DATA))
        with pytest.raises(MemoryError):
            bytearray(1 << 50)
        raise ValueError("seen")

    before = resource.getrlimit(resource.RLIMIT_DATA)
    monkeypatch.setattr("mole.preflight.estimate.estimate", estimate)
    monkeypatch.setattr(processes, "Path", lambda path: Path(os.devnull))  # this process stays as likely to be killed
    config = RunConfig.from_dict({"model": {"device": "cpu"}, "data": {"path": "x"}})
    with pytest.raises(ValueError, match="seen"):
        job.run_estimate(check, config, last=True)
    assert 0 < seen[0][0] < 1 << 50
    assert resource.getrlimit(resource.RLIMIT_DATA) == before
