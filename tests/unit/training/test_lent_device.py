"""A device that is given back at some time: the run ends before, and with its adapter."""

from __future__ import annotations

import math
import time
from pathlib import Path

import pytest
from run_configs import run_config

from mole import runs
from mole.core import checkpoint, locks
from mole.core.errors import RunError
from mole.runs.run import Run
from mole.training.lent import LentDevice
from mole.training.worker import perform_on

SAMPLE = Path(__file__).resolve().parents[3] / "assets" / "data" / "skills_train.jsonl"


@pytest.fixture
def waiting(home: Path, tiny_folder: Path) -> Run:
    """A run of six steps that no process has."""
    settings = {"training.max_steps": 6, "training.per_device_train_batch_size": 2, "data.eval_fraction": 0.01}
    return runs.create(run_config("lent", base=tiny_folder, data=SAMPLE, **settings, **{"model.device": "cuda"}))


def test_a_run_whose_time_is_over_ends_after_its_step_with_its_adapter(waiting: Run) -> None:
    perform_on(LentDevice("cpu", time.monotonic()), waiting)
    assert (waiting.state, waiting.step) == ("finished", 1)
    checkpoint.verify(waiting.adapter_dir)
    told = [event for event in waiting.events() if event["type"] in ("eval", "checkpoint", "stopped")]
    assert told == []  # these take time, and no process will go on from here
    assert any("ended after 1 of 6 steps" in notice for notice in waiting.notices())


def test_a_run_that_is_stopped_there_ends_with_its_adapter_too(waiting: Run) -> None:
    waiting.request_stop()
    perform_on(LentDevice("cpu", time.monotonic() + 3600), waiting)
    assert (waiting.state, waiting.step) == ("finished", 1)
    assert not waiting.stop_requested()


def test_a_run_within_its_time_takes_all_steps_and_is_evaluated(waiting: Run) -> None:
    path = runs.device_lock_path("cpu")
    path.parent.mkdir(parents=True)
    lock = locks.acquire(path, run="another")
    assert lock is not None
    with lock:  # of this home's runs, one has the CPU; a lent device is nobody's
        perform_on(LentDevice("cpu", time.monotonic() + 3600), waiting)
    assert (waiting.state, waiting.step) == ("finished", 6)
    assert waiting.last_event["metrics"]["eval_loss"] > 0
    assert not any("ended after" in notice for notice in waiting.notices())
    with pytest.raises(RunError, match="finished and does not wait"):
        perform_on(LentDevice("cpu", math.inf), waiting)
