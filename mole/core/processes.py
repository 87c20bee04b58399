"""Detached processes, their limits, their exit codes, and the JSON records they write. No torch."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mole.core import checkpoint, files
from mole.core.errors import MoleError, StorageError
from mole.core.paths import HOME_GONE, home, is_home_gone, make_folder
from mole.core.redaction import child_environment, redacted
from mole.core.text import print_error


def detach(module: str, *arguments: str, log: Path) -> None:
    """Start `python -m module arguments` in its own session, inheriting no open files, with output appended to `log`.

    It inherits only the environment variables that `mole.core.redaction` lists.
    """
    with open(log, "ab", opener=files.unlinked) as output:
        process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            cwd=home(),
            env=python_environment(),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    if hasattr(resource, "prlimit"):  # a limit that this process has for a while is not for that one
        with contextlib.suppress(OSError):
            hard = resource.prlimit(process.pid, resource.RLIMIT_DATA)[1]
            resource.prlimit(process.pid, resource.RLIMIT_DATA, (hard, hard))
    # Waiting for it avoids a zombie; if we end first, init adopts it.
    threading.Thread(target=process.wait, name=f"reap-{process.pid}", daemon=True).start()


def python_environment() -> dict[str, str]:
    """The environment of a `python -m` of ours: the variables that are inherited, and where this package is found."""
    root = Path(__file__).resolve().parents[2]
    # PYTHONSAFEPATH: a file in the working directory must not shadow a module.
    environment = {**child_environment(), "MOLE_HOME": str(home()), "PYTHONSAFEPATH": "1"}
    if root.name not in ("site-packages", "dist-packages"):
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH"))))
    return environment


def be_killed_first() -> None:
    """Let the kernel kill this process before others, the studio and runs among them, when memory runs out (Linux)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")


@contextmanager
def data_limit(limit: int | None) -> Iterator[None]:
    """A block in which this process may have `limit` bytes of data, then `MemoryError` (Linux); None for no limit."""
    before, hard = resource.getrlimit(resource.RLIMIT_DATA)
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_DATA, (lower(limit, hard), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (before, hard))


def lower(limit: int, hard: int) -> int:
    """The lower one of a limit and the hard limit that this process has already."""
    return limit if hard == resource.RLIM_INFINITY else min(limit, hard)


def exit_code(work: Callable[[], Any]) -> int:
    """Run a process's work and return 0, or print the one line of a `MoleError` to stderr and return its exit code."""
    try:
        make_folder(home())
        try:
            work()
        except OSError:
            if not is_home_gone():
                raise
        if is_home_gone():  # also where the work just ended because its files are gone
            raise StorageError(HOME_GONE.format(home=home()))
    except MoleError as error:
        print_error(f"mole: {redacted(str(error))}")
        return error.exit_code
    return 0


def read_record(path: Path) -> dict[str, Any]:
    """The contents of a record; empty if it is missing or unreadable."""
    try:
        values = files.read_json(path)
        json.dumps(values, ensure_ascii=False).encode()  # a lone surrogate could not be sent to the page
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def write_record(path: Path, values: Mapping[str, Any]) -> None:
    """Create or replace a record atomically. Raises `FileNotFoundError` if its folder is gone."""
    text = json.dumps(values, ensure_ascii=False, indent=1)
    checkpoint.write_file(path, lambda aside: aside.write_text(text, encoding="utf-8"))
