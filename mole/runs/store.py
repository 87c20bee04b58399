"""The life of runs: create, find, start detached, queue, stop, resume, delete, export.

A run is a folder (`mole.runs.run`). There is no database and no server: every state is derived from locks and files,
so it cannot disagree with them. The command line and the studio share this module. No torch.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
import secrets
import shutil
import sys
import time
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mole.config import ModelConfig, RunConfig
from mole.core import checkpoint, limits, locks, processes
from mole.core.errors import BusyError, ConfigError, MoleError, RunError, writing
from mole.data.readers import local_path, one_line
from mole.runs.run import STATES, WAITING, Run, check_name, home, made_of, number, runs_dir

__all__ = [
    "QUEUE_LIMIT", "STATES", "Run", "acquire_device", "ahead_of", "check_inputs", "check_name", "check_room", "create",
    "delete", "device_lock_path", "device_of", "enqueue", "export", "get", "home", "list_runs", "move", "place_of",
    "queue", "reorder", "runs_dir", "spawn", "start", "stop", "user_of", "wake_queued",
]  # fmt: skip

STARTING_SECONDS = 5.0
"""A queued run this fresh may have a process that has not taken its lock yet."""
QUEUE_LIMIT = limits.QUEUE

# ---------------------------------------------------------------------------------------------------------
# Creating, finding, deleting, exporting


def check_inputs(config: RunConfig) -> None:
    """See that the data can be read and the model is there, before a run is made of them. Raises `InputError`."""
    from mole import models
    from mole.data import encoding

    if not config.data.path:
        raise ConfigError("data.path", "", "a JSON, JSONL, CSV or Parquet file, or a hub id", "Give one with --data.")
    models.resolve(config.model.name)
    encoding.read_examples(config.data.path, config.data.columns)
    if config.data.eval_path:
        encoding.read_examples(config.data.eval_path, config.data.columns, setting="data.eval_path")


@writing()
def create(config: RunConfig, *, number: bool = False) -> Run:
    """Make a run's folder, all of it or nothing, with `run.yaml` and the event `created`.

    Without a name it is called `<router>-<model>-<n>`; with `number`, a name that is taken gets a number too. Paths
    in the config become absolute: the run is trained from another folder. Raises `RunError` when the name is taken.
    """
    config = absolute(config)
    runs_dir().mkdir(parents=True, exist_ok=True)
    if config.name is not None:
        check_name(config.name)
    if config.group is not None:
        check_name(config.group, "group", "group")
    for name in _names(config, number):
        if not (runs_dir() / name).exists() and (run := _claim(name, config)):
            return run
    raise RunError(f"There is a run called {config.name!r} already; choose another name or delete it.", field="name")


def _names(config: RunConfig, number: bool) -> Iterator[str]:
    """The names to try, in order."""
    if config.name is not None:
        yield config.name
        if not number:
            return
        stem, first = config.name[:58], 2
    else:
        model = Path(config.model.name.rstrip("/")).name.removesuffix(".gguf").lower()
        stem, first = f"{config.adapter.router}-{re.sub(r'[^a-z0-9._-]+', '-', model)[:40] or 'model'}", 1
    yield from (f"{stem}-{n}" for n in range(first, 100_000))


def _claim(name: str, config: RunConfig) -> Run | None:
    """The run, made aside and renamed, which fails (None) when somebody took the name meanwhile."""
    aside = runs_dir() / f".new-{name}-{secrets.token_hex(4)}"
    aside.mkdir()
    try:
        made = Run(name, aside)
        made.config_path.write_text(dataclasses.replace(config, name=name).to_yaml(), encoding="utf-8")
        made.append_event("created", 0, **made_of(config))
        checkpoint.sync(made.config_path, made.events_path, aside)
        aside.rename(runs_dir() / name)
        checkpoint.sync(runs_dir(), home())
    except BaseException as error:
        shutil.rmtree(aside, ignore_errors=True)
        if isinstance(error, OSError) and (runs_dir() / name).exists():
            return None
        raise
    return Run(name, runs_dir() / name)


def absolute(config: RunConfig) -> RunConfig:
    """The config with local paths made absolute; hub ids and the embedded model's name stay."""

    def found(name: str) -> str:
        try:
            path = Path(name).expanduser()
            return str(path.absolute()) if name and path.exists() else name
        except (RuntimeError, OSError, ValueError):
            return name

    data, model = config.data, config.model
    data = dataclasses.replace(data, path=found(data.path), eval_path=data.eval_path and found(data.eval_path))
    if model.name != ModelConfig().name:
        model = dataclasses.replace(model, name=found(model.name))
    return dataclasses.replace(config, data=data, model=model)


