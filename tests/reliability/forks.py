"""Training processes by the dozen: forked from a server that has imported torch once, and really killed.

A fresh worker process imports torch for seconds before there is anything to attack. Here a fork server (the
standard library's) has done so already; each attempt is a process of its own that does what the worker does and nothing
else, on one thread, so that every sum comes out the same.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from mole import runs
from mole.core import checkpoint
from mole.core.errors import CheckpointError
from mole.runs.run import Run

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 240.0
"""Seconds a busy machine may take for a few steps of a tiny model."""
SAVE_STEPS, STEPS = 3, 12

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["imported"])

Make = Callable[..., Run]
Preparation = Callable[[Run], Any]


@dataclass(frozen=True)
class Whole:
    """A training that nothing disturbed."""

    weights: bytes
    seconds: float


class Attempt:
    """A process that works on a run; `prepare(run)` is called in it first, with torch imported."""

    def __init__(self, run: Run, prepare: Preparation | None = None, *, resume: bool | None = None) -> None:
        self.run = run
        if resume is None:
            resume = run.last_event["type"] != "created"
        runs.enqueue(run, resume=resume)
        arguments = (str(runs.home()), run.name, resume, prepare)
        self.process: BaseProcess = SERVER.Process(target=work, args=arguments, daemon=True)
        self.process.start()

    def ended(self, seconds: float = PATIENCE) -> bool:
        """Whether it ends within so many seconds."""
        self.process.join(seconds)
        return self.process.exitcode is not None

    def kill(self) -> bool:
        """SIGKILL; False when it had ended by itself before."""
        self.process.kill()
        assert self.ended()
        return self.process.exitcode == -signal.SIGKILL

    def code(self) -> int:
        """Its exit code, once it has ended; -9 when it was killed."""
        hangs = not self.ended()
        if hangs:
            self.kill()
        assert not hangs, f"it hangs:\n{self.run.log_path.read_text()}"
        assert self.process.exitcode is not None
        return self.process.exitcode


def work(home: str, name: str, resume: bool, prepare: Preparation | None) -> None:
    """In a child of the server: what `python -m mole.training.worker NAME` does, its output added to `train.log`."""
    import torch

    os.environ["MOLE_HOME"] = home
    torch.set_num_threads(1)
    run = runs.get(name)
    output = os.open(run.log_path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    for stream in (1, 2):
        os.dup2(output, stream)
    if prepare is not None:
        prepare(run)
    from mole.training.worker import main

    code = main([name, *(["--resume"] if resume else [])])
    sys.stdout.flush()
    os._exit(code)


def finish(run: Run) -> None:
    """Let a run be trained to its end."""
    assert Attempt(run).code() == 0, run.log_path.read_text()
    assert run.state == "finished"


def saved_step(run: Run) -> int:
    """The step of the newest checkpoint that verifies, 0 for none; nothing is renamed or removed."""
    for _, folder in reversed(checkpoint.steps(run.checkpoints_dir)):
        with suppress(CheckpointError):
            return checkpoint.verify(folder).step
    return 0


def weights(run: Run) -> bytes:
    """The adapter's weights, of an adapter that verifies."""
    checkpoint.verify(run.adapter_dir)
    return (run.adapter_dir / "adapter_model.safetensors").read_bytes()


def processes_of(home: Path) -> set[int]:
    """The living processes that were started with this `$MOLE_HOME` (forked attempts were started without), and those
    zombies that have such a parent."""
    found = {pid for pid in everybody() if f"MOLE_HOME={home}".encode() in environment_of(pid)}
    return found | {pid for pid in everybody() if stat_of(pid)[:1] == ["Z"] and int(stat_of(pid)[1]) in found}


def session_of(leader: int) -> set[int]:
    """All processes of a session, zombies too unless they wait for init, whose task they are."""
    stats = {pid: stat_of(pid) for pid in everybody()}
    return {pid for pid, stat in stats.items() if stat and int(stat[3]) == leader and stat[:2] != ["Z", "1"]}


def everybody() -> list[int]:
    return [int(path.name) for path in Path("/proc").iterdir() if path.name.isdecimal()]


def environment_of(pid: int) -> list[bytes]:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return []


def stat_of(pid: int) -> list[str]:
    """State, parent, group, session, … of a process; nothing when there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []
