"""Longer training of a finished run: a new run that begins with its last checkpoint and its curves. No torch.

The finished run stays as it is: what was measured, exported or compared is still what it was, whatever becomes of the
longer one, which from its first moment is a stopped run like any other.
"""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

from mole.config import TrainingConfig
from mole.core import checkpoint, files
from mole.core.errors import ConfigError, RunError, writing
from mole.models.moved import check_base
from mole.runs import store
from mole.runs.event_reader import EventReader, lines_of, parse_without_routing
from mole.runs.run import Run
from mole.runs.targets import MOVED
from mole.training.moving import with_base
from mole.training.resume import as_begun, changed_settings, refuse_changes

SCHEDULES = ("restart", "extend")
CURVES = ("started", "data", "step", "eval")
"""The events that the longer run begins with."""


@writing()
def continue_run(
    run: Run, steps: int, schedule: str = "restart", name: str | None = None, base: str | None = None
) -> Run:
    """Make the run that trains a finished one for `steps` more steps; it is stopped at the finished one's last step.

    Args:
        run: the finished run; it stays as it is.
        steps: further optimizer steps.
        schedule: `restart`: warm-up and decay of the learning rate begin again; `extend`: the learning rate goes on as
            if the run had been planned that long.
        name: the new run's name; that of the finished run with a number if None.
        base: where the base model is now; None where it was.

    Raises:
        ModelError: there is no base model, or another one.
        RunError: the run has not finished, its last checkpoint is gone, or the new name is taken or not allowed.
        ConfigError: a setting is not allowed, or the number of steps.
        CheckpointError: the run's settings have changed since it was trained.
    """
    if schedule not in SCHEDULES:
        raise ConfigError("schedule", schedule, f"one of: {', '.join(SCHEDULES)}")
    if (state := run.state) != "finished":
        how = "Resume it" if state in ("stopped", "interrupted", "failed", "imported") else "Wait until it has finished"
        command = f": mole runs resume {run.name}" if how == "Resume it" else ""
        raise RunError(f"The run {run.name} is {state}; only a finished one can be continued. {how}{command}.")
    files.check_tree(run.path)
    with run.lock():
        source = last_checkpoint(run)
        before = checkpoint.read_manifest(source).meta
        config = as_begun(run.config, before)
        refuse_changes(changed_settings(before["config"], config.to_dict()), "continued")
        if base is None:
            check_base(config.model.name, MOVED.format(target=run.name))
        else:
            config = with_base(config, base, before)
        done = checkpoint.read_manifest(source).step
        longer = dataclasses.replace(
            config, name=name or run.name, group=None, training=longer_training(config.training, done, steps, schedule)
        )

        def fill(made: Run) -> None:
            copy_checkpoint(source, made, {**before, "config": longer.to_dict()}, done)
            copy_curves(run, made)
            made.append_event("stopped", done)

        return store.create(longer, number=name is None, fill=fill, continues=run.name, begun=run.begun)


def last_checkpoint(run: Run) -> Path:
    """The checkpoint of a finished run's last step. Raises `RunError` when it is gone or damaged."""
    done = checkpoint.read_manifest(run.adapter_dir).step
    found = checkpoint.newest_good(run.checkpoints_dir)
    if found is None or checkpoint.read_manifest(found).step != done:
        raise RunError(
            f"The run {run.name} cannot be continued: the checkpoint of its last step is gone or damaged "
            f"({run.checkpoints_dir}/step-{done}). Train longer from the start: "
            f"mole train --config {run.config_path} --steps N."
        )
    return found


def longer_training(training: TrainingConfig, done: int, steps: int, schedule: str) -> TrainingConfig:
    """The settings of a training that goes on for `steps` more steps after `done`. Raises `ConfigError`."""
    if steps < 1:
        raise ConfigError("steps", steps, "a whole number of at least 1")
    restarts = [step for step in training.lr_restarts or [] if step < done]
    if schedule == "restart":
        restarts.append(done)
    return dataclasses.replace(training, max_steps=done + steps, lr_restarts=restarts or None)


def copy_checkpoint(source: Path, made: Run, meta: dict[str, Any], step: int) -> None:
    """Copy a checkpoint to another run, with what it notes of that run."""

    def writer(folder: Path) -> None:
        shutil.copytree(source, folder, ignore=shutil.ignore_patterns(checkpoint.MANIFEST), dirs_exist_ok=True)

    checkpoint.write(made.checkpoints_dir, step, writer, meta)


def copy_curves(run: Run, made: Run) -> None:
    """Copy the events of a run's curves to another run."""
    reader = EventReader(run.events_path)
    reader.refresh()
    with open(made.events_path, "ab", opener=files.unlinked) as file:
        while not reader.at_end:
            for _, line in lines_of(*reader.next_block()):
                event, _ = parse_without_routing(line)
                if event is not None and event["type"] in CURVES:
                    file.write(line + b"\n")
