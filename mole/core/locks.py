"""Locks that die with their process: `flock` on a file, with a note of the holder for messages only.

The kernel frees such a lock when its holder ends in any way, `kill -9` included, so a lock tells the truth about a
process where a stored process number would not. A forked child shares its parent's open files and would keep the
lock alive after the parent; hence the hook below, which closes them in the child. Programs started with
`subprocess` never see them (Python opens files close-on-exec).
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from pathlib import Path
from typing import Any

RETRY_SECONDS = 0.02

_open_locks: set[int] = set()


def _close_in_child() -> None:
    for descriptor in _open_locks:
        os.close(descriptor)
    _open_locks.clear()


os.register_at_fork(after_in_child=_close_in_child)


class Lock:
    """A lock that is held until `release()` or the end of a `with` block."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        _open_locks.add(descriptor)

    def release(self) -> None:
        """Let go; a second call does nothing."""
        if self._descriptor in _open_locks:
            _open_locks.remove(self._descriptor)
            os.close(self._descriptor)

    def __enter__(self) -> Lock:
        return self

    def __exit__(self, *exc: object) -> None:
        self.release()


def acquire(path: Path, patience: float = 0.5, **note: Any) -> Lock | None:
    """The lock on `path`, or None when another holder keeps it for `patience` seconds.

    The patience is for those who only look (`is_held`): they hold a shared lock for some microseconds. The file is
    made when missing, its folder is not. `note` is kept in the file beside the process number, for `holder`.
    """
    deadline = time.monotonic() + patience
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_still(descriptor, path):
                _write_note(descriptor, {"pid": os.getpid(), "since": time.time(), **note})
                return Lock(descriptor)
        except BlockingIOError:
            pass
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
        if time.monotonic() >= deadline:
            return None
        time.sleep(RETRY_SECONDS)


def is_held(path: Path) -> bool:
    """Whether some process holds the lock on `path`; makes and changes no file."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def holder(path: Path) -> dict[str, Any]:
    """What the last holder noted: `pid`, `since` (unix seconds) and its own words; empty when unreadable."""
    try:
        note = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(note, dict):
        return {}
    pid = note.get("pid")  # 0 and below would be whole groups of processes, the reader's own among them
    return note if isinstance(pid, int) and pid > 1 else {key: note[key] for key in note if key != "pid"}


def describe_holder(path: Path) -> str:
    """The holder in words, e.g. `"run demo (process 4711)"`."""
    note = holder(path)
    process = f"process {note['pid']}" if "pid" in note else "another process"
    return f"run {note['run']} ({process})" if "run" in note else process


def _is_still(descriptor: int, path: Path) -> bool:
    """Whether the open file is still the one at `path`: its folder may have been deleted meanwhile."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _write_note(descriptor: int, note: dict[str, Any]) -> None:
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(note).encode(), 0)
    except OSError:
        pass  # a full disk must not keep a run from being stopped or deleted; the note is for messages only
