"""Runs side by side: the settings that differ, what came out, and mean and deviation over the seeds of a group.

Numbers only; `mole.analysis.tables` makes the tables of them. No torch.
"""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import takewhile
from pathlib import PurePath
from typing import Any

from mole.analysis.run_metrics import Course, Point, Points, course_of, thinned
from mole.core.errors import InputError, RunError
from mole.evaluation import job as evaluation_job
from mole.runs.run import number, numbers
from mole.runs.store import Run, get

MOST = 8
"""Runs drawn at once: more lines cannot be told apart."""
SEED, DEVICE = "training.seed", "model.device"
NOT_A_SETTING = ("name", "group")


@dataclass(frozen=True)
class Metric:
    """A number a run ends with: its key, title with unit, which way is better, and the factor to that unit."""

    key: str
    title: str
    better: str = ""
    """`low`, `high`, or empty where neither is better."""
    factor: float = 1.0


METRICS = (
    Metric("eval_loss", "Held-out loss", "low"),
    Metric("best_eval_loss", "Best held-out loss", "low"),
    Metric("train_loss", "Training loss", "low"),
    Metric("seconds", "Time (s)", "low"),
    Metric("tokens_per_second", "Tokens / s", "high"),
    Metric("memory_mb", "Peak memory (GB)", "low", 1 / 1024),
    Metric("trainable_parameters", "Trainable (M)", "", 1e-6),
)
RATES = {"exact_match": "Exact match", "accuracy": "Accuracy"}


@dataclass(frozen=True)
class Compared:
    """One run of a comparison, read once."""

    run: Run
    status: Mapping[str, Any]
    settings: Mapping[str, Any]
    """Dotted name → value; empty when `run.yaml` cannot be read."""
    course: Course
    evaluated: Mapping[str, float] = field(default_factory=dict)
    """Results of evaluations, as `evaluated` gives them."""

    @property
    def name(self) -> str:
        return self.run.name

    @property
    def finished(self) -> bool:
        return bool(self.status["state"] == "finished")

    @property
    def seed(self) -> Any:
        return self.settings.get(SEED)

    @cached_property
    def values(self) -> dict[str, float]:
        """The metrics this run has, by key."""
        return {**metrics(self.course), **self.evaluated}


@dataclass(frozen=True)
class Stat:
    """Mean and sample standard deviation (n − 1) over n runs; no deviation for one run."""

    mean: float
    sd: float | None
    n: int


@dataclass(frozen=True)
class Cell:
    """Runs that are the same but for seed and name."""

    label: str
    runs: tuple[Compared, ...]

    @property
    def counted(self) -> tuple[Compared, ...]:
        """The runs the means are taken over: the finished ones, or all while none has finished."""
        return tuple(run for run in self.runs if run.finished) or self.runs

    @property
    def finished(self) -> bool:
        return any(run.finished for run in self.runs)

    @cached_property
    def stats(self) -> dict[str, Stat]:
        """Mean and deviation of every metric, over the runs that have it."""
        keys = dict.fromkeys(key for run in self.counted for key in run.values)
        return {key: stat([run.values[key] for run in self.counted if key in run.values]) for key in keys}


@dataclass(frozen=True)
class Comparison:
    """Two or more runs side by side."""

    runs: tuple[Compared, ...]
    cells: tuple[Cell, ...]
    differences: Mapping[str, Mapping[str, Any]]
    """Setting → run → value, only where they differ; a run without the setting is not in it."""
    notes: tuple[str, ...] = field(default=())

    @cached_property
    def metrics(self) -> tuple[Metric, ...]:
        """The metrics at least one run has: the fixed ones, then those of the evaluations by file."""
        found = {key for run in self.runs for key in run.values}
        extra = dict.fromkeys(key for run in self.runs for key in run.values if key.startswith("eval:"))
        if all(run.values.get("best_eval_loss") == run.values.get("eval_loss") for run in self.runs):
            found.discard("best_eval_loss")  # the last was the best, or the only one
        fixed = tuple(metric for metric in METRICS if metric.key in found)
        return fixed + tuple(evaluation_metric(key) for key in extra)

    def best(self, metric: Metric) -> frozenset[str]:
        """Labels of the cells with the best mean among those that have finished; none when fewer than two have it."""
        means = {cell.label: cell.stats[metric.key].mean for cell in self.cells
                 if cell.finished and metric.key in cell.stats}  # fmt: skip
        if not metric.better or len(means) < 2 or len(set(means.values())) < 2:
            return frozenset()
        top = min(means.values()) if metric.better == "low" else max(means.values())
        return frozenset(label for label, mean in means.items() if mean == top)

    def to_dict(self) -> dict[str, Any]:
        """The numbers as JSON."""
        return {
            "runs": [{**run.status, "seed": run.seed, "metrics": run.values} for run in self.runs],
            "differences": {name: dict(values) for name, values in self.differences.items()},
            "groups": [
                {
                    "label": cell.label,
                    "runs": [run.name for run in cell.runs],
                    "counted": [run.name for run in cell.counted],
                    "metrics": {key: {"mean": s.mean, "sd": s.sd, "n": s.n} for key, s in cell.stats.items()},
                }
                for cell in self.cells
            ],
            "notes": list(self.notes),
        }


