"""Locks that are released when their process ends: `flock` on a file, plus a note of the holder for messages.

The kernel releases such a lock however its holder ends, `kill -9` included, so unlike a stored process id it cannot be
stale. A forked child shares its parent's open files and would keep the lock alive after the parent; the hook below
closes them in the child. Programs started with `subprocess` do not inherit them (Python opens files close-on-exec).
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import time
from pathlib import Path
from typing import Any

from mole.core import files

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
        """Release the lock; a second call does nothing."""
        if self._descriptor in _open_locks:
            _open_locks.remove(self._descriptor)
            os.close(self._descriptor)

    def __enter__(self) -> Lock:
        return self

    def __exit__(self, *exc: object) -> None:
        self.release()


def acquire(path: Path, patience: float = 0.5, **note: Any) -> Lock | None:
    """Acquire the lock on `path`; None if another process still holds it after `patience` seconds.

    Some patience is needed because `is_held` holds a shared lock for a few microseconds. The file is created if
    missing, its folder is not. `note` is stored in the file with the process id, for `holder`.
    """
    deadline = time.monotonic() + patience
    while True:
        descriptor = files.unlinked(path, os.O_RDWR | os.O_CREAT)
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
    """Whether a process holds the lock on `path`; creates and changes no file.

    No process holds what is not a regular file: `acquire` refuses it.
    """
    try:
        descriptor = files.unlinked(path, os.O_RDONLY)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ELOOP):
            return False
        raise
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def holder(path: Path) -> dict[str, Any]:
    """The last holder's note: `pid`, `since` (Unix seconds) and its own entries; empty if unreadable."""
    try:
        note = files.read_json(path)
    except (OSError, ValueError):
        return {}
    if not isinstance(note, dict):
        return {}
    pid = note.get("pid")  # 0 and below mean process groups, the reader's own among them
    return note if isinstance(pid, int) and pid > 1 else {key: note[key] for key in note if key != "pid"}


def suspended_holder(path: Path) -> int | None:
    """The id of the process that holds the lock if it is suspended (SIGSTOP, Ctrl-Z), where `/proc` tells; else None.

    It keeps its locks, and does nothing until it gets SIGCONT.
    """
    pid = holder(path).get("pid")
    if not isinstance(pid, int) or not is_held(path):
        return None
    try:
        with open(f"/proc/{pid}/stat", "rb", opener=files.regular) as file:
            state = file.read().rpartition(b")")[2].split()[0]
    except (OSError, IndexError):
        return None
    return pid if state in (b"T", b"t") else None


def describe_holder(path: Path) -> str:
    """Describe the holder, e.g. `"run demo (process 4711)"`."""
    note = holder(path)
    process = f"process {note['pid']}" if "pid" in note else "another process"
    if suspended_holder(path):
        process += ", which is suspended"
    return f"run {note['run']} ({process})" if "run" in note else process


def _is_still(descriptor: int, path: Path) -> bool:
    """Whether `path` is still the open file: its folder may have been deleted in between."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _write_note(descriptor: int, note: dict[str, Any]) -> None:
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(note).encode(), 0)
    except OSError:
        pass  # a full disk must not prevent a run from being stopped or deleted; the note is for messages only
