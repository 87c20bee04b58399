"""Background jobs with a record in the run's folder, as evaluations and atlases are. No torch.

`runs/NAME/FOLDER/N.json` holds what is asked for, the progress and the result. The state is derived from the lock
beside it, so a record never claims to run when its process is gone.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from mole.core import files, locks, processes
from mole.core.devices import restrict_to
from mole.core.errors import RunError
from mole.core.paths import local_path, make_folder
from mole.core.text import explain
from mole.runs import job
from mole.runs.event_reader import number
from mole.runs.queue import device_of
from mole.runs.run import Run

ALIVE = ("queued", "running")
STATES = (*ALIVE, "finished", "failed", "cancelled")
NUMBER = (int, float)
KINDS: dict[str, Any] = {
    "target": str, "checkpoint": str, "data": str, "sha256": str, "limit": (int, type(None)), "date": str,
    "columns": dict, "done": int, "total": int, "note": str, "begun": bool, "rows": int, "seconds": NUMBER,
    "error": str,
}  # fmt: skip
"""The fields that every record may have, and their types."""


@dataclass(frozen=True)
class RecordedJob:
    """One job of a run: its record, and beside it its lock, its log and the request to stop.

    Class attributes:
        folder: its folder in the run's.
        noun: what it is, as in "The evaluation 3 of my-run".
        result: the field that a finished one has.
        kinds: the fields of a record and their types.
    """

    folder: ClassVar[str]
    noun: ClassVar[str]
    result: ClassVar[str]
    kinds: ClassVar[dict[str, Any]] = KINDS

    run: Run
    number: int

    def __post_init__(self) -> None:
        """Raises `RunError` if the folder is a link: its files would be someone else's."""
        if (self.run.path / self.folder).is_symlink():
            raise RunError(f"{self.run.path / self.folder} is a link; it must be a folder of the run itself.")

    def file(self, suffix: str) -> Path:
        """The file of that suffix: json (the record), lock, log or stop."""
        return self.run.path / self.folder / f"{self.number}.{suffix}"

    def record(self) -> dict[str, Any]:
        """The record; empty when it cannot be read, and without fields of a wrong type."""
        found = processes.read_record(self.file("json"))
        known = {key: value for key, value in found.items() if isinstance(value, self.kinds.get(key, ()))}
        for key, value in known.items():
            if isinstance(value, (int, float)) and number(value) is None:
                known[key] = None
        return known

    def update(self, **values: Any) -> None:
        """Change the record, whole or not at all. Raises `FileNotFoundError` when the run was deleted."""
        processes.write_record(self.file("json"), {**self.record(), **values})

    @property
    def held(self) -> bool:
        """Whether a process works on it or waits for the device."""
        return locks.is_held(self.file("lock"))

    def stop_requested(self) -> bool:
        """Whether it was cancelled, or its run deleted."""
        return self.file("stop").exists() or not self.file("json").exists()

    def status(self) -> dict[str, Any]:
        """Number, `state` (one of `STATES`) and the record: `target`, `checkpoint`, `data`, `sha256`, `limit`, `date`;
        `done` and `total` rows and `note` while it goes on; `rows` and `seconds` of the result; `error`."""
        held = self.held  # before the record: a process writes its result before it releases the lock
        record = self.record()
        state = self._state(held, record)
        error = record.get("error") or (f"{job.EXITED} Start it again." if state == "failed" else None)
        return {"number": self.number, **record, "state": state, "error": error}

    def _state(self, held: bool, record: dict[str, Any]) -> str:
        if record.get(self.result):
            return "finished"
        if held:
            return "running" if record.get("begun") else "queued"
        if self.stop_requested():
            return "cancelled"
        if record.get("error"):
            return "failed"
        return "queued" if not record.get("begun") and job.just_started(self._written()) else "failed"

    def _written(self) -> float:
        """When the record was last written, in unix seconds."""
        try:
            return self.file("json").stat().st_mtime
        except OSError:
            return 0.0

    def cancel(self) -> None:
        """Cancel it; partial results are not kept. Raises `RunError` when it has ended already."""
        state = self.status()["state"]
        if state not in ALIVE:
            raise RunError(f"The {self.noun} {self.number} of {self.run.name} is {state}; there is nothing to cancel.")
        files.create(self.file("stop"))
        job.signal_holder(self.file("lock"), signal.SIGTERM)


JobT = TypeVar("JobT", bound=RecordedJob)


def claim(kind: type[JobT], run: Run, values: dict[str, Any], **more: Any) -> JobT:
    """A new job with the next free number, and with these values as its record."""
    files.check_tree(run.path)
    make_folder(run.path / kind.folder)
    place = max((one.number for one in jobs_of(kind, run)), default=0)
    while True:
        place += 1
        claimed = kind(run, place)
        try:
            files.create(claimed.file("json"), exclusive=True)
        except FileExistsError:
            continue  # another process took the number
        claimed.update(**values, **more)
        return claimed


def jobs_of(kind: type[JobT], run: Run) -> list[JobT]:
    """All jobs of a kind that a run has, the newest first."""
    folder = run.path / kind.folder
    try:
        names = os.listdir(folder) if files.is_folder(folder) else []
    except OSError:
        return []
    numbers = [int(name[:-5]) for name in names if name.endswith(".json") and name[:-5].isdecimal()]
    return [kind(run, place) for place in sorted(numbers, reverse=True)]


def new_record(target: str, data: str, limit: int | None, fingerprint: str) -> dict[str, Any]:
    """The first fields of a record: which target, on which data, and when."""
    local = local_path(data)
    step = target.partition("@")[2]
    return {
        "target": target,
        "checkpoint": f"step-{step}" if step else "final",
        "data": str(local.absolute()) if os.path.isfile(local) else data,
        "sha256": fingerprint,
        "limit": limit,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def perform(work: JobT, compute: Callable[[JobT], dict[str, Any]]) -> None:
    """Wait for the run's device, compute, and write the result or the error into the record.

    Someone waits for it, so it does not queue behind waiting runs. Raises `BusyError` when another process works on it.
    """
    with job.hold(work.file("lock"), f"The {work.noun} {work.number} of {work.run.name}"):
        try:
            device = device_of(work.run.config)
            restrict_to(work.run.config.model.device)  # before anything that may start CUDA is imported
            with job.device_turn(
                device, work.stop_requested, lambda note: work.update(note=note), run=f"{work.run.name}'s {work.noun}"
            ) as held:
                if held:
                    work.update(begun=True, note="Loading the model …")
                    work.update(**compute(work), note="")
        except Exception as error:
            if not work.run.path.exists():
                return  # the run was deleted, and the record with it
            work.update(error=" ".join(filter(None, explain(error))), note="")
            raise
