"""Evaluations of a run on a data file: each a process of its own, with a record in the run's folder.

`runs/NAME/evaluations/N.json` holds what is evaluated, the progress and the result. The state is derived from the lock
beside it, so a record never claims to run when its process is gone. torch is imported by that process only.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from mole import runs
from mole.core import files, locks, processes
from mole.core.devices import restrict_to
from mole.core.errors import ConfigError, DataError, RunError
from mole.core.paths import local_path, make_folder
from mole.core.text import explain
from mole.runs import job
from mole.runs.event_reader import number
from mole.runs.run import Run

FOLDER = "evaluations"
ALIVE = ("queued", "running")
STATES = (*ALIVE, "finished", "failed", "cancelled")
CPU_MINUTES = 24 * 60
"""The longest an evaluation may compute, on each core."""
NUMBER = (int, float)
KINDS: dict[str, Any] = {
    "target": str, "checkpoint": str, "data": str, "sha256": str, "limit": (int, type(None)), "date": str,
    "columns": dict, "done": int, "total": int, "note": str, "begun": bool, "rows": int, "metrics": dict,
    "seconds": NUMBER, "error": str,
}  # fmt: skip
"""The fields of a record and their types."""


@dataclass(frozen=True)
class Evaluation:
    """One evaluation of a run: its record, and beside it its lock, its log and the request to stop."""

    run: Run
    number: int

    def __post_init__(self) -> None:
        """Raises `RunError` if the folder is a link: its files would be someone else's."""
        if (self.run.path / FOLDER).is_symlink():
            raise RunError(f"{self.run.path / FOLDER} is a link; evaluations are kept in a folder of the run itself.")

    def file(self, suffix: str) -> Path:
        """The file of that suffix: json (the record), lock, log or stop."""
        return self.run.path / FOLDER / f"{self.number}.{suffix}"

    def record(self) -> dict[str, Any]:
        """The record; empty when it cannot be read, and without fields of a wrong type."""
        found = processes.read_record(self.file("json"))
        known = {key: value for key, value in found.items() if isinstance(value, KINDS.get(key, ()))}
        for key, value in known.items():
            if isinstance(value, (int, float)) and number(value) is None:
                known[key] = None
        if "metrics" in known:
            known["metrics"] = {name: number(value) for name, value in known["metrics"].items()}
        return known

    def update(self, **values: Any) -> None:
        """Change the record, whole or not at all. Raises `FileNotFoundError` when the run was deleted."""
        processes.write_record(self.file("json"), {**self.record(), **values})

    @property
    def held(self) -> bool:
        """Whether a process evaluates it or waits for the device."""
        return locks.is_held(self.file("lock"))

    def stop_requested(self) -> bool:
        """Whether it was cancelled, or its run deleted."""
        return self.file("stop").exists() or not self.file("json").exists()

    def status(self) -> dict[str, Any]:
        """Number, `state` (one of `STATES`) and the record: `target`, `checkpoint`, `data`, `sha256`, `limit`, `date`;
        `done` and `total` rows and `note` while it goes on; `rows`, `metrics` and `seconds` of the result; `error`."""
        held = self.held  # before the record: a process writes its result before it releases the lock
        record = self.record()
        state = self._state(held, record)
        error = record.get("error") or (f"{job.EXITED} Start it again." if state == "failed" else None)
        return {"number": self.number, **record, "state": state, "error": error}

    def _state(self, held: bool, record: dict[str, Any]) -> str:
        if record.get("metrics"):
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
            raise RunError(f"The evaluation {self.number} of {self.run.name} is {state}; there is nothing to cancel.")
        files.create(self.file("stop"))
        job.signal_holder(self.file("lock"), signal.SIGTERM)


# ---------------------------------------------------------------------------------------------------------
# Starting and finding


def start_evaluation(
    target: str,
    data: str,
    limit: int | None = None,
    read: Callable[[Run, str, int | None], tuple[dict[str, str], str]] | None = None,
) -> Evaluation:
    """Evaluate a run (`RUN`, or `RUN@STEP` for a checkpoint) on a data file or hub data set, in the background.

    `limit` takes the first rows only; they are read by `read`, by default `data_columns`. Raises `RunError` or
    `ModelError` for the target, `DataError` (field `data`) and `ConfigError` (field `limit`), all before anything
    starts.
    """
    from mole.runs.targets import locate

    locate(target)
    run = run_of(target)
    columns, fingerprint = (read or data_columns)(run, data, limit)
    evaluation = _claim(run, new_record(target, data, limit, fingerprint), columns=columns)
    processes.detach("mole.evaluation.job", run.name, str(evaluation.number), log=evaluation.file("log"))
    return evaluation


def run_of(target: str) -> Run:
    """The run of a target `RUN` or `RUN@STEP`. Raises `RunError`."""
    return runs.get(target.partition("@")[0])


