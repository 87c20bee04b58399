"""Evaluations in the background: a real tiny run, real processes, real locks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from run_configs import finished_run

from mole import runs
from mole.config import ModelConfig, RunConfig
from mole.core import checkpoint, locks
from mole.core.errors import ConfigError, DataError, RunError
from mole.evaluation import job as evaluation_job
from mole.evaluation.job import Evaluation
from mole.runs import recorded_job
from mole.runs.run import Run

QUESTIONS = [("Convert 3 km to metres.", "3000 m"), ("Sort: pear, apple, fig.", "apple, fig, pear"), ("Rude?", "yes")]
PATIENCE = 240


@pytest.fixture
def data(tmp_path: Path) -> str:
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": question, "completion": answer} for question, answer in QUESTIONS * 4]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture
def run(home: Path, tiny_folder: Path, data: str) -> Run:
    """Its checkpoints are those of steps 2 and 3."""
    return finished_run("tiny", tiny_folder, Path(data), experts=2)


def wait_for(evaluation: Evaluation, wanted: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    until = time.monotonic() + PATIENCE
    while not wanted(status := evaluation.status()):
        assert time.monotonic() < until, status
        time.sleep(0.1)
    return status


def ended(status: dict[str, Any]) -> bool:
    return status["state"] not in evaluation_job.ALIVE


def worker_of(evaluation: Evaluation) -> int:
    return int(locks.holder(evaluation.file("lock"))["pid"])


def lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_the_result_is_that_of_evaluate_for_the_run_and_for_its_checkpoint(run: Run, data: str) -> None:
    from mole.evaluation.evaluate import evaluate_file
    from mole.runs.targets import load_target

    step = checkpoint.steps(run.checkpoints_dir)[0][0]
    results = {}
    for target, name in ((run.name, "final"), (f"{run.name}@{step}", f"step-{step}")):
        evaluation = evaluation_job.start_evaluation(target, data, limit=5)
        status = wait_for(evaluation, ended)
        assert status["state"] == "finished", status
        expected = evaluate_file(load_target(target, ModelConfig(device="cpu", dtype="float32")), data, limit=5)
        assert status["metrics"] == pytest.approx(expected["metrics"]) and status["rows"] == expected["rows"] == 5
        assert (status["checkpoint"], status["data"], status["limit"]) == (name, data, 5)
        assert status["sha256"] == checkpoint.sha256(Path(data)) and status["seconds"] >= 0
        results[name] = status["metrics"]["perplexity"]
    assert len(set(results.values())) == 2, "a checkpoint is not the final adapter"
    assert [one["number"] for one in evaluation_job.list_evaluations(run)] == [2, 1]


def test_it_waits_for_the_device_says_so_and_a_cancelled_one_leaves_no_process(run: Run, data: str) -> None:
    path = runs.device_lock_path("cpu")
    path.parent.mkdir(exist_ok=True)
    device = locks.acquire(path, run="training")
    assert device is not None
    with device:
        waits, cancelled = (
            evaluation_job.start_evaluation(run.name, data, limit=1),
            evaluation_job.start_evaluation(run.name, data),
        )
        for evaluation in (waits, cancelled):
            status = wait_for(evaluation, lambda status: bool(status.get("note")))
            assert status["state"] == "queued" and "run training" in status["note"]
        pid = worker_of(cancelled)
        cancelled.cancel()
        assert wait_for(cancelled, ended)["state"] == "cancelled"
        assert waits.status()["state"] == "queued"
    status = wait_for(waits, ended)
    assert status["state"] == "finished", status
    until = time.monotonic() + 20
    while lives(pid) and time.monotonic() < until:
        time.sleep(0.05)
    assert not lives(pid)
    with pytest.raises(RunError, match="is cancelled"):
        cancelled.cancel()


@pytest.mark.timed
def test_cancelled_while_it_measures_it_ends_at_once(run: Run, data: str) -> None:
    evaluation = evaluation_job.start_evaluation(run.name, data)
    wait_for(evaluation, lambda status: status["state"] == "running")
    pid = worker_of(evaluation)
    evaluation.cancel()
    begun = time.monotonic()
    assert wait_for(evaluation, ended)["state"] == "cancelled"
    assert time.monotonic() - begun < 10
    assert not locks.is_held(runs.device_lock_path("cpu"))
    while lives(pid):
        time.sleep(0.05)  # the test's own time limit ends this


def test_a_killed_one_is_failed_and_says_what_to_do(run: Run, data: str) -> None:
    evaluation = evaluation_job.start_evaluation(run.name, data)
    wait_for(evaluation, lambda status: status["state"] == "running")
    os.kill(worker_of(evaluation), 9)
    status = wait_for(evaluation, ended)
    assert status["state"] == "failed" and "Start it again" in status["error"]


def test_what_goes_wrong_in_the_process_is_said_in_one_line(run: Run, data: str) -> None:
    evaluation = recorded_job.claim(Evaluation, run, recorded_job.new_record(run.name, data, None, ""), columns={})
    (run.adapter_dir / "adapter_model.safetensors").write_bytes(b"broken")
    with pytest.raises(Exception, match="adapter_model.safetensors"):
        evaluation_job.perform(evaluation)
    status = evaluation.status()
    assert status["state"] == "failed" and "\n" not in status["error"]


def test_nothing_starts_on_bad_input(run: Run, data: str, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": ', encoding="utf-8")
    with pytest.raises(DataError, match="line 2") as caught:
        evaluation_job.start_evaluation(run.name, str(tmp_path / "bad.jsonl"))
    assert caught.value.field == "data"
    with pytest.raises(DataError, match=r"nowhere\.jsonl"):
        evaluation_job.start_evaluation(run.name, "nowhere.jsonl")
    with pytest.raises(ConfigError, match="limit is 0"):
        evaluation_job.start_evaluation(run.name, data, limit=0)
    with pytest.raises(RunError, match="99"):
        evaluation_job.start_evaluation(f"{run.name}@99", data)
    assert evaluation_job.evaluations_of(run) == []


def test_the_runs_own_column_names_are_used_where_the_data_has_them(run: Run, data: str, tmp_path: Path) -> None:
    text = run.config_path.read_text(encoding="utf-8")
    run.config_path.write_text(text.replace("columns: {}", "columns: {prompt: ask, completion: say}"), encoding="utf-8")
    own = tmp_path / "own.jsonl"
    own.write_text(json.dumps({"ask": "a", "say": "b"}), encoding="utf-8")
    fresh = runs.get(run.name)
    assert evaluation_job.data_columns(fresh, str(own), None)[0] == {"prompt": "ask", "completion": "say"}
    assert evaluation_job.data_columns(fresh, data, None)[0] == {}


def test_deleting_the_run_ends_its_evaluation_without_a_trace(run: Run, data: str) -> None:
    path = runs.device_lock_path("cpu")
    path.parent.mkdir(exist_ok=True)
    device = locks.acquire(path, run="training")
    assert device is not None
    with device:
        evaluation = evaluation_job.start_evaluation(run.name, data)
        wait_for(evaluation, lambda status: bool(status.get("note")))
        pid = worker_of(evaluation)
        runs.delete(run)
    until = time.monotonic() + PATIENCE
    while lives(pid) and time.monotonic() < until:
        time.sleep(0.1)
    assert not lives(pid) and not run.path.exists()


HANGS = """
import sys
from mole.evaluation import job
from mole.runs import job as jobs

def hang(evaluation):
    sum(range(10**15))  # in C, and with the interpreter's lock: no signal's handler gets its turn

job.CPU_MINUTES, jobs.CPU_GRACE = 0.01, 1
job.perform = hang
sys.exit(job.main([{name!r}, "1"]))
"""


def test_an_evaluation_that_hangs_ends_at_its_limit_of_processor_time(home: Path, data: str) -> None:
    runs.create(RunConfig.from_dict({"name": "tiny", "data": {"path": data}}))
    code = [sys.executable, "-c", HANGS.format(name="tiny")]
    assert subprocess.run(code, timeout=600, check=False).returncode == -signal.SIGKILL
