"""Atlases of a run, each kept in the run's folder, and computed by a process of its own when the page asks for one.

`runs/NAME/atlas/N.json` is the record (see `mole.runs.recorded_job`), `N.atlas.json` the atlas. torch is imported by
that process only.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from mole import runs
from mole.analysis.atlas.corpus import read_corpus
from mole.analysis.atlas.stored import read_atlas, write_atlas
from mole.core import processes
from mole.core.errors import RunError
from mole.evaluation.job import data_columns, run_of
from mole.runs import job, recorded_job
from mole.runs.recorded_job import KINDS, RecordedJob, claim, jobs_of, new_record
from mole.runs.run import Run

FOLDER = "atlas"
CPU_MINUTES = 24 * 60
"""The longest that an atlas may be computed, on each core."""


@dataclass(frozen=True)
class AtlasJob(RecordedJob):
    """One atlas of a run, see `RecordedJob`.

    The record also has the columns `by`, whether it is `quick`, and `what` is being done.
    """

    folder = FOLDER
    noun = "atlas"
    result = "rows"
    kinds = {**KINDS, "by": list, "quick": bool, "what": str, "tokens": int}

    def record(self) -> dict[str, Any]:
        """The record, with columns that are texts."""
        known = super().record()
        if "by" in known:
            known["by"] = [name for name in known["by"] if isinstance(name, str)]
        return known

    def atlas(self) -> dict[str, Any]:
        """The atlas. Raises `InputError` if it is not finished, or cannot be read."""
        return read_atlas(self.file("atlas.json"))

    def write(self, atlas: dict[str, Any]) -> None:
        """Write the atlas, whole or not at all."""
        write_atlas(self.file("atlas.json"), atlas)


# ---------------------------------------------------------------------------------------------------------
# Starting and finding


def read_inputs(run: Run, data: str, limit: int | None, by: Sequence[str]) -> tuple[dict[str, str], str]:
    """The column names that fit the data, see `data_columns`, and its sha256. Raises `DataError` and `ConfigError`."""
    columns, _ = data_columns(run, data, limit)
    return columns, read_corpus(data, columns, limit, by).fingerprint


def start_atlas(
    target: str,
    data: str,
    by: Sequence[str] = (),
    limit: int | None = None,
    *,
    quick: bool = False,
    read: Callable[..., tuple[dict[str, str], str]] = read_inputs,
) -> AtlasJob:
    """Compute the atlas of a run (`RUN`, or `RUN@STEP` for a checkpoint) over a data file, in the background.

    Args:
        target: the run or checkpoint.
        data: a data file or hub data set.
        by: its columns to look at.
        limit: take the first rows only.
        quick: leave out saturation and muting.
        read: called as `read_inputs`; the studio reads in a process of its own.

    Raises, before anything starts: `RunError` or `ModelError` for the target, `DataError` (field `data` or `by`) and
    `ConfigError` (field `limit`).
    """
    from mole.runs.targets import locate

    locate(target)
    run = run_of(target)
    columns, fingerprint = read(run, data, limit, by)
    record = new_record(target, data, limit, fingerprint)
    started = claim(AtlasJob, run, record, columns=columns, by=list(by), quick=quick)
    processes.detach("mole.analysis.atlas.job", run.name, str(started.number), log=started.file("log"))
    return started


def record_atlas(
    target: str, atlas: dict[str, Any], by: Sequence[str], limit: int | None, seconds: float
) -> AtlasJob | None:
    """Keep the atlas of `mole atlas` with its run; None when the target is no run, or its folder is read-only."""
    values = new_record(target, atlas["data"], limit, atlas["sha256"])
    try:
        kept = claim(AtlasJob, run_of(target), values, by=list(by), quick=atlas["muting"] is None)
        kept.write(atlas)
        kept.update(rows=atlas["rows"], tokens=atlas["tokens"], seconds=round(seconds, 1))
    except (RunError, OSError):
        return None
    return kept


def atlases_of(run: Run) -> list[AtlasJob]:
    """All atlases of a run, the newest first."""
    return jobs_of(AtlasJob, run)


def list_atlases(run: Run, most: int = 50) -> list[dict[str, Any]]:
    """The states of a run's atlases, the newest first, at most so many."""
    return [one.status() for one in atlases_of(run)[:most]]


# ---------------------------------------------------------------------------------------------------------
# The process


def atlas_result(asked: AtlasJob) -> dict[str, Any]:
    """Compute and write the atlas → what the record says of it: `rows`, `tokens` and `seconds`. Raises `MoleError`."""
    from mole.analysis.atlas.build import build_atlas
    from mole.models.loading import on_its_gpu
    from mole.runs.targets import load_target

    record, begun = asked.record(), time.monotonic()
    loaded = load_target(record["target"], on_its_gpu(asked.run.config.model))
    corpus = read_corpus(record["data"], record["columns"], record["limit"], record.get("by", []))
    last = [""]
    update = job.at_intervals(lambda done, total: asked.update(what=last[0], done=done, total=total, note=""))

    def report(what: str, done: int, total: int) -> None:
        last[0] = what
        update(done, total)

    atlas = build_atlas(loaded, corpus, samples=not record.get("quick"), report=report)
    asked.write(atlas)
    return {"rows": atlas["rows"], "tokens": atlas["tokens"], "seconds": round(time.monotonic() - begun, 1)}


def main(arguments: list[str]) -> int:
    """`NAME NUMBER` → exit code: 0 computed or cancelled, 1 failed, 2 bad input."""

    def compute() -> None:
        if len(arguments) != 2 or not arguments[1].isdecimal():
            raise RunError("usage: python -m mole.analysis.atlas.job NAME NUMBER")
        job.limit_cpu(CPU_MINUTES, os.cpu_count() or 1)
        recorded_job.perform(AtlasJob(runs.get(arguments[0]), int(arguments[1])), atlas_result)

    return processes.exit_code(compute)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
