"""A run's preflight in the background: `$MOLE_HOME/preflight/KEY/`, one folder for the same settings and data.

`request.json` is the request, `state.json` the progress, `estimate.json` and `measurement.json` the results. Each
job is a process of its own, so that a crash is a result like others, and another page, or the studio after a restart,
finds it again. It outlives who started it, but not its limits of memory and processor time, which the kernel holds also
where a library hangs. Its lock tells whether it runs, never a file. No torch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mole import runs
from mole.config import RunConfig
from mole.core import locks, processes
from mole.core.devices import free_on_cpu, restrict_to
from mole.core.errors import InputError, RunError
from mole.core.paths import home, local_path, make_folder
from mole.core.text import explain, is_out_of_memory
from mole.runs import job

FINAL = ("done", "busy", "cancelled", "no_memory", "failed")
KEPT = 50
"""Folders of jobs that are kept."""
STATE: dict[str, Any] = {"kind": str, "phase": str, "text": str, "share": (int, float), "time": (int, float)}
"""The fields `state.json` must have, and their types."""
NO_MEMORY = r"failed to map segment|can't start new thread"
"""What else an error says where a process may have no more memory."""
KILLED = "The system ended the process, most likely because the memory ran out, or else after hours of work."
CPU_MINUTES: dict[str, float] = {"estimate": 30, "measurement": 120, "both": 150}
"""Minutes of processor time of a job; of a measurement, which uses all cores, for each of them."""


@dataclass(frozen=True)
class PreflightJob:
    """The preflight of one run's settings."""

    folder: Path

    @classmethod
    def of(cls, config: RunConfig) -> PreflightJob:
        """The job of these settings and of the files as they are now; the run's name and group do not matter."""
        values = config.to_dict()
        for name in ("name", "group"):
            values.pop(name, None)
        stamps = []
        for path in (*(source.path for source in config.data.sources), config.data.eval_path, config.model.name):
            with contextlib.suppress(OSError, ValueError):
                stat = local_path(path or "").stat()
                stamps.append([path, stat.st_size, stat.st_mtime_ns])
        text = json.dumps([values, stamps], sort_keys=True, default=str)
        return cls(home() / "preflight" / hashlib.sha256(text.encode()).hexdigest()[:16])

    @property
    def key(self) -> str:
        """Its identifier: the name of its folder."""
        return self.folder.name

    def read(self, name: str) -> dict[str, Any]:
        """A record, `request`, `state`, `estimate` or `measurement`; empty when there is none."""
        return processes.read_record(self.folder / f"{name}.json")

    def write(self, name: str, **values: Any) -> None:
        """Write a record, whole or not at all."""
        processes.write_record(self.folder / f"{name}.json", values)

    @property
    def lock_path(self) -> Path:
        """Held by the process that works on it."""
        return self.folder / "lock"

    def state(self) -> dict[str, Any]:
        """The progress: `kind`, `phase` (starting, waiting, working, or one of `FINAL`), `text`, `share` 0…1, and of a
        failure `field`; empty when it was never started."""
        held = locks.is_held(
            self.lock_path
        )  # before the record: a process writes its result before it releases the lock
        state = self.read("state")
        if any(not isinstance(state.get(key), kind) for key, kind in STATE.items()):
            return {}
        if held or state["phase"] in FINAL:
            return state
        if state["phase"] == "starting" and job.just_started(state["time"]):
            return state
        if state["kind"] == "estimate":
            return {**state, "phase": "failed", "text": job.EXITED}
        return {**state, "phase": "no_memory", "text": KILLED}

    @property
    def alive(self) -> bool:
        """Whether a process works on it or is about to."""
        return bool(state := self.state()) and state["phase"] not in FINAL

    def tell(self, kind: str, phase: str, text: str, share: float = 0.0, **more: Any) -> None:
        """Write the progress."""
        self.write("state", kind=kind, phase=phase, text=text, share=round(share, 3), time=time.time(), **more)

    # Starting and ending

    def start(self, config: RunConfig, kind: str, *, wait: bool = False, limit: int | None = None) -> None:
        """Start an estimate or a measurement in the background, unless one is running; returns at once.

        Args:
            config: the run.
            kind: estimate, measurement, or both, one after the other.
            wait: wait for the device while a run has it, instead of reporting that.
            limit: bytes the process may take; on a CPU those that are free if None.
        """
        if self.alive:
            return
        make_folder(self.folder)
        prune_jobs(self.folder)
        if kind != "estimate":
            (self.folder / "measurement.json").unlink(missing_ok=True)
        absolute = runs.absolute(config)
        self.write("request", config=absolute.to_dict(), kind=kind, wait=wait, limit=limit)
        self.tell(kind, "starting", "Starting …")
        processes.detach("mole.preflight.job", self.key, log=self.folder / "log.txt")

    def cancel(self) -> None:
        """Kill the process and remove its scratch files; does nothing when there is none."""
        if not self.alive:
            return
        state = self.read("state")
        self.tell(state["kind"], "cancelled", "Cancelled.")
        job.signal_holder(self.lock_path, signal.SIGKILL, group=True)  # it leads its own session
        lock = locks.acquire(self.lock_path, patience=5)
        if lock is not None:
            with lock:
                self.tell(state["kind"], "cancelled", "Cancelled.")
                shutil.rmtree(self.scratch, ignore_errors=True)

    @property
    def scratch(self) -> Path:
        """Files of a measurement while it runs."""
        return self.folder / "scratch"