def get(name: str) -> Run:
    """The run of that name. Raises `RunError` when there is none, or the name is not allowed."""
    path = runs_dir() / check_name(name)
    if path.is_symlink() or not (path / "run.yaml").is_file():
        raise RunError(f"There is no run called {name!r}; `mole runs list` shows those there are.", field="name")
    return Run(name, path)


def list_runs() -> list[Run]:
    """All runs, the oldest first."""
    if not runs_dir().is_dir():
        return []
    found = []
    for path in runs_dir().iterdir():
        try:
            run = get(path.name)
            found.append((run.created, run.name, run))
        except (RunError, OSError):
            continue
    return [run for *_, run in sorted(found, key=lambda item: item[:2])]


@writing()
def delete(run: Run) -> None:
    """Remove a run's folder. Raises `RunError` when a process works on it."""
    try:
        lock = run.lock()
    except BusyError:
        raise RunError(f"The run {run.name} is {run.state}; stop it first: mole runs stop {run.name}") from None
    with lock:
        run.path.rename(runs_dir() / f".deleted-{run.name}-{secrets.token_hex(4)}")
    for leftover in runs_dir().glob(".deleted-*"):
        shutil.rmtree(leftover, ignore_errors=True)


def export(run: Run, dest: str | os.PathLike[str]) -> Path:
    """Copy a finished run's adapter, `run.yaml` and events to a new folder `dest`, or to a new file if it ends in .zip.

    Returns the path written. Raises `RunError` when there is no adapter yet or `dest` exists, `CheckpointError` when
    the adapter does not verify.
    """
    target = local_path(os.fspath(dest)).absolute()
    if not (run.adapter_dir / checkpoint.MANIFEST).is_file():
        raise RunError(f"The run {run.name} is {run.state} and has no adapter yet; export it when it has finished.")
    try:
        if target.exists() or target.is_symlink():
            raise RunError(f"{target} exists already; choose a new path.", field="dest")
        if not target.parent.is_dir():
            raise RunError(f"{target.parent} is not a folder; make it first.", field="dest")
        target.with_name(f".{target.name}-12345678").exists()
    except (OSError, ValueError) as error:
        raise RunError(f"{target} is no path that can be written: {one_line(error)}.", field="dest") from None
    checkpoint.verify(run.adapter_dir)
    files = [path for path in run.adapter_dir.rglob("*") if path.is_file()] + [run.config_path, run.events_path]
    aside = target.with_name(f".{target.name}-{secrets.token_hex(4)}")
    try:
        if target.suffix == ".zip":
            with zipfile.ZipFile(aside, "x", zipfile.ZIP_DEFLATED) as archive:
                for path in files:
                    archive.write(path, path.relative_to(run.path))
        else:
            for path in files:
                copy = aside / path.relative_to(run.path)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, copy)
        aside.rename(target)
    except BaseException:
        shutil.rmtree(aside) if aside.is_dir() else aside.unlink(missing_ok=True)
        raise
    return target


# ---------------------------------------------------------------------------------------------------------
# Starting, stopping, and the queue


