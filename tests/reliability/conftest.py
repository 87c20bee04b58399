"""What the attacks on runs share: a tiny run, and what it comes to when nothing disturbs it."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from contextlib import suppress
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest
from forks import ROOT, SAVE_STEPS, STEPS, Attempt, Make, Whole, wait_for, weights

from mole import runs
from mole.config import RunConfig
from mole.core import locks
from mole.runs import job
from mole.runs.run import Run

WORDS = ("apple", "pear", "fig", "plum", "kiwi", "lime", "date", "nut")

ONE_THREAD = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
"""Then every sum comes out the same."""


@pytest.fixture(scope="session")
def server() -> None:
    """The fork server, started with no home, so that nobody takes it for a process of his."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**ONE_THREAD, "PYTHONPATH": f"{ROOT}{os.pathsep}{Path(__file__).parent}"}.items():
            patch.setenv(name, value)
        patch.delenv("MOLE_HOME", raising=False)
        forkserver.ensure_running()


@pytest.fixture(scope="module", autouse=True)
def one_thread(server: None) -> Iterator[None]:
    """For what the tests of a module start."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ONE_THREAD.items():
            patch.setenv(name, value)
        yield


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> dict[str, Any]:
    """A training of a tiny model on the CPU: twelve steps, a checkpoint every three."""
    rows = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    pairs = [{"prompt": f"say {a} {b}", "completion": f"{b} {a}"} for a in WORDS for b in WORDS]
    rows.write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
    return {
        "model": {"name": str(tiny_folder), "device": "cpu", "dtype": "float32"},
        "data": {"path": str(rows), "eval_fraction": 0.05},
        "adapter": {"router": "dynmole", "num_experts": 2, "r": 2, "lora_dropout": 0.1},
        "training": {
            "max_steps": STEPS, "save_steps": SAVE_STEPS, "per_device_train_batch_size": 4, "warmup_steps": 2,
        },
    }  # fmt: skip


@pytest.fixture
def make_tiny(home: Path, tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    """`make_tiny(name, **{"training.save_total_limit": 1})`: a tiny run that has not started.

    No process of such a run outlives the test.
    """
    monkeypatch.setattr(job, "STARTING_SECONDS", 0.0)  # a run is resumed as soon as its process is dead

    def make(name: str | None = None, **changes: Any) -> Run:
        values = {section: dict(settings) for section, settings in tiny.items()}
        for dotted, value in changes.items():
            section, _, key = dotted.partition(".")
            values[section][key] = value
        return runs.create(RunConfig.from_dict({"name": name, **values}))

    yield make
    for run in runs.list_runs():
        wait_for(lambda run=run: not run.held or end_holder(run))


def end_holder(run: Run) -> None:
    """SIGKILL to the process that holds a run's lock."""
    pid = locks.holder(run.lock_path).get("pid", os.getpid())
    if pid != os.getpid():
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@pytest.fixture
def busy_cpu(home: Path) -> Iterator[locks.Lock]:
    """Another process's lock on the CPU: a run that is started waits in line, and imports no torch."""
    path = runs.device_lock_path("cpu")
    path.parent.mkdir(exist_ok=True)
    lock = locks.acquire(path, run="elsewhere")
    assert lock is not None
    with lock:
        yield lock


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny: dict[str, Any], server: None) -> Whole:
    """The tiny run, undisturbed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOLE_HOME", str(tmp_path_factory.mktemp("undisturbed")))
        run, used = runs.create(RunConfig.from_dict(tiny)), 0.0
        attempt = Attempt(run)
        while not attempt.ended(0.005):
            used = max(used, attempt.cpu_seconds())
        assert attempt.code() == 0, run.log_path.read_text()
        return Whole(weights(run), used)
