"""The settings of a short run on a tiny model, on the CPU and in float32.

config = run_config("first", base=tiny_folder, data=path, **{"training.max_steps": 3})
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mole.config import RunConfig, apply_overrides


def run_config(name: str, base: Path, data: Path, **settings: Any) -> RunConfig:
    """The settings of a run called `name`; `settings` by their dotted names."""
    here = {"model.name": str(base), "model.device": "cpu", "model.dtype": "float32", "data.path": str(data)}
    return RunConfig.from_dict(apply_overrides({"name": name}, {**here, **settings}))
