"""Opens files in folders that may come from someone else.

A run folder, an adapter or a checkpoint can be handed on by anyone. A link in it may name any file of the user, who
would then read it, append to it or delete it; a named pipe blocks whoever opens it. Every file the project opens in
such a folder goes through one of the two *openers* below, as `open(path, "rb", opener=unlinked)`.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from pathlib import Path
from typing import Any

from mole.core.errors import RunError

MAX_JSON_BYTES = 16 << 20
"""Largest JSON file that is read; a checkpoint's manifest has a few kB."""


def regular(path: str | os.PathLike[str], flags: int) -> int:
    """An opener for files that the user named: links are followed, but only to a regular file.

    Raises `OSError` for a folder, pipe, socket or device; never blocks.
    """
    return _open(path, flags)


def unlinked(path: str | os.PathLike[str], flags: int) -> int:
    """An opener for files in a run folder: neither a link nor anything but a regular file.

    Raises `OSError` (`ELOOP`) for a link, a pipe, a socket, a device or a folder; never blocks.
    """
    return _open(path, flags | os.O_NOFOLLOW)


def _open(path: str | os.PathLike[str], flags: int) -> int:
    # O_NONBLOCK: opening a pipe would wait for its other end, opening a terminal or tape might act on it.
    # A new file gets the permissions of its folder, see `mole.core.paths.make_folder`.
    mode = os.stat(os.path.dirname(path) or ".").st_mode & 0o666 if flags & os.O_CREAT else 0
    descriptor = os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC, mode)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.ELOOP, "Not a regular file", os.fspath(path))
    return descriptor


def create(path: Path, *, exclusive: bool = False) -> None:
    """Create an empty file if there is none; with `exclusive`, an existing one raises `FileExistsError`."""
    os.close(unlinked(path, os.O_WRONLY | os.O_CREAT | (os.O_EXCL if exclusive else 0)))


def is_file(path: Path) -> bool:
    """Whether a regular file is at `path`, not a link to one; False if that cannot be told."""
    return _kind(path) == stat.S_IFREG


def is_folder(path: Path) -> bool:
    """Whether a folder is at `path`, not a link to one; False if that cannot be told."""
    return _kind(path) == stat.S_IFDIR


def _kind(path: Path) -> int:
    try:
        return stat.S_IFMT(os.lstat(path).st_mode)
    except (OSError, ValueError):
        return 0


def read_json(path: Path, opener: Any = unlinked, most: int = MAX_JSON_BYTES) -> Any:
    """The value in a JSON file of at most so many bytes.

    Raises:
        OSError: it cannot be read, or is no regular file.
        ValueError: it is not JSON, is too large, or is nested too deeply.
    """
    with open(path, "rb", opener=opener) as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise ValueError(f"it is larger than {most >> 20} MB")
    try:
        return json.loads(data.decode())
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def check_tree(folder: Path) -> None:
    """Check that a run folder holds only folders and regular files, before a process writes in it.

    Raises `RunError` naming the first link, pipe, socket or device.
    """
    pending = [folder]
    while pending:
        for entry in sorted(os.scandir(pending.pop()), key=lambda entry: entry.name):
            if entry.is_dir(follow_symlinks=False):
                pending.append(Path(entry.path))
            elif not entry.is_file(follow_symlinks=False):
                what = f"a link to {os.readlink(entry.path)}" if entry.is_symlink() else "not a regular file"
                raise RunError(
                    f"{entry.path} is {what}; a run folder has only regular files and folders. If you did not put it "
                    "there, do not trust this folder; otherwise replace it by what it points to."
                )