@writing()
def enqueue(run: Run, *, resume: bool = False) -> None:
    """Put the run in line for its device, for the process that is about to work on it.

    Raises `BusyError` when it is already worked on or the queue is full, `RunError` when it is not in a state to start
    or resume.
    """
    check_room()
    with run.lock():
        last = run.last_event
        state = run.state_unheld(last)
        if last["type"] == "queued" and _is_fresh(last):
            raise BusyError(f"The run {run.name} is being started already.")
        if state == "finished":
            raise RunError(f"The run {run.name} has finished; train a new one: mole train --config {run.config_path}")
        if state != "queued" and not resume:
            raise RunError(f"The run {run.name} is {state}; continue it with: mole runs resume {run.name}")
        run.clear_stop()
        device = device_of(run.config)
        behind = max((position for position, *_ in _waiting()), default=0.0)  # also when the clock was set back
        position = max(time.time(), math.nextafter(behind, math.inf))
        run.append_event("queued", last["step"], device=device, resume=resume, position=position)


def start(run: Run, *, resume: bool = False) -> None:
    """Start or resume a run in a process of its own that outlives this one; returns at once. Errors as `enqueue`."""
    enqueue(run, resume=resume)
    spawn(run, resume=resume)


@writing()
def spawn(run: Run, *, resume: bool = False) -> None:
    """Start the worker process of a queued run: its own session, no open files of ours, output to `train.log`."""
    processes.detach("mole.training.worker", run.name, *(["--resume"] if resume else []), log=run.log_path)


@writing()
def stop(run: Run) -> None:
    """Ask a running run to save and stop, or take a queued one out of the line. Raises `RunError` in other states."""
    if run.state not in ("queued", "running"):
        raise RunError(f"The run {run.name} is {run.state}; only a queued or running one can be stopped.")
    run.request_stop()
    try:
        lock = run.lock(patience=0.1)
    except BusyError:
        return  # its process sees the request
    with lock:
        if run.last_event["type"] in WAITING:
            run.append_event("stopped", run.step)


def queue(device: str | None = None) -> list[Run]:
    """The runs waiting for a device (any if None), first in line first."""
    return [run for *_, run in _waiting(device)]


def _waiting(device: str | None = None) -> list[tuple[float, str, Run]]:
    """The places, names and runs of `queue`."""
    waiting = []
    for run in list_runs():
        state, last = run.observe()
        if state == "queued" and last["type"] == "queued" and device in (None, last.get("device")):
            if not isinstance(last.get("device"), str):
                continue  # whoever wrote that, it was not us: its process will tell its device anew
            waiting.append((_position(last), run.name, run))
    return sorted(waiting, key=lambda item: item[:2])


def check_room(more: int = 1) -> None:
    """See that so many more runs may wait. Raises `BusyError`."""
    waiting = len(queue())
    if waiting + more > QUEUE_LIMIT:
        raise BusyError(
            f"{waiting} runs wait already and {more} more would pass the queue's limit of {QUEUE_LIMIT}; "
            "let some finish, or take some out: mole runs queue."
        )


@writing()
def reorder(names: Sequence[str]) -> list[Run]:
    """Let these waiting runs take turns in this order, among the places they have; returns the whole queue.

    A run that has begun meanwhile is passed over. Raises `RunError` for a name that is no run, `BusyError` when
    somebody else changes the queue for long.
    """
    asked = [get(name) for name in dict.fromkeys(names)]
    with _line():
        waiting = {run.name for run in queue() if not run.stop_requested()}
        moved = [(run, run.last_event) for run in asked if run.name in waiting]
        moved = [(run, last) for run, last in moved if user_of(last["device"]) != run.name]
        place = 0.0
        for (run, last), free in zip(moved, sorted(_position(last) for _, last in moved), strict=True):
            place = max(free, math.nextafter(place, math.inf))
            if place != _position(last):
                kept = {key: last.get(key) for key in ("device", "resume")}
                run.append_event("queued", last["step"], **kept, position=place, moved=True)
    return queue()


