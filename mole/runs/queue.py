"""Starting and stopping runs, and the queue in which they wait for their device.

There is no server: a queued run is a small waiting process, and positions in the queue are events in the runs' folders.
No torch.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from mole.config import RunConfig
from mole.core import files, limits, locks, processes
from mole.core.devices import is_physical_device, physical_device
from mole.core.errors import BusyError, MoleError, RunError, writing
from mole.core.paths import device_lock_path, home, make_folder
from mole.core.text import duration_text
from mole.runs import job
from mole.runs.event_reader import number
from mole.runs.run import WAITING, Run
from mole.runs.store import get, list_runs

QUEUE_LIMIT = limits.QUEUE
STOP_SECONDS = 60.0
"""A run that has not stopped so long after a request may hang; whoever asks again is told how to end it."""


@writing()
def enqueue(run: Run, *, resume: bool = False) -> None:
    """Put the run into the queue of its device, for the process that is about to train it.

    Raises `BusyError` when another process holds it or the queue is full, `RunError` when its state does not allow to
    start or resume it.
    """
    check_room()
    files.check_tree(run.path)
    with run.lock():
        last = run.last_event
        state = run.state_unheld(last)
        if last["type"] == "queued" and _is_starting(last):
            raise BusyError(f"The run {run.name} is being started already.")
        if state == "finished":
            raise RunError(
                f"The run {run.name} has finished. Train it for longer: mole runs continue {run.name} --steps N."
            )
        if state != "queued" and not resume:
            raise RunError(f"The run {run.name} is {state}; continue it with: mole runs resume {run.name}.")
        run.clear_stop()
        device = device_of(run.config)
        # larger than all others, also after the clock was set back
        behind = max((position for position, *_ in _waiting()), default=0.0)
        position = max(time.time(), math.nextafter(behind, math.inf))
        run.append_event("queued", last["step"], device=device, resume=resume, position=position)


def start(run: Run, *, resume: bool = False) -> None:
    """Start or resume a run in a process of its own that outlives this one; returns at once. Errors as `enqueue`."""
    enqueue(run, resume=resume)
    spawn(run, resume=resume)


@writing()
def spawn(run: Run, *, resume: bool = False) -> None:
    """Start the worker process of a queued run: its own session, no inherited files, output to `train.log`."""
    processes.detach("mole.training.worker", run.name, *(["--resume"] if resume else []), log=run.log_path)


@writing()
def stop(run: Run) -> None:
    """Ask a running run to save and stop, or remove a queued one from the queue.

    A suspended process is continued, so that it can. Raises `RunError` in other states, and `BusyError` with the
    process to kill if it has not heeded an earlier request.
    """
    if run.state not in ("queued", "running"):
        raise RunError(f"The run {run.name} is {run.state}; only a queued or running one can be stopped.")
    asked = run.stop_requested_at()
    run.request_stop()
    try:
        lock = run.lock(patience=0.1)
    except BusyError:
        if locks.suspended_holder(run.lock_path):
            job.signal_holder(run.lock_path, signal.SIGCONT)
            return
        if asked is None or (waited := time.time() - asked) < STOP_SECONDS:
            return  # its process sees the request
        raise BusyError(
            f"The run {run.name} was asked to stop {duration_text(waited)} ago and still works: a step can take long. "
            f"If it hangs, end its process: kill -9 {locks.holder(run.lock_path).get('pid', 'PID')}; its checkpoints "
            f"stay. Continue it then: mole runs resume {run.name}."
        ) from None
    with lock:
        if run.last_event["type"] in WAITING:
            run.append_event("stopped", run.step)


def waiting_runs(device: str | None = None) -> list[Run]:
    """The runs that wait for a device (any device if None), the next one first."""
    return [run for *_, run in _waiting(device)]


def _waiting(device: str | None = None) -> list[tuple[float, str, Run]]:
    """The positions, names and runs of `waiting_runs`."""
    waiting = []
    for run in list_runs():
        state, last = run.observe()
        if state == "queued" and last["type"] == "queued" and device in (None, last.get("device")):
            if not is_physical_device(last.get("device")):
                continue  # not written by this program; its process will name its device again
            waiting.append((_position(last), run.name, run))
    return sorted(waiting, key=lambda item: item[:2])


def check_room(more: int = 1) -> None:
    """Check that the queue has room for so many more runs. Raises `BusyError`."""
    waiting = len(waiting_runs())
    if waiting + more > QUEUE_LIMIT:
        raise BusyError(
            f"{waiting} runs wait already and {more} more would exceed the queue's limit of {QUEUE_LIMIT}; "
            "let some finish, or stop some: mole runs queue."
        )


@writing()
def reorder(names: Sequence[str]) -> list[Run]:
    """Put these waiting runs into this order, among the positions they have; returns the whole queue.

    A run that has started in the meantime is skipped. Raises `RunError` for a name that is no run, `BusyError` when
    another process keeps changing the queue.
    """
    asked = [get(name) for name in dict.fromkeys(names)]
    with _line():
        waiting = {run.name for run in waiting_runs() if not run.stop_requested()}
        moved = [(run, run.last_event) for run in asked if run.name in waiting]
        moved = [(run, last) for run, last in moved if device_user(last["device"]) != run.name]
        place = 0.0
        for (run, last), free in zip(moved, sorted(_position(last) for _, last in moved), strict=True):
            place = max(free, math.nextafter(place, math.inf))
            if place != _position(last):
                kept = {key: last.get(key) for key in ("device", "resume")}
                run.append_event("queued", last["step"], **kept, position=place, moved=True)
    return waiting_runs()


def move(run: Run, place: int) -> list[Run]:
    """Move a waiting run to position `place` in its device's queue, 1 being the next; returns that queue.

    Raises `RunError` when it does not wait, and the errors of `reorder`.
    """
    device = str(run.last_event.get("device"))
    line = [other.name for other in waiting_runs(device)]
    if run.name not in line:
        raise RunError(f"The run {run.name} is {run.state}; only one that waits in the queue can be moved.")
    line.remove(run.name)
    line.insert(max(place, 1) - 1, run.name)
    reorder(line)
    return waiting_runs(device)


def place_in_queue(run: Run) -> tuple[str, float]:
    """A run's device, and its position in the queue: smaller is earlier."""
    last = run.last_event
    device = last.get("device")
    return device if is_physical_device(device) else device_of(run.config), _position(last)


