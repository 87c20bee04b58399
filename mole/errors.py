"""Every error MoLE Studio raises on purpose: one line a person can act on, and an exit code.

`mole` the command prints `str(error)` and exits with `error.exit_code`; the studio shows the same line,
beside the field when `error.field` names one.
"""

from __future__ import annotations

from typing import Any


class MoleError(Exception):
    """Base of all of ours: the work could not be done (exit code 1)."""

    exit_code = 1
    field: str | None = None


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
        message = f"{field} is {value!r}; it must be {allowed}."
        super().__init__(f"{message} {advice}".strip(), field=field)


class DataError(InputError):
    """A data file or one of its rows cannot be used; the message names the row (from 1) and the reason."""


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
