"""A run whose base model lies elsewhere now. No torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from mole.config import RunConfig
from mole.core import checkpoint, files
from mole.core.errors import ModelError, RunError, writing
from mole.models.moved import different_files
from mole.models.sources import resolve
from mole.runs import store
from mole.runs.run import Run


@writing()
def move_base(run: Run, name: str) -> Run:
    """Note in `run.yaml` where the base model of an unfinished run is now; returns the run as it is then.

    Raises `ModelError` when there is no model, or another one than the checkpoints are of; `RunError` for a run that
    has finished; `BusyError` while a process holds it.
    """
    files.check_tree(run.path)
    with run.lock():
        if run.state_unheld(run.last_event) == "finished":
            raise RunError(f"The run {run.name} has finished. Chat with it: mole chat {run.name} --base {name}.")
        kept = checkpoint.newest_good(run.checkpoints_dir)
        config = with_base(run.config, name, {} if kept is None else checkpoint.read_manifest(kept).meta)
        text = store.absolute(config).to_yaml()
        checkpoint.write_file(run.config_path, lambda file: file.write_text(text, encoding="utf-8"))
    return store.get(run.name)


def with_base(config: RunConfig, name: str, meta: Mapping[str, Any]) -> RunConfig:
    """The settings with the base model at another place, where it must be the one that a checkpoint notes in `meta`.

    Raises `ModelError`.
    """
    resolve(name)
    noted = meta.get("base")
    if others := different_files(noted if isinstance(noted, dict) else {}, name):
        raise ModelError(
            f"{name} is not the base model that {config.name} was trained on: it has other {', '.join(others)}. "
            "Give the same model, or start a new run.",
            field="base",
        )
    return dataclasses.replace(config, model=dataclasses.replace(config.model, name=name))
