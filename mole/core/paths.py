"""`$MOLE_HOME` and its folders, valid names of folders, and paths as typed by the user."""

from __future__ import annotations

import os
import re
from pathlib import Path

from mole.core.errors import RunError, brief

WINDOWS_DEVICES = r"(?i:con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?"


def home() -> Path:
    """The folder that holds `runs/`, `models/` and `locks/`: `$MOLE_HOME`, or `~/.mole`."""
    return Path(os.environ.get("MOLE_HOME") or "~/.mole").expanduser().absolute()


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
    missing = []
    while not path.is_dir():
        missing.append(path)
        path = path.parent
    for folder in reversed(missing):
        inside = folder.is_relative_to(home()) and folder != home()
        mode = 0o700 if folder == home() else folder.parent.stat().st_mode & 0o777 if inside else 0o777
        folder.mkdir(mode, exist_ok=True)


def restrict(path: Path) -> None:
    """Give a file or folder no permissions that the folder it is in does not give."""
    mode, allowed = path.stat().st_mode, path.parent.stat().st_mode
    if mode & 0o777 & ~allowed:
        path.chmod(mode & 0o7777 & ~(0o777 & ~allowed))


def local_path(text: str) -> Path:
    """A path as typed by the user, with `~` expanded; `~user` of an unknown user is left unchanged."""
    return Path(os.path.expanduser(text))


def check_name(name: str, what: str = "run", field: str = "name") -> str:
    """Return `name` if it is valid for a run (or `what`); else raise `RunError` for `field`."""
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,63}", name) or name.endswith("."):
        raise RunError(
            f"The {what} name {brief(name)} is not allowed: use up to 64 letters, digits, '.', '_' and '-', "
            "starting with a letter, digit or '_'.",
            field=field,
        )
    if re.fullmatch(WINDOWS_DEVICES, name):
        raise RunError(f"The {what} name {brief(name)} is not allowed: Windows reserves it for a device.", field=field)
    return name
