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
import time
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
"""Seconds after which something hangs: many times what a busy machine takes for a few steps of a tiny model."""
SAVE_STEPS, STEPS = 3, 12

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["imported"])

Make = Callable[..., Run]
Preparation = Callable[[Run], Any]


def wait_for(condition: Callable[[], Any], seconds: float = PATIENCE) -> None:
    """Wait until the condition holds; a test that hangs fails instead."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


@dataclass(frozen=True)
class Whole:
    """An undisturbed training: the adapter's weights, and the CPU seconds its process used."""

    weights: bytes
    cpu_seconds: float


class Forked:
    """A child of the fork server."""

    def __init__(self, target: Callable[..., Any], *arguments: Any) -> None:
        self.process: BaseProcess = SERVER.Process(target=target, args=arguments, daemon=True)
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

    def kill_after(self, cpu_seconds: float) -> bool:
        """SIGKILL as soon as it has used so much CPU time; False when it ended by itself before.

        The clock stands while a busy machine lets the process wait, so the kill hits the same work there.
        """
        deadline = time.monotonic() + PATIENCE
        while not self.ended(0.005) and self.cpu_seconds() < cpu_seconds:
            assert time.monotonic() < deadline, "it hangs"
        return self.kill()

    def cpu_seconds(self) -> float:
        """The CPU time it has used so far; 0 when it has ended."""
        assert self.process.pid is not None
        try:
            return time.clock_gettime(~self.process.pid << 3 | 2)  # CPUCLOCK_SCHED of a process, as in <time.h>
        except OSError:
            return 0.0


class Attempt(Forked):
    """A process that works on a run; `prepare(run)` is called in it first, with torch imported."""

    def __init__(self, run: Run, prepare: Preparation | None = None, *, resume: bool | None = None) -> None:
        self.run = run
        if resume is None:
            resume = run.last_event["type"] != "created"
        runs.enqueue(run, resume=resume)
        super().__init__(work, str(runs.home()), run.name, resume, prepare)

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
    os.environ["MOLE_HOME"] = home
    run = runs.get(name)
    print_to(run.log_path, run.log_path)
    if prepare is not None:
        prepare(run)
    from mole.training.worker import main

    leave(main([name, *(["--resume"] if resume else [])]))


class Command(Forked):
    """`mole …` in a child of the server; `prepare()` is called in it first."""

    def __init__(self, folder: Path, *arguments: str, prepare: Callable[[], Any] | None = None) -> None:
        self.out, self.err = folder / f"{arguments[0]}.out", folder / f"{arguments[0]}.err"
        super().__init__(command, str(runs.home()), (self.out, self.err), arguments, prepare)

    def answer(self) -> tuple[int, str, str]:
        """Its exit code and what it printed on stdout and stderr, once it has ended."""
        hangs = not self.ended()
        if hangs:
            self.kill()
        assert not hangs, f"it hangs:\n{self.err.read_text()}"
        assert self.process.exitcode is not None
        return self.process.exitcode, self.out.read_text(), self.err.read_text()


def command(home: str, output: tuple[Path, Path], arguments: tuple[str, ...], prepare: Any) -> None:
    """In a child of the server: what `python -m mole.cli …` does, its output written to two files."""
    os.environ["MOLE_HOME"] = home
    print_to(*output)
    if prepare is not None:
        prepare()
    from mole.cli import main

    leave(main(arguments))


def print_to(*output: Path) -> None:
    """Let stdout and stderr of this process be added to these files, and torch use one thread."""
    import torch

    torch.set_num_threads(1)
    for stream, path in enumerate(output, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644), stream)


def leave(code: int) -> None:
    """End this process as an interpreter does, without the parent's finalizers."""
    sys.stdout.flush()
    sys.stderr.flush()
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


# Processes, as /proc shows them


def processes_of(home: Path) -> set[int]:
    """The living processes that were started with this `$MOLE_HOME` (forked attempts were started without), and those
    zombies that have such a parent."""
    wanted = f"MOLE_HOME={home}".encode()
    found = {pid for pid in everybody() if wanted in environment_of(pid)}
    stats = {pid: stat_of(pid) for pid in everybody()}
    return found | {pid for pid, stat in stats.items() if stat[:1] == ["Z"] and int(stat[1]) in found}


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
