"""What the background jobs share, whether they train, evaluate or measure: one detached process each.

A job's lock tells whether its process lives, its record how far it came; nothing else is remembered. No torch.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mole.core import locks, processes
from mole.core.errors import BusyError, MoleError
from mole.core.paths import device_lock_path, make_folder

STARTING_SECONDS = 20.0
"""A job that was started so recently may have a process that has not taken its lock yet."""
POLL_SECONDS = 0.5
"""Between two looks at whether the device is free."""
REPORT_SECONDS = 0.5
"""At least so long between two progress reports."""
CPU_GRACE = 30
"""Seconds of processor time after which a process that does not end by itself at its limit is killed."""
EXITED = "The process exited unexpectedly: it was killed, ran out of memory, or the machine went down."


def just_started(moment: float) -> bool:
    """Whether a job started at `moment` (unix seconds) may not have its lock yet; the clock may have been set back."""
    return abs(time.time() - moment) < STARTING_SECONDS


def hold(lock_path: Path, what: str, patience: float = 0.5) -> locks.Lock:
    """The job's lock, for the process that works on it. Raises `BusyError` when another one does."""
    lock = locks.acquire(lock_path, patience)
    if lock is None:
        raise BusyError(f"{what} is being worked on already.")
    return lock


def signal_holder(lock_path: Path, number: signal.Signals, *, group: bool = False) -> None:
    """Send a signal to the process that holds the lock, or to its whole session; does nothing when none holds it.

    A suspended process is continued, since it would not act on the signal.
    """
    pid = locks.holder(lock_path).get("pid")
    if locks.is_held(lock_path) and isinstance(pid, int):  # while it is held, the number is still that process's
        with contextlib.suppress(ProcessLookupError, PermissionError):
            for each in (number, signal.SIGCONT):
                (os.killpg if group else os.kill)(pid, each)


def limit_cpu(minutes: float, cores: int) -> None:
    """Let this process end when it has used so many minutes of processor time on each of so many cores.

    At the limit it raises `MoleError`. Where that does nothing, in a library that keeps the interpreter, the kernel
    kills it `CPU_GRACE` seconds later.
    """

    def on_limit(number: int, frame: Any) -> None:
        signal.signal(signal.SIGXCPU, signal.SIG_IGN)  # it comes again each second
        raise MoleError(f"It was ended after {minutes:g} minutes of work on each processor it may use.")

    signal.signal(signal.SIGXCPU, on_limit)
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    seconds = round(60 * minutes * cores)
    resource.setrlimit(
        resource.RLIMIT_CPU, (processes.lower(seconds, hard), processes.lower(seconds + CPU_GRACE, hard))
    )


@contextmanager
def device_turn(
    device: str,
    stopped: Callable[[], bool],
    report: Callable[[str], Any],
    acquire: Callable[[], locks.Lock | None] | None = None,
    **note: Any,
) -> Iterator[bool]:
    """Wait for a device and hold it; False when `stopped` says so before it is free.

    Args:
        device: the machine's name of it (`mole.core.devices.physical_device`).
        stopped: whether to give up waiting.
        report: gets a line that names the holder, once for each.
        acquire: tries to take the device's lock; by default whoever comes first gets it.
        note: what the lock says of its holder, see `mole.core.locks`.
    """
    path = device_lock_path(device)
    make_folder(path.parent)
    reported = ""
    while not stopped():
        lock = acquire() if acquire else locks.acquire(path, patience=0.0, **note)
        if lock is not None:
            with lock:
                yield True
            return
        message = f"Waiting for {device}: {locks.describe_holder(path)} is using it." if locks.is_held(path) else ""
        if message and message != reported:
            report(message)
            reported = message
        time.sleep(POLL_SECONDS)
    yield False


def at_intervals(report: Callable[[int, int], None], seconds: float = REPORT_SECONDS) -> Callable[[int, int], None]:
    """`report(done, total)`, called at most once in so many seconds, and at the end."""
    last = 0.0

    def sometimes(done: int, total: int) -> None:
        nonlocal last
        if done == total or time.monotonic() - last >= seconds:
            report(done, total)
            last = time.monotonic()

    return sometimes
