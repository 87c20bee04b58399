"""Output of the commands: tables, formatted numbers, JSON files."""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

from mole.core.errors import InputError
from mole.core.paths import local_path


def prepare_streams() -> None:
    """Make stdin, stdout and stderr usable, whatever the terminal or the caller gave.

    A stream that was closed (`mole … >&-`) becomes the null device; otherwise the next file that is opened would get
    its number, and messages would be written into that file. Characters that a terminal's encoding lacks are replaced.
    """
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115  kept until the end
        reconfigure = getattr(getattr(sys, name), "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="replace")


def print_table(head: list[str], rows: list[list[str]]) -> None:
    """Print a table; each column is as wide as its longest cell."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    for row in [head, *rows]:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def steps_text(status: dict[str, Any]) -> str:
    """Step and total steps of a run's status: `20/60`, or `20` while the total is unknown."""
    return f"{status['step']}/{status['total_steps']}" if status["total_steps"] else str(status["step"])


def created_text(status: dict[str, Any]) -> str:
    """Creation time of a run's status, in local time."""
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(status["created"]))


def metric_text(value: Any) -> str:
    """A metric with four significant digits."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def check_writable(path: str | None, flag: str) -> None:
    """Raise `InputError` unless the file at `path` can be created; called before long work."""
    if path is None:
        return
    target = local_path(path)
    if os.path.isdir(target):
        raise InputError(f"{flag} {path} cannot be written: it is a folder.")
    if not os.path.isdir(target.absolute().parent):
        raise InputError(f"{flag} {path} cannot be written: its folder does not exist.")


def write_json(path: str, values: Any) -> None:
    """Write `values` to the file `path` as JSON."""
    save_text(path, json.dumps(values, ensure_ascii=False))


def save_text(path: str, text: str) -> None:
    """Write a text to the file `path`."""
    local_path(path).write_text(text, encoding="utf-8")
