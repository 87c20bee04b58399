"""Training by visitors of a Space with ZeroGPU: short runs, each on its visitor's quota and visible to them alone.

A visitor's run is an ordinary run whose name no list shows and nobody can guess (`mole.runs.is_unlisted`): who knows
the name can watch, chat with and download it. It is trained by a fork of this process, which has a GPU for that time.
An hour after its end it is deleted, with the uploads that no other run uses.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from app import settings
from app.services import visitor_limits, zerogpu
from app.services.listing import run_row
from app.services.messages import short_message
from mole import runs
from mole.config import RunConfig
from mole.core.errors import BusyError, InputError, MoleError, RunError
from mole.core.paths import local_path
from mole.preflight.data_process import check_inputs
from mole.runs.run import WAITING, Run

MOST_RUNS = 200
"""Visitors' runs kept at a time."""
OWN_RUNS = 20
"""Runs that a page keeps the names of."""
SWEEP_SECONDS = 60.0

log = logging.getLogger("mole")


def is_visitors(name: str) -> bool:
    """Whether this is the name of a visitor's run: one may do with it what its visitor may."""
    return settings.visitors_train() and runs.is_unlisted(name)


def own_runs(names: Any) -> list[Run]:
    """The visitors' runs with these names that still exist, which a page has kept; the oldest first."""
    found = []
    for name in names[-OWN_RUNS:] if isinstance(names, list) else []:
        with contextlib.suppress(RunError):
            if isinstance(name, str) and is_visitors(name):
                found.append(runs.get(name))
    return found


def own_rows(names: Any) -> list[dict[str, Any]]:
    """The rows of these visitors' runs, as in the list of runs."""
    rows = []
    for run in own_runs(names):
        with contextlib.suppress(RunError, OSError):
            rows.append(run_row(run, None))
    return rows


# ---------------------------------------------------------------------------------------------------------
# Training


def create_run(config: Callable[[], RunConfig], own: Any) -> tuple[Run, float]:
    """Check the settings and the data, and create a visitor's run → the run, and the seconds it is estimated to take.

    Args:
        config: gives the settings.
        own: the names of the visitor's runs.

    Raises `BusyError` while one of them has not ended, or when too many are kept, and the errors of the checks.
    """
    checked = config()
    seconds = visitor_limits.check(checked)
    if any(run.state in ("queued", "running") for run in own_runs(own)):
        raise BusyError("Your last run has not ended; one visitor trains one run at a time.")
    if len(runs.folder_names(unlisted=True)) >= MOST_RUNS:
        raise BusyError(f"{MOST_RUNS} runs of visitors are kept already, which is the most; try again in some minutes.")
    check_inputs(checked)
    return runs.create(dataclasses.replace(checked, name=runs.unlisted_name(), group=None)), seconds


def call_seconds(name: str, seconds: float) -> float:
    """The seconds of GPU to ask for, for a run that is estimated to take so long."""
    return min(float(zerogpu.LONGEST), seconds + visitor_limits.SAVING_SECONDS)


@zerogpu.gpu(duration=call_seconds)
def train_here(name: str, seconds: float) -> None:
    """Train a run in this process, a fork with a GPU; what goes wrong is in the run's events."""
    import torch

    from mole.training.lent import LentDevice
    from mole.training.worker import perform_on

    torch.set_num_threads(1)  # the threads that the forked process had are gone, and waiting for them would be for ever
    until = time.monotonic() + call_seconds(name, seconds) - visitor_limits.SAVING_SECONDS
    device = torch.zeros(1, device="cuda").device.type
    with contextlib.suppress(MoleError):
        perform_on(LentDevice(device, until), runs.get(name))


def prepare(model: str) -> None:
    """Import and download what training needs before the fork, in which it would use up the time on the GPU.

    And in a fork an import that another thread has begun would never end.
    """
    import mole.training.trainer  # noqa: F401
    from mole.models.sources import local_folder, resolve

    local_folder(resolve(model))


def train(name: str, seconds: float) -> str:
    """Train a visitor's run to its end, in the context of the visitor's request, whose quota pays for it → its state.

    Raises `RunError` when there is no GPU to be had, which deletes the run, or it was taken away.
    """
    try:
        prepare(runs.get(name).config.model.name)
        train_here(name, seconds)
    except Exception as error:
        reason = short_message(str(getattr(error, "message", error)))
        run = runs.get(name)
        if run.last_event["type"] in WAITING:
            runs.delete(run)
            raise RunError(f"The run was not started: {reason}") from None
        if not isinstance(error, gr.Error):
            log.exception("training a visitor's run")
        raise RunError(f"The run was interrupted, its GPU was taken away: {reason}") from None
    return runs.get(name).state


# ---------------------------------------------------------------------------------------------------------
# Deleting


def start_sweeping() -> None:
    """Delete what visitors left, now and from time to time, as long as this process lives."""
    if settings.visitors_train():
        threading.Thread(target=_sweep_for_ever, daemon=True).start()


def _sweep_for_ever() -> None:
    while True:
        try:
            sweep()
        except Exception:
            log.exception("deleting what visitors left")
        time.sleep(SWEEP_SECONDS)


def sweep() -> None:
    """Delete visitors' runs that ended more than `settings.VISITOR_SECONDS` ago, their downloads, and old uploads."""
    oldest = time.time() - settings.VISITOR_SECONDS
    for run in runs.list_runs(unlisted=True):
        if run.last_event["time"] < oldest and not run.held:
            with contextlib.suppress(MoleError):
                runs.delete(run)
    for file in unused_uploads(runs.list_runs() + runs.list_runs(unlisted=True)):
        with contextlib.suppress(OSError):
            if file.stat().st_mtime < oldest:
                file.unlink()


def unused_uploads(used_by: Sequence[Run]) -> list[Path]:
    """The kept uploads that none of these runs trains on; none if the settings of a run cannot be read."""
    folder, used = settings.uploads_folder().resolve(), set[Path]()
    for run in used_by:
        try:
            data = run.config.data
        except InputError:
            return []
        paths = [*(source.path for source in data.sources), data.eval_path]
        used |= {local_path(path).resolve() for path in paths if path}
    try:
        return [folder / name for name in os.listdir(folder) if folder / name not in used]
    except OSError:
        return []
