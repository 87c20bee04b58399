"""`$MOLE_HOME` and its folders, and paths as typed by the user."""

from __future__ import annotations

import os
import re
from pathlib import Path

from mole.core.errors import InputError, StorageError, brief

HOME_ADVICE = "Set MOLE_HOME to a folder, or to one that can be created."
HOME_GONE = "{home}, the folder of $MOLE_HOME, was moved, renamed or deleted. Set MOLE_HOME to where it is now."

_used: set[str] = set()
"""Homes that this process has seen. One that disappears is not made again at the old place: whoever moved it would find
a second one there, with a part of the runs."""


def home() -> Path:
    """The folder that holds `runs/`, `models/` and `locks/`: `$MOLE_HOME`, or `~/.mole`."""
    given = os.environ.get("MOLE_HOME") or "~/.mole"
    try:
        return Path(given).expanduser().absolute()
    except RuntimeError:  # ~user of an unknown user, or a user without a home
        raise InputError(f"MOLE_HOME is {brief(given)}, but there is no such user. {HOME_ADVICE}") from None
    except FileNotFoundError:
        raise InputError(f"MOLE_HOME is {brief(given)}, but the working directory was deleted. {HOME_ADVICE}") from None


def check_home() -> None:
    """Raise `InputError` if `$MOLE_HOME` is not a folder and none can be made there."""
    path = home()
    if path.is_dir():
        return
    above = path
    while not os.path.lexists(above):
        above = above.parent
    if not above.is_dir():
        raise InputError(f"MOLE_HOME is {brief(str(path))}, but {above} is not a folder. {HOME_ADVICE}")


def is_home_gone() -> bool:
    """Whether the home that this process has used was moved, renamed or deleted."""
    return str(home()) in _used and not os.path.lexists(home())


def runs_dir() -> Path:
    """`$MOLE_HOME/runs`, the folder of all runs."""
    return home() / "runs"


def models_dir() -> Path:
    """`$MOLE_HOME/models`, the folder of converted models."""
    return home() / "models"


def device_lock_path(device: str) -> Path:
    """The lock file of a device."""
    return home() / "locks" / f"{re.sub(r'[^A-Za-z0-9]+', '-', device)}.lock"


def make_folder(path: Path) -> None:
    """Create a folder of `$MOLE_HOME`, and the missing ones above it; does nothing when it is there.

    A new home is accessible to its user only (mode 700), and what is created in it gets the permissions of the folder
    it is in, less what the umask takes. So an existing home keeps the permissions it has, and a group can share one.
    """
    # Not a umask of 077 for the whole process: it would also apply to the hub's cache, which users may share, and to
    # exports; and a program that imports this library has its own.
    if is_home_gone():
        raise StorageError(HOME_GONE.format(home=home()))
    missing = [path]
    while not (path := path.parent).is_dir():
        missing.append(path)
    for folder in reversed(missing):
        inside = folder.is_relative_to(home()) and folder != home()
        mode = 0o700 if folder == home() else folder.parent.stat().st_mode & 0o777 if inside else 0o777
        folder.mkdir(mode, exist_ok=True)
    if home().is_dir():
        _used.add(str(home()))


def restrict(path: Path) -> None:
    """Give a file or folder no permissions that the folder it is in does not give."""
    mode, allowed = path.stat().st_mode, path.parent.stat().st_mode
    if mode & 0o777 & ~allowed:
        path.chmod(mode & 0o7777 & ~(0o777 & ~allowed))


def local_path(text: str) -> Path:
    """A path as typed by the user, with `~` expanded; `~user` of an unknown user is left unchanged."""
    return Path(os.path.expanduser(text))
