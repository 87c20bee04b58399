"""What the page and programs may do to runs; on a Space only to the visitor's own. All raise `MoleError`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from app import settings
from app.services import visitors
from mole import runs
from mole.config import RunConfig, coerce
from mole.preflight.data_process import check_inputs
from mole.runs.run import Run
from mole.training.continuing import continue_run


def start_new_run(config: Callable[[], RunConfig]) -> Run:
    """Check the settings, the model and the data, then create the run and start it in the background.

    `config` is called after the Space rule is checked, so that a visitor's settings are never looked into.
    """
    settings.forbid_on_space()
    checked = config()
    check_inputs(checked)
    runs.check_room()
    run = runs.create(checked)
    runs.start(run)
    return run


def check_may_change(name: str) -> None:
    """Raise `RunError` on a Space, but for a visitor's run: who knows its name may stop and delete it."""
    if not visitors.is_visitors(name):
        settings.forbid_on_space()


def stop_training(name: str) -> None:
    """Ask a run to save and stop; a queued one leaves the queue."""
    check_may_change(name)
    runs.stop(runs.get(name))


def resume_training(name: str) -> None:
    """Continue a stopped, interrupted or failed run from its last checkpoint."""
    settings.forbid_on_space()
    runs.start(runs.get(name), resume=True)


def continue_training(name: str, steps: Any, schedule: str = "restart") -> Run:
    """Train a finished run for `steps` more steps, as a new run in the background; returns that run."""
    settings.forbid_on_space()
    runs.check_room()
    run = continue_run(runs.get(name), coerce(int, steps, "steps"), coerce(str, schedule, "schedule"))
    runs.start(run, resume=True)
    return run


def delete_for_good(name: str) -> None:
    """Delete a run with its checkpoints and its adapter."""
    check_may_change(name)
    runs.delete(runs.get(name))


def import_archive(path: str) -> tuple[Run, list[str]]:
    """Take an exported run back; a taken name gets a number. See `mole.runs.import_run`."""
    settings.forbid_on_space()
    return runs.import_run(path, number=True)


def move_in_queue(name: str, by: int) -> None:
    """Move a waiting run by so many places; −1 is one place nearer to its start."""
    settings.forbid_on_space()
    run = runs.get(name)
    line = [other.name for other in runs.waiting_runs(runs.place_in_queue(run)[0])]
    runs.move(run, (line.index(name) + 1 if name in line else 0) + by)