def compare(names: Sequence[str], most: int | None = None) -> Comparison:
    """Read and compare the runs of these names, at most the first `most` of them.

    What cannot be compared is told in `notes`: a run that is gone, one that has not finished.
    """
    found: list[Compared] = []
    notes: list[str] = []
    for name in dict.fromkeys(names):
        try:
            found.append(read(get(name)))
        except (RunError, OSError):
            notes.append(f"There is no run {name} any more.")
    if most is not None and len(found) > most:
        notes.append(f"Up to {most} runs can be compared: {', '.join(run.name for run in found[most:])} left out.")
        found = found[:most]
    for run in found:
        if not run.settings:
            notes.append(f"The settings of {run.name} cannot be read.")
        if not run.finished:
            state, step = run.status["state"], run.status["step"]
            notes.append(f"{run.name} is {state} at step {step}: its numbers are not final.")
    differing = differences({run.name: run.settings for run in found})
    facts = differences({run.name: run.course.facts for run in found}, lacking=False)
    return Comparison(tuple(found), grouped(found), {**differing, **facts}, tuple(notes))


def read(run: Run) -> Compared:
    """Everything a comparison needs of a run."""
    try:
        settings = flat(run.config.to_dict())
    except InputError:
        settings = {}
    return Compared(run, run.status(), settings, course_of(run), evaluated(run))


# ---------------------------------------------------------------------------------------------------------
# Settings


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted name, without the run's own names."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        if not prefix and key in NOT_A_SETTING:
            continue
        if isinstance(value, Mapping):
            result.update(flat(value, f"{prefix}{key}."))
        else:
            result[f"{prefix}{key}"] = value
    return result


def differences(configs: Mapping[str, Mapping[str, Any]], lacking: bool = True) -> dict[str, dict[str, Any]]:
    """Setting → run → value of the settings that are not the same in all; a run without the setting is not in it.

    Runs of which nothing is known differ in nothing; nor does a run in a setting it lacks, unless `lacking`.
    """
    known = {run: config for run, config in configs.items() if config}
    names = dict.fromkeys(name for config in known.values() for name in config)
    rows = {name: {run: config[name] for run, config in known.items() if name in config} for name in names}
    return {
        name: row for name, row in rows.items()
        if (lacking and len(row) < len(known)) or len({canonical(value) for value in row.values()}) > 1
    }  # fmt: skip


