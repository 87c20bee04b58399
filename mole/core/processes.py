"""Processes that outlive the one that starts them, and what they leave: an exit code, records in JSON. No torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from mole.core import checkpoint
from mole.core.errors import MoleError
from mole.core.paths import home
from mole.core.redaction import child_environment, redacted


def detach(module: str, *arguments: str, log: Path) -> None:
    """Start `python -m module arguments` in a session of its own, with no open files of ours, output added to `log`.

    Of our environment it gets what `mole.core.redaction` knows it to need.
    """
    root = Path(__file__).resolve().parents[2]
    # Not from the folder it is in: a file there must not stand in for a module.
    environment = {**child_environment(), "MOLE_HOME": str(home()), "PYTHONSAFEPATH": "1"}
    if root.name not in ("site-packages", "dist-packages"):
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH"))))
    with log.open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            cwd=home(),
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    # Waiting for it keeps no zombie while we live; when we end first, init takes it over.
    threading.Thread(target=process.wait, name=f"reap-{process.pid}", daemon=True).start()


def exit_code(work: Callable[[], Any]) -> int:
    """Do a process's work → 0, or the exit code of an error of ours, which is told in its one line on stderr."""
    try:
        work()
    except MoleError as error:
        with suppress(OSError):  # the log is on the disk that is full
            print(f"mole: {redacted(str(error))}", file=sys.stderr, flush=True)
        return error.exit_code
    return 0


def read_record(path: Path) -> dict[str, Any]:
    """What a record holds; empty when it is not there or cannot be read."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        json.dumps(values, ensure_ascii=False).encode()  # half a character is none: a page could not take it
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def write_record(path: Path, values: Mapping[str, Any]) -> None:
    """Make or replace a record, whole or not at all. Raises `FileNotFoundError` when its folder is gone."""
    text = json.dumps(values, ensure_ascii=False, indent=1)
    checkpoint.write_file(path, lambda aside: aside.write_text(text, encoding="utf-8"))
