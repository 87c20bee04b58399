"""Every error MoLE Studio raises on purpose: one line a person can act on, and an exit code.

`mole` the command prints `str(error)` and exits with `error.exit_code`; the studio shows the same line,
beside the field when `error.field` names one.
"""

from __future__ import annotations

import errno
import reprlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

REFUSALS = {
    errno.ENOSPC: ("The disk is full", "Free some space and try again."),
    errno.EDQUOT: ("The disk quota is used up", "Free some space and try again."),
    errno.EFBIG: ("A file would be larger than this process may write", "Raise the limit (ulimit -f) and try again."),
    errno.EROFS: ("The file system is read-only", "Make it writable, or set MOLE_HOME to a folder that is."),
    errno.EACCES: ("Writing there is not permitted", "Make it writable, or set MOLE_HOME to a folder that is."),
    errno.EPERM: ("Writing there is not permitted", "Make it writable, or set MOLE_HOME to a folder that is."),
}
"""Why the system does not write: cause and advice."""
LONGEST = 1_500
"""Characters of an error's line; what was given may be a whole file."""


class MoleError(Exception):
    """Base of all of ours: the work could not be done (exit code 1)."""

    exit_code = 1
    field: str | None = None

    def __init__(self, message: str = "") -> None:
        line = " ".join(message.encode(errors="backslashreplace").decode().splitlines())
        super().__init__(line if len(line) <= LONGEST else f"{line[: LONGEST - 1]}…")


class InputError(MoleError):
    """What was given is wrong: a setting, a file, a name (exit code 2)."""

    exit_code = 2

    def __init__(self, message: str, *, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


class ConfigError(InputError):
    """A setting's value is not allowed.

    Args:
        field: dotted name as in `run.yaml`, e.g. `adapter.top_p`.
        value: what was given.
        allowed: what would have been right, as a phrase (`"a number from 0 to 1"`).
        advice: what to do, if that is more than giving an allowed value.
    """

    def __init__(self, field: str, value: Any, allowed: str, advice: str = "") -> None:
        message = f"{field} is {brief(value)}; it must be {allowed}."
        super().__init__(f"{message} {advice}".strip(), field=field)


class DataError(InputError):
    """A data file or one of its rows cannot be used; the message names the row (from 1) and the reason.

    `rejected`, where no row can be used: all of them, with their reasons (`mole.data.RejectedRow`).
    """

    def __init__(self, message: str, *, field: str | None = None, rejected: Sequence[Any] = ()) -> None:
        super().__init__(message, field=field)
        self.rejected = list(rejected)


class ModelError(InputError):
    """A base model or adapter cannot be found, reached or loaded."""


class RunError(InputError):
    """A run's name is not allowed, or there is no such run, or it is in the wrong state for the request."""


class BusyError(MoleError):
    """Somebody else holds the run or the device; the message says who."""


class CheckpointError(MoleError):
    """A checkpoint does not verify, or does not belong to this run's config and data."""


class TrainingError(MoleError):
    """Training stopped by itself: loss not finite, out of memory, disk full; the message gives cause and advice."""


class StorageError(MoleError):
    """A file could not be written: the disk is full or read-only."""


@contextmanager
def writing() -> Iterator[None]:
    """In this block, or the function it decorates, the system's refusal to write is a `StorageError` with advice."""
    try:
        yield
    except OSError as error:
        if error.errno not in REFUSALS:
            raise
        cause, advice = REFUSALS[error.errno]
        raise StorageError(f"{cause}{f': {error.filename}' if error.filename else ''}. {advice}") from error


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 300
_SHORT.maxlevel = 3


def brief(value: Any) -> str:
    """A value as Python writes it, cut to a readable length: it may be huge, hold itself, or grow when written out."""
    try:
        return _SHORT.repr(value)
    except ValueError:  # Python writes no number of so many digits
        return "a number of thousands of digits"
