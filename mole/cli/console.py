"""What the commands print and write: tables, figures for people, JSON files."""

from __future__ import annotations

import json
import os
import time
from typing import Any

from mole.core.errors import InputError
from mole.core.paths import local_path


def print_table(head: list[str], rows: list[list[str]]) -> None:
    """Print columns as wide as their longest cell."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    for row in [head, *rows]:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def steps_text(status: dict[str, Any]) -> str:
    """`20/60`, or `20` while the total is not known."""
    return f"{status['step']}/{status['total_steps']}" if status["total_steps"] else str(status["step"])


def created_text(status: dict[str, Any]) -> str:
    """The creation time, local."""
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(status["created"]))


def metric_text(value: Any) -> str:
    """A metric for people."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def check_writable(path: str | None, flag: str) -> None:
    """See that a file can be written, before the long work. Raises `InputError`."""
    if path is None:
        return
    target = local_path(path)
    if os.path.isdir(target) or not os.path.isdir(target.absolute().parent):
        raise InputError(
            f"{flag} {path} cannot be written: {'it is a folder' if os.path.isdir(target) else 'no such folder'}."
        )


def write_json(path: str, values: Any) -> None:
    """Write JSON to a file."""
    local_path(path).write_text(json.dumps(values, ensure_ascii=False), encoding="utf-8")