def move(run: Run, place: int) -> list[Run]:
    """Let a waiting run be the `place`-th in line for its device, 1 being the next; returns that line.

    Raises `RunError` when it does not wait, and errors as `reorder`.
    """
    device = str(run.last_event.get("device"))
    line = [other.name for other in queue(device)]
    if run.name not in line:
        raise RunError(f"The run {run.name} is {run.state}; only one that waits in the queue can be moved.")
    line.remove(run.name)
    line.insert(max(place, 1) - 1, run.name)
    reorder(line)
    return queue(device)


def place_of(run: Run) -> tuple[str, float]:
    """A run's device, and where it stands in line for it: smaller is earlier."""
    last = run.last_event
    return str(last.get("device") or device_of(run.config)), _position(last)


def ahead_of(run: Run) -> list[str]:
    """The names of the runs a waiting run waits for: the one on its device, then those before it in line."""
    device, _ = place_of(run)
    line = [user_of(device), *(other.name for other in queue(device))]
    before = line[: line.index(run.name)] if run.name in line else line[:1]
    return [name for name in before if name]


def user_of(device: str) -> str:
    """The name of the run that has the device; empty when it is free."""
    path = device_lock_path(device)
    return str(locks.holder(path).get("run", "")) if locks.is_held(path) else ""


def _position(queued: dict[str, Any]) -> float:
    """A run's place in line, as its last `queued` event has it: the time it was queued, unless it was moved."""
    return number(queued.get("position")) or float(queued["time"])


@contextmanager
def _line(patience: float = 5.0) -> Iterator[None]:
    """Nobody else takes a device or changes the queue within this block. Raises `BusyError`."""
    path = home() / "locks" / "queue.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = locks.acquire(path, patience)
    if lock is None:
        raise BusyError("Somebody else is changing the queue; try again.")
    with lock:
        yield


def wake_queued() -> list[Run]:
    """Start a process for every queued run that has none (after a reboot); returns those runs."""
    woken = []
    for run in list_runs():
        state, last = run.observe()
        if state != "queued" or run.held or _is_fresh(last):
            continue
        try:
            if last["type"] == "created":
                start(run)
            else:
                spawn(run, resume=bool(last.get("resume")))
            woken.append(run)
        except MoleError:
            continue  # somebody else was faster, or its settings cannot be read any more
    return woken


def device_of(config: RunConfig) -> str:
    """The device a run will use, told without torch: `cpu`, `mps` or `cuda:N` with N the machine's own number."""
    device = config.model.device
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if device == "auto":
        has_nvidia = Path("/dev/nvidia0").exists() or Path("/proc/driver/nvidia/gpus").is_dir()
        if has_nvidia and visible not in ("", "-1"):
            device = "cuda"
        else:
            device = "mps" if sys.platform == "darwin" and os.uname().machine == "arm64" else "cpu"
    if device == "cuda":
        return f"cuda:{(visible or '0').split(',')[0].strip()}"
    return device


def device_lock_path(device: str) -> Path:
    """The lock file of a device."""
    return home() / "locks" / f"{re.sub(r'[^A-Za-z0-9]+', '-', device)}.lock"


def acquire_device(device: str, run: Run) -> locks.Lock | None:
    """The lock on a device, if it is free and `run` is first in line for it; None otherwise."""
    path = device_lock_path(device)
    path.parent.mkdir(parents=True, exist_ok=True)
    if locks.is_held(path):
        return None
    try:
        with _line(patience=0.2):  # a run is either moved first and then passed over, or has the device and stays
            line = [other for other in queue(device) if other.held]
            if line and line[0].name != run.name:
                return None
            return locks.acquire(path, patience=0.2, run=run.name)
    except BusyError:
        return None


def _is_fresh(event: dict[str, Any]) -> bool:
    return not event.get("moved") and abs(time.time() - event["time"]) < STARTING_SECONDS
