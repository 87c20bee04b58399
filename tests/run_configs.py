"""A short run on a tiny model, on the CPU and in float32: its settings, or the whole of it, finished.

config = run_config("first", base=tiny_folder, data=path, **{"training.max_steps": 3})
run = finished_run("tiny", base=tiny_folder, data=path, experts=3)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mole import runs
from mole.config import RunConfig, apply_overrides
from mole.runs.run import Run
from mole.training import worker


def run_config(name: str, base: Path, data: Path, **settings: Any) -> RunConfig:
    """The settings of a run called `name`; `settings` by their dotted names."""
    here = {"model.name": str(base), "model.device": "cpu", "model.dtype": "float32", "data.path": str(data)}
    return RunConfig.from_dict(apply_overrides({"name": name}, {**here, **settings}))


def finished_run(name: str, base: Path, data: Path, experts: int, **settings: Any) -> Run:
    """A finished run of three steps with a top-k router, and checkpoints at steps 2 and 3."""
    short = {
        "data.eval_fraction": 0.0, "adapter.router": "topk", "adapter.num_experts": experts, "adapter.r": 2,
        "training.max_steps": 3, "training.per_device_train_batch_size": 2, "training.save_steps": 2,
        "training.learning_rate": 0.05,
    }  # fmt: skip
    run = runs.create(run_config(name, base, data, **{**short, **settings}))
    runs.enqueue(run)
    worker.perform(run)
    assert run.state == "finished"
    return run