def data_columns(run: Run, data: str, limit: int | None) -> tuple[dict[str, str], str]:
    """The column names that fit the data (the run's own, where the data has such columns) and its sha256."""
    from mole.data import read_examples

    if limit is not None and limit < 1:
        raise ConfigError("limit", limit, "a whole number of rows, at least 1")
    if own := run.config.data.columns:
        try:
            return own, read_examples(data, own, limit, field="data").fingerprint
        except DataError:
            pass  # the data has other columns than the run's: use the usual names
    return {}, read_examples(data, None, limit, field="data").fingerprint


def new_record(target: str, data: str, limit: int | None, fingerprint: str) -> dict[str, Any]:
    """The first fields of a record: what is evaluated on which data, and when."""
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


def record_evaluation(
    target: str, result: dict[str, Any], limit: int | None, fingerprint: str, seconds: float
) -> Evaluation | None:
    """Record the result of `mole eval`; None when the target is no run, or its folder is read-only."""
    values = new_record(target, result["data"], limit, fingerprint)
    try:
        return _claim(run_of(target), values, rows=result["rows"], metrics=result["metrics"], seconds=round(seconds, 1))
    except (RunError, OSError):
        return None


def _claim(run: Run, values: dict[str, Any], **more: Any) -> Evaluation:
    """A new record with the next free number."""
    files.check_tree(run.path)
    make_folder(run.path / FOLDER)
    number = max((one.number for one in evaluations_of(run)), default=0)
    while True:
        number += 1
        evaluation = Evaluation(run, number)
        try:
            files.create(evaluation.file("json"), exclusive=True)
        except FileExistsError:
            continue  # another process took the number
        evaluation.update(**values, **more)
        return evaluation


def evaluations_of(run: Run) -> list[Evaluation]:
    """All evaluations of a run, the newest first."""
    try:
        names = os.listdir(run.path / FOLDER) if files.is_folder(run.path / FOLDER) else []
    except OSError:
        return []
    numbers = [int(name[:-5]) for name in names if name.endswith(".json") and name[:-5].isdecimal()]
    return [Evaluation(run, number) for number in sorted(numbers, reverse=True)]


def list_evaluations(run: Run, most: int = 50) -> list[dict[str, Any]]:
    """The states of a run's evaluations, the newest first, at most so many."""
    return [evaluation.status() for evaluation in evaluations_of(run)[:most]]


# ---------------------------------------------------------------------------------------------------------
# The process


def perform(evaluation: Evaluation) -> None:
    """Wait for the run's device, evaluate, and write the result or the error into the record.

    An evaluation takes minutes and someone waits for it, so it does not queue behind waiting runs. Raises `BusyError`
    when another process works on it.
    """
    with job.hold(evaluation.file("lock"), f"The evaluation {evaluation.number} of {evaluation.run.name}"):
        try:
            device = runs.device_of(evaluation.run.config)
            restrict_to(evaluation.run.config.model.device)  # before anything that may start CUDA is imported
            with job.device_turn(
                device,
                evaluation.stop_requested,
                lambda note: evaluation.update(note=note),
                run=f"{evaluation.run.name}'s evaluation",
            ) as held:
                if held:
                    evaluation.update(begun=True, note="Loading the model …")
                    evaluation.update(**evaluation_result(evaluation), note="")
        except Exception as error:
            if not evaluation.run.path.exists():
                return  # the run was deleted, and the record with it
            evaluation.update(error=" ".join(filter(None, explain(error))), note="")
            raise


def evaluation_result(evaluation: Evaluation) -> dict[str, Any]:
    """The result: `rows`, `metrics` and `seconds`. Raises `MoleError`."""
    from mole.data import read_examples
    from mole.evaluation.evaluate import NO_ANSWERS, evaluate_examples
    from mole.models.loading import on_its_gpu
    from mole.runs.targets import load_target

    asked = evaluation.record()
    begun = time.monotonic()
    loaded = load_target(asked["target"], on_its_gpu(evaluation.run.config.model))
    examples = read_examples(asked["data"], asked["columns"], asked["limit"], field="data").examples
    report = job.at_intervals(lambda done, total: evaluation.update(done=done, total=total, note=""))
    rows, metrics = evaluate_examples(loaded, examples, report)
    if not rows:
        raise DataError(f"{asked['data']}: {NO_ANSWERS}", field="data")
    return {"rows": rows, "metrics": metrics, "seconds": round(time.monotonic() - begun, 1)}


def main(arguments: list[str]) -> int:
    """`NAME NUMBER` → exit code: 0 evaluated or cancelled, 1 failed, 2 bad input."""

    def evaluate() -> None:
        if len(arguments) != 2 or not arguments[1].isdecimal():
            raise RunError("usage: python -m mole.evaluation.job NAME NUMBER")
        job.limit_cpu(CPU_MINUTES, os.cpu_count() or 1)
        perform(Evaluation(runs.get(arguments[0]), int(arguments[1])))

    return processes.exit_code(evaluate)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