def ahead_of(run: Run) -> list[str]:
    """The names of the runs a waiting run waits for: the one on its device, then those ahead of it."""
    device, _ = place_in_queue(run)
    line = [device_user(device), *(other.name for other in waiting_runs(device))]
    before = line[: line.index(run.name)] if run.name in line else line[:1]
    return [name for name in before if name]


def device_user(device: str) -> str:
    """The name of the run that has the device; empty when it is free."""
    path = device_lock_path(device)
    return str(locks.holder(path).get("run", "")) if locks.is_held(path) else ""


def _position(queued: dict[str, Any]) -> float:
    """A run's position, from its last `queued` event: the time it was queued, unless it was moved."""
    return number(queued.get("position")) or float(queued["time"])


@contextmanager
def _line(patience: float = 5.0) -> Iterator[None]:
    """A block in which no other process takes a device or changes the queue. Raises `BusyError`."""
    path = home() / "locks" / "queue.lock"
    make_folder(path.parent)
    lock = locks.acquire(path, patience)
    if lock is None:
        raise BusyError("Another process is changing the queue; try again.")
    with lock:
        yield


def wake_queued() -> list[Run]:
    """Start a process for every queued run that has none (after a reboot); returns those runs.

    A run that was not queued in this home is `imported`, never `queued`, and waits for the user.
    """
    woken = []
    for run in list_runs():
        state, last = run.observe()
        if state != "queued" or run.held or _is_starting(last):
            continue
        try:
            if last["type"] == "created":
                start(run)
            else:
                files.check_tree(run.path)
                spawn(run, resume=bool(last.get("resume")))
            woken.append(run)
        except MoleError:
            continue  # another process was faster, or its settings can no longer be read
    return woken


def device_of(config: RunConfig) -> str:
    """The device a run will use: `cpu`, `mps` or `cuda:N` with N the machine's own number. No torch."""
    return physical_device(config.model.device)


def acquire_device(device: str, run: Run) -> locks.Lock | None:
    """The lock of a device, if it is free and `run` is the first that waits for it; None otherwise."""
    path = device_lock_path(device)
    make_folder(path.parent)
    if locks.is_held(path):
        return None
    try:
        with _line(patience=0.2):  # a move comes either before this check or after the run has the device
            # A suspended process lets the others pass, and is the first again when it goes on.
            line = [other for other in waiting_runs(device) if other.held and not other.suspended]
            if line and line[0].name != run.name:
                return None
            return locks.acquire(path, patience=0.2, run=run.name)
    except BusyError:
        return None


def _is_starting(last: dict[str, Any]) -> bool:
    """Whether a queued run's process may be starting; moving it in the queue writes an event too, and starts none."""
    return not last.get("moved") and job.just_started(last["time"])
