"""Evaluations of a run on a data file: each a process of its own, with a record in the run's folder.

`runs/NAME/evaluations/N.json` holds what is evaluated, the progress and the result, see `mole.runs.recorded_job`.
torch is imported by that process only.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mole import runs
from mole.core import processes
from mole.core.errors import ConfigError, DataError, RunError
from mole.runs import job, recorded_job
from mole.runs.event_reader import number
from mole.runs.recorded_job import ALIVE, KINDS, STATES, RecordedJob, claim, jobs_of, new_record
from mole.runs.run import Run

__all__ = ["ALIVE", "FOLDER", "STATES", "Evaluation", "evaluations_of", "list_evaluations", "start_evaluation"]

FOLDER = "evaluations"
CPU_MINUTES = 24 * 60
"""The longest an evaluation may compute, on each core."""


@dataclass(frozen=True)
class Evaluation(RecordedJob):
    """One evaluation of a run, see `RecordedJob`; the record has the `metrics` of the result."""

    folder = FOLDER
    noun = "evaluation"
    result = "metrics"
    kinds = {**KINDS, "metrics": dict}

    def record(self) -> dict[str, Any]:
        """The record, with metrics that are numbers or None."""
        known = super().record()
        if "metrics" in known:
            known["metrics"] = {name: number(value) for name, value in known["metrics"].items()}
        return known


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
    evaluation = claim(Evaluation, run, new_record(target, data, limit, fingerprint), columns=columns)
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


def record_evaluation(
    target: str, result: dict[str, Any], limit: int | None, fingerprint: str, seconds: float
) -> Evaluation | None:
    """Record the result of `mole eval`; None when the target is no run, or its folder is read-only."""
    values = new_record(target, result["data"], limit, fingerprint)
    values |= {"rows": result["rows"], "metrics": result["metrics"], "seconds": round(seconds, 1)}
    try:
        return claim(Evaluation, run_of(target), values)
    except (RunError, OSError):
        return None


def evaluations_of(run: Run) -> list[Evaluation]:
    """All evaluations of a run, the newest first."""
    return jobs_of(Evaluation, run)


def list_evaluations(run: Run, most: int = 50) -> list[dict[str, Any]]:
    """The states of a run's evaluations, the newest first, at most so many."""
    return [evaluation.status() for evaluation in evaluations_of(run)[:most]]


# ---------------------------------------------------------------------------------------------------------
# The process


def perform(evaluation: Evaluation) -> None:
    """Wait for the run's device, evaluate, and write the result or the error into the record, see `recorded_job`."""
    recorded_job.perform(evaluation, evaluation_result)


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
