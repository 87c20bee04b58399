"""The exceptions MoLE Studio raises: one line a person can act on, and an exit code.

The `mole` command prints `str(error)` and exits with `error.exit_code`; the studio shows the same line, next to the
field if `error.field` names one.
"""

from __future__ import annotations

import errno
import reprlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

REFUSALS = {
    errno.ENOSPC: ("The disk is full", "Free some space (df -h), or remove files (df -i), and try again."),
    errno.EDQUOT: ("The disk quota is used up", "Free some space and try again."),
    errno.EFBIG: ("A file would be larger than this process may write", "Raise the limit (ulimit -f) and try again."),
    errno.EROFS: ("The file system is read-only", "Make it writable, or set MOLE_HOME to a folder that is."),
    errno.EACCES: ("Writing there is not permitted", "Make it writable, or set MOLE_HOME to a folder that is."),
    errno.ELOOP: ("A link, a pipe or a device is in the place of a file", "Remove it and try again."),
    errno.EISDIR: ("A folder is in the place of a file", "Remove it and try again."),
    errno.ENOTDIR: ("A file is in the place of a folder", "Remove it and try again."),
    errno.EPERM: ("Writing there is not permitted", "Make it writable, or set MOLE_HOME to a folder that is."),
}
"""errno of a failed write → cause and advice."""
LONGEST = 1_500
"""Maximum characters of an error's line; the value quoted may be a whole file."""


class MoleError(Exception):
    """Base class: the work could not be done (exit code 1)."""

    exit_code = 1
    field: str | None = None

    def __init__(self, message: str = "") -> None:
        line = " ".join(message.encode(errors="backslashreplace").decode().splitlines())
        super().__init__(line if len(line) <= LONGEST else f"{line[: LONGEST - 1]}…")

    def __reduce__(self) -> tuple[Any, ...]:  # a subclass may take other arguments than its line
        return _unpickled, (type(self), self.args), self.__dict__


class MoleNotice(UserWarning):
    """What somebody should know of an adapter that works all the same, in one line; preflight says it too."""


class InputError(MoleError):
    """The input is wrong: a setting, a file, a name (exit code 2)."""

    exit_code = 2

    def __init__(self, message: str, *, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


class ConfigError(InputError):
    """A setting's value is not allowed.

    Args:
        field: dotted name as in `run.yaml`, e.g. `adapter.top_p`.
        value: the value given.
        allowed: the allowed values, as a phrase (`"a number from 0 to 1"`).
        advice: what to do, if that is more than choosing an allowed value.
    """

    def __init__(self, field: str, value: Any, allowed: str, advice: str = "") -> None:
        message = f"{field} is {brief(value)}; it must be {allowed}."
        super().__init__(f"{message} {advice}".strip(), field=field)


class DataError(InputError):
    """A data file or one of its rows cannot be used; the message names the row (from 1) and the reason.

    Attributes:
        rejected: if no row can be used, every row with its reason (`mole.data.RejectedRow`).
    """

    def __init__(self, message: str, *, field: str | None = None, rejected: Sequence[Any] = ()) -> None:
        super().__init__(message, field=field)
        self.rejected = list(rejected)


class ModelError(InputError):
    """A base model or adapter cannot be found, reached or loaded."""


class RunError(InputError):
    """A run's name is not allowed, the run does not exist, or its state does not permit the request."""


class BusyError(MoleError):
    """Another process holds the run or the device; the message names it."""


class CheckpointError(MoleError):
    """A checkpoint fails verification, or belongs to another config or data."""


class TrainingError(MoleError):
    """Training failed: loss not finite, out of memory, disk full; the message gives cause and advice."""


class StorageError(MoleError):
    """A file could not be written: the disk is full or read-only."""


def _unpickled(kind: type[MoleError], args: tuple[Any, ...]) -> MoleError:
    error = kind.__new__(kind)
    error.args = args
    return error


@contextmanager
def writing() -> Iterator[None]:
    """Context manager or decorator: an `OSError` of a failed write becomes a `StorageError` with advice."""
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
    """The `repr` of a value, cut to a readable length; the value may be huge or contain itself."""
    try:
        return _SHORT.repr(value)
    except ValueError:  # Python refuses to print integers with thousands of digits
        return "a number of thousands of digits"
