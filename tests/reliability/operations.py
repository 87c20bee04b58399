"""A run's operations on its files, seen from inside its process: noted in order, or the moment at which it dies.

A moment named by an operation (`rename .tmp-adapter → adapter`, for the second time) is the same on every machine,
however busy it is.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from forks import Attempt, Make

from mole.runs.run import Run

EVENT = "open events.jsonl"
"""An event is written: queued, starting, data, started, a step, …"""
SAVE = "mkdir checkpoints/.tmp-step-N"
"""A checkpoint begins to be written."""
SAVED = "rename checkpoints/.tmp-step-N → checkpoints/step-N"
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
AUDITED = {"os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.truncate"}


def operation(run: Run, event: str, arguments: tuple[Any, ...]) -> str | None:
    """A file operation in a run's folder as `rename checkpoints/.tmp-step-N → checkpoints/step-N`; None elsewhere."""
    if event == "open":
        path, _, flags = arguments
        if not isinstance(path, str) or not isinstance(flags, int) or not flags & WRITING:
            return None
        paths = [path]
    elif event in AUDITED:
        paths = [os.fspath(part) for part in arguments if isinstance(part, (str, os.PathLike))]
        if event == "os.remove" and arguments[1] >= 0:  # by name within an open folder, as shutil.rmtree does
            paths = [os.path.join(os.readlink(f"/proc/self/fd/{arguments[1]}"), paths[0])]
    else:
        return None
    if not any(Path(path).is_relative_to(run.path) for path in paths):
        return None
    names = " → ".join(os.path.relpath(path, run.path) for path in paths)
    names = re.sub(r"step-\d+", "step-N", re.sub(r"-[0-9a-f]{8}\b", "", names))
    return f"{event.removeprefix('os.')} {re.sub(r'[.][0-9a-f]{8}(?= |$)', '.#', names)}"


def watch(run: Run, tell: Callable[[str], Any]) -> None:
    """In the trainer: call `tell(operation)` before each operation on the run's files."""

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if (what := operation(run, event, arguments)) is not None:
            tell(what)

    sys.addaudithook(hook)
    sync = os.fsync

    def synced(descriptor: int) -> None:
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        if (what := operation(run, "open", (path, "", os.O_WRONLY))) is not None:
            tell(what.replace("open", "fsync", 1))
        sync(descriptor)

    os.fsync = synced


def note_operations(to: Path, run: Run) -> None:
    """In the trainer: write each operation to a file."""
    descriptor = os.open(to, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    watch(run, lambda what: os.write(descriptor, f"{what}\n".encode()))


def operations_of(make: Make, file: Path) -> list[str]:
    """The operations on the disk of a whole training, in order."""
    run = make()
    assert Attempt(run, partial(note_operations, file)).code() == 0
    return file.read_text().splitlines()


def before(what: str, occurrence: int, act: Callable[[], Any], run: Run) -> None:
    """In the trainer: `act()` once, right before the given operation."""
    left = occurrence

    def tell(now: str) -> None:
        nonlocal left
        left -= now == what
        if left < 0:
            left = sys.maxsize
            act()

    watch(run, tell)


def die() -> None:
    """SIGKILL to this process."""
    os.kill(os.getpid(), signal.SIGKILL)


def die_before(what: str, occurrence: int, run: Run) -> None:
    """In the trainer: SIGKILL right before the given operation."""
    before(what, occurrence, die, run)


def killed_before(what: str, occurrence: int, run: Run) -> None:
    """Let a run be trained until right before the given operation, and be killed there."""
    code = Attempt(run, partial(die_before, what, occurrence)).code()
    assert code == -signal.SIGKILL, f"never came to {what}:\n{run.log_path.read_text()}"


def wait_to_be_stopped(reached: Path, run: Run) -> None:
    """In the trainer: tell by a file that the process has come here, and go on once the run is asked to stop."""
    reached.touch()
    while not run.stop_requested():
        time.sleep(0.01)


def suspend() -> None:
    """SIGSTOP to this process, as Ctrl-Z in its terminal would."""
    os.kill(os.getpid(), signal.SIGSTOP)