def prune_jobs(keep: Path) -> None:
    """Delete all but the newest `KEPT` jobs, never one that is running."""
    found = [(path.stat().st_mtime, path) for path in keep.parent.iterdir() if path.is_dir() and path != keep]
    for _, path in sorted(found, reverse=True)[KEPT:]:
        if not PreflightJob(path).alive:
            shutil.rmtree(path, ignore_errors=True)


def find_job(key: str) -> PreflightJob | None:
    """The job with that identifier, if there is one."""
    folder = home() / "preflight" / key
    return PreflightJob(folder) if re.fullmatch("[0-9a-z]{1,64}", key) and folder.is_dir() else None


def running_jobs() -> list[PreflightJob]:
    """All jobs that are running."""
    parent = home() / "preflight"
    return [check for path in parent.iterdir() if (check := PreflightJob(path)).alive] if parent.is_dir() else []


# ---------------------------------------------------------------------------------------------------------
# The process


def perform(check: PreflightJob) -> None:
    """Do in this process what the job asks for, and record how it ended. Raises `BusyError`, `MoleError`."""
    with job.hold(check.lock_path, "This preflight", patience=2):
        request = check.read("request")
        if check.read("state").get("phase") == "cancelled":
            return
        kind = str(request["kind"])
        try:
            config = RunConfig.from_dict(request["config"])
            restrict_to(config.model.device)  # before anything that may start CUDA is imported
            runs.check_inputs(config)
            if kind in ("estimate", "both"):
                run_estimate(check, config, last=kind == "estimate")
            if kind in ("measurement", "both"):
                kind = "measurement"
                run_measurement(check, config, request)
        except Exception as error:
            record_failure(check, kind, error)
        finally:
            shutil.rmtree(check.scratch, ignore_errors=True)


def run_estimate(check: PreflightJob, config: RunConfig, last: bool) -> None:
    """Estimate and record the result; `last` when no measurement follows."""
    check.tell("estimate", "working", "Looking at the model and the data …", 0.3)
    with memory_limited(runs.device_of(config), None):
        from mole.preflight.estimate import estimate

        check.write("estimate", **estimate(config).to_dict())
    if last:
        check.tell("estimate", "done", "", 1.0)


def run_measurement(check: PreflightJob, config: RunConfig, request: dict[str, Any]) -> None:
    """Measure once the device is free, and record the result."""
    device = runs.device_of(config)
    if not request["wait"] and (user := runs.device_user(device)):
        check.tell("measurement", "busy", f"{user} is using {device}.", by=user)
        return
    with job.device_turn(
        device, lambda: False, lambda note: check.tell("measurement", "waiting", note), run="a measurement"
    ):
        make_folder(check.scratch)
        with memory_limited(device, request["limit"]):
            check.tell("measurement", "working", "Loading the libraries …", 0.02)
            from mole.preflight import dry_run

            result = dry_run.measure(
                config, check.scratch, lambda text, share: check.tell("measurement", "working", text + " …", share)
            )
    shutil.rmtree(check.scratch, ignore_errors=True)  # before it is done: what is told then is true
    check.write("measurement", **dataclasses.asdict(result))
    check.tell("measurement", "done", "", 1.0)


@contextmanager
def memory_limited(device: str, limit: int | None) -> Iterator[None]:
    """A block in which running out of memory ends this process, not others of the machine."""
    processes.be_killed_first()
    with processes.data_limit(free_on_cpu() if limit is None and device == "cpu" else limit):
        yield


def record_failure(check: PreflightJob, kind: str, error: Exception) -> None:
    """Record why it failed; out of memory is a result of a measurement, not a failure."""
    text = " ".join(str(error).split())
    if kind == "measurement" and (is_out_of_memory(error) or re.search(NO_MEMORY, text)):
        check.tell(kind, "no_memory", f"The memory ran out: {text[:200] or 'no more could be had'}.")
        return
    message = " ".join(filter(None, explain(error)))
    check.tell(kind, "failed", message, field=getattr(error, "field", None), input=isinstance(error, InputError))
    raise error


def main(arguments: list[str]) -> int:
    """`KEY` → exit code: 0 done (also when it does not fit), 1 failed, 2 bad input."""

    def answer() -> None:
        check = find_job(arguments[0]) if len(arguments) == 1 else None
        if check is None:
            raise RunError("usage: python -m mole.preflight.job KEY")
        if (kind := check.read("request").get("kind")) in CPU_MINUTES:
            job.limit_cpu(CPU_MINUTES[kind], 1 if kind == "estimate" else os.cpu_count() or 1)
        perform(check)

    return processes.exit_code(answer)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