def canonical(value: Any) -> str:
    """Equal for equal values: 16 and 16.0 are, True and 1 are not."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return json.dumps(value, sort_keys=True, default=str)


def shortened(values: Iterable[Any]) -> dict[str, str]:
    """Paths → their shortest ends that still tell them apart; what is no path stays as it is."""
    texts = sorted({value for value in values if isinstance(value, str)})
    result = {}
    for text in texts:
        parts = PurePath(text).parts
        absolute = PurePath(text).is_absolute()
        others = [PurePath(other).parts for other in texts if other != text]
        size = next(n for n in range(1, len(parts) + 2) if all(other[-n:] != parts[-n:] for other in others))
        result[text] = "/".join(parts[-size:]).replace("//", "/") if absolute else text
    return result


# ---------------------------------------------------------------------------------------------------------
# Metrics


def metrics(course: Course) -> dict[str, float]:
    """What a training came to: the numbers there are, by the keys of `METRICS`.

    The training loss is the mean over the last tenth of the logged steps: a single step's is mostly noise.
    """
    held_out, losses = course.evals.losses, course.train.losses
    values: dict[str, float | None] = {
        "eval_loss": held_out[-1] if held_out else None,
        "best_eval_loss": min(held_out, default=None),
        "train_loss": statistics.fmean(losses[-math.ceil(len(losses) / 10) :]) if losses else None,
        "seconds": course.seconds,
        "tokens_per_second": course.tokens_per_second,
        "memory_mb": course.memory_mb,
        "trainable_parameters": course.trainable_parameters,
    }
    return {key: value for key, value in values.items() if value is not None}


def evaluation_metric(key: str) -> Metric:
    """The metric of an `eval:METRIC:ROWS:CONTENT:FILE` key."""
    _, name, rows, _, file = key.split(":", 4)
    where = f"{file}, {rows} rows"
    if name in RATES:
        return Metric(key, f"{RATES[name]} (%), {where}", "high", 100.0)
    return Metric(key, f"{name.replace('_', ' ').capitalize()}, {where}", "low" if name == "perplexity" else "")


def evaluated(run: Run) -> dict[str, float]:
    """What evaluations of the finished adapter measured, by `eval:METRIC:ROWS:CONTENT:FILE`; of equal ones the last."""
    values: dict[str, float] = {}
    for evaluation in reversed(evaluation_job.find(run)):
        record = evaluation.record()
        measured, rows = numbers(record.get("metrics")), number(record.get("rows"))
        if not measured or not rows or record.get("checkpoint", "final") != "final":
            continue
        content, file = str(record.get("sha256"))[:12], PurePath(str(record.get("data"))).name
        for name, value in measured.items():
            values[f"eval:{name}:{rows}:{content}:{file}"] = value
    return values


# ---------------------------------------------------------------------------------------------------------
# Groups


def grouped(runs: Sequence[Compared]) -> tuple[Cell, ...]:
    """Cells of runs that are the same but for seed and name, trained on the same content; in the order of the runs."""
    cells: list[list[Compared]] = []
    for run in runs:
        for members in cells:
            if run.settings and all(same(run, member) for member in members):
                members.append(run)
                break
        else:
            cells.append([run])
    labels = [label(members) for members in cells]
    return tuple(
        Cell(text if labels.count(text) == 1 else ", ".join(run.name for run in members), tuple(members))
        for text, members in zip(labels, cells, strict=True)
    )


def same(one: Compared, other: Compared) -> bool:
    """Whether two runs differ in their seed at most; what is not known yet of a run that waits does not count.

    Which GPU it was does not matter: what kind of device it was, is among the facts.
    """
    mine, theirs = (
        {name: canonical(value) for name, value in run.settings.items() if name not in (SEED, DEVICE)}
        for run in (one, other)
    )
    shared = one.course.facts.keys() & other.course.facts.keys()
    return mine == theirs and all(one.course.facts[key] == other.course.facts[key] for key in shared)


def label(members: Sequence[Compared]) -> str:
    """What to call the runs of a cell: a run's name, or what all their names begin with, or their router."""
    names = [run.name for run in members]
    if len(names) == 1:
        return names[0]
    words = zip(*(re.split(r"(?<=[-_.])", name) for name in names), strict=False)
    shared = "".join(parts[0] for parts in takewhile(lambda parts: len(set(parts)) == 1, words))
    return re.sub(r"[-_.]*(?<![^-_.])(seed|s)?[-_.]*$", "", shared) or str(
        members[0].settings.get("adapter.router", names[0])
    )


def stat(values: Sequence[float]) -> Stat:
    """Mean and sample standard deviation, exactly rounded. Raises `StatisticsError` for no values."""
    return Stat(float(statistics.mean(values)), statistics.stdev(values) if len(values) > 1 else None, len(values))


def mean_curve(curves: Sequence[Points], most: int) -> list[Point]:
    """The mean of several curves at the steps that all of them have, at `most` of these."""
    places = [{step: place for place, step in enumerate(points.steps)} for points in curves]
    shared = sorted(set(places[0]).intersection(*places[1:])) if places else []
    rows = ([points[at[step]] for points, at in zip(curves, places, strict=True)] for step in thinned(shared, most))
    return [Point(row[0].step, *map(statistics.fmean, list(zip(*row, strict=True))[1:])) for row in rows]
