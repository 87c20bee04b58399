"""Compares runs: settings that differ, final metrics, and their mean and standard deviation over seeds.

This module computes numbers; `mole.analysis.tables` formats them as tables. Does not import torch.
"""

from __future__ import annotations

import json
import math
import re
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import takewhile
from pathlib import PurePath
from typing import Any

from mole.analysis.run_metrics import LossCurve, LossPoint, RunMetrics, evenly_spaced, read_metrics
from mole.core.errors import InputError, RunError
from mole.evaluation import job as evaluation_job
from mole.runs.event_reader import number, numbers
from mole.runs.run import Run
from mole.runs.store import get

MAX_DRAWN = 8
"""Maximum number of runs in one chart: more lines cannot be distinguished."""
SEED, DEVICE = "training.seed", "model.device"
NOT_A_SETTING = ("name", "group")


@dataclass(frozen=True)
class Metric:
    """A final number of a run: its key, its title with the unit, and the factor that converts to that unit."""

    key: str
    title: str
    better: str = ""
    """Which values are better: `low`, `high`, or empty for neither."""
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
class ComparedRun:
    """One run of a comparison, as it was when it was read."""

    run: Run
    status: Mapping[str, Any]
    settings: Mapping[str, Any]
    """Dotted name → value; empty when `run.yaml` cannot be read."""
    metrics: RunMetrics
    evaluations: Mapping[str, float] = field(default_factory=dict)
    """See `evaluation_results`."""

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
        """The metrics that are known of this run, by key."""
        return {**final_metrics(self.metrics), **self.evaluations}


@dataclass(frozen=True)
class Stat:
    """Mean and sample standard deviation (n − 1) over n runs; `sd` is None for one run."""

    mean: float
    sd: float | None
    n: int


@dataclass(frozen=True)
class SeedGroup:
    """Runs that differ only in seed and name."""

    label: str
    runs: tuple[ComparedRun, ...]

    @property
    def counted(self) -> tuple[ComparedRun, ...]:
        """The runs that count for the means: the finished ones, or all if none has finished."""
        return tuple(run for run in self.runs if run.finished) or self.runs

    @property
    def finished(self) -> bool:
        return any(run.finished for run in self.runs)

    @cached_property
    def stats(self) -> dict[str, Stat]:
        """Mean and standard deviation of each metric, over the runs that have it."""
        keys = dict.fromkeys(key for run in self.counted for key in run.values)
        return {key: mean_and_sd([run.values[key] for run in self.counted if key in run.values]) for key in keys}


@dataclass(frozen=True)
class Comparison:
    """Several runs, their groups and their differences."""

    runs: tuple[ComparedRun, ...]
    groups: tuple[SeedGroup, ...]
    differences: Mapping[str, Mapping[str, Any]]
    """Setting → run → value, for settings that differ; runs without the setting are missing."""
    notes: tuple[str, ...] = field(default=())

    @cached_property
    def metrics(self) -> tuple[Metric, ...]:
        """The metrics that at least one run has: the fixed ones, then those of evaluations, by file."""
        found = {key for run in self.runs for key in run.values}
        extra = dict.fromkeys(key for run in self.runs for key in run.values if key.startswith("eval:"))
        if all(run.values.get("best_eval_loss") == run.values.get("eval_loss") for run in self.runs):
            found.discard("best_eval_loss")  # the last evaluation was the best, or the only one
        fixed = tuple(metric for metric in METRICS if metric.key in found)
        return fixed + tuple(evaluation_metric(key) for key in extra)

    def best(self, metric: Metric) -> frozenset[str]:
        """Labels of the finished groups with the best mean; empty when fewer than two groups have the metric."""
        means = {group.label: group.stats[metric.key].mean for group in self.groups
                 if group.finished and metric.key in group.stats}  # fmt: skip
        if not metric.better or len(means) < 2 or len(set(means.values())) < 2:
            return frozenset()
        top = min(means.values()) if metric.better == "low" else max(means.values())
        return frozenset(label for label, mean in means.items() if mean == top)

    def to_dict(self) -> dict[str, Any]:
        """The comparison as JSON values."""
        return {
            "runs": [{**run.status, "seed": run.seed, "metrics": run.values} for run in self.runs],
            "differences": {name: dict(values) for name, values in self.differences.items()},
            "groups": [
                {
                    "label": group.label,
                    "runs": [run.name for run in group.runs],
                    "counted": [run.name for run in group.counted],
                    "metrics": {key: {"mean": s.mean, "sd": s.sd, "n": s.n} for key, s in group.stats.items()},
                }
                for group in self.groups
            ],
            "notes": list(self.notes),
        }


def compare(names: Sequence[str], most: int | None = None, seconds: float = math.inf) -> Comparison:
    """Read and compare runs by name, at most the first `most` of them.

    Missing and unfinished runs, and those above `most`, are named in `notes`, and so is how far the events were read
    when that takes longer than `seconds`; the next comparison reads on.
    """
    ends = time.perf_counter() + seconds
    found: list[ComparedRun] = []
    notes: list[str] = []
    for name in dict.fromkeys(names):
        try:
            found.append(read_run(get(name), ends - time.perf_counter()))
        except (RunError, OSError):
            notes.append(f"The run {name} was deleted.")
    if most is not None and len(found) > most:
        notes.append(f"Up to {most} runs can be compared: {', '.join(run.name for run in found[most:])} left out.")
        found = found[:most]
    for run in found:
        if not run.settings:
            notes.append(f"The settings of {run.name} cannot be read.")
        if not run.finished:
            state, step = run.status["state"], run.status["step"]
            notes.append(f"{run.name} is {state} at step {step}: its numbers are not final.")
        if run.metrics.share < 1:
            notes.append(f"The events of {run.name} are long: {run.metrics.share:.0%} of them have been read so far.")
    settings = differing({run.name: run.settings for run in found})
    facts = differing({run.name: run.metrics.facts for run in found}, missing_differs=False)
    return Comparison(tuple(found), group_by_seed(found), {**settings, **facts}, tuple(notes))


def read_run(run: Run, seconds: float = math.inf) -> ComparedRun:
    """Read the settings, state, metrics and evaluations of a run; of the metrics, what can be read in `seconds`."""
    try:
        settings = flatten(run.config.to_dict())
    except InputError:
        settings = {}
    return ComparedRun(run, run.status(), settings, read_metrics(run, seconds), evaluation_results(run))


# ---------------------------------------------------------------------------------------------------------
# Settings


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted name, without the run's `name` and `group`."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        if not prefix and key in NOT_A_SETTING:
            continue
        if isinstance(value, Mapping):
            result.update(flatten(value, f"{prefix}{key}."))
        else:
            result[f"{prefix}{key}"] = value
    return result


def differing(configs: Mapping[str, Mapping[str, Any]], missing_differs: bool = True) -> dict[str, dict[str, Any]]:
    """Setting → run → value, for the settings that differ; runs without the setting are missing.

    Runs with an empty config are ignored. Whether a run without a setting differs in it is for `missing_differs`.
    """
    known = {run: config for run, config in configs.items() if config}
    names = dict.fromkeys(name for config in known.values() for name in config)
    rows = {name: {run: config[name] for run, config in known.items() if name in config} for name in names}
    return {
        name: row for name, row in rows.items()
        if (missing_differs and len(row) < len(known)) or len({canonical(value) for value in row.values()}) > 1
    }  # fmt: skip


def canonical(value: Any) -> str:
    """A text that is equal for equal values: 16 and 16.0 are equal, True and 1 are not."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return json.dumps(value, sort_keys=True, default=str)


def short_paths(values: Iterable[Any]) -> dict[str, str]:
    """Absolute path → its shortest ending that is still unique among the values; other strings map to themselves."""
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


def final_metrics(metrics: RunMetrics) -> dict[str, float]:
    """The known values of `METRICS` by key.

    The training loss is the mean over the last tenth of the logged steps, because that of a single step is noisy.
    """
    held_out, losses = metrics.evals.losses, metrics.train.losses
    values: dict[str, float | None] = {
        "eval_loss": held_out[-1] if held_out else None,
        "best_eval_loss": min(held_out, default=None),
        "train_loss": statistics.fmean(losses[-math.ceil(len(losses) / 10) :]) if losses else None,
        "seconds": metrics.seconds,
        "tokens_per_second": metrics.tokens_per_second,
        "memory_mb": metrics.memory_mb,
        "trainable_parameters": metrics.trainable_parameters,
    }
    return {key: value for key, value in values.items() if value is not None}


def evaluation_metric(key: str) -> Metric:
    """The metric of an `eval:METRIC:ROWS:CONTENT:FILE` key."""
    _, name, rows, _, file = key.split(":", 4)
    where = f"{file}, {rows} rows"
    if name in RATES:
        return Metric(key, f"{RATES[name]} (%), {where}", "high", 100.0)
    return Metric(key, f"{name.replace('_', ' ').capitalize()}, {where}", "low" if name == "perplexity" else "")


def evaluation_results(run: Run) -> dict[str, float]:
    """Metrics of the final adapter's evaluations by `eval:METRIC:ROWS:CONTENT:FILE`; the newest one per key."""
    values: dict[str, float] = {}
    for evaluation in reversed(evaluation_job.evaluations_of(run)):
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


def group_by_seed(runs: Sequence[ComparedRun]) -> tuple[SeedGroup, ...]:
    """Group runs that differ only in seed and name and were trained on the same data, in the order of the runs."""
    groups: list[list[ComparedRun]] = []
    for run in runs:
        for members in groups:
            if run.settings and all(differ_in_seed_only(run, member) for member in members):
                members.append(run)
                break
        else:
            groups.append([run])
    labels = [group_label(members) for members in groups]
    return tuple(
        SeedGroup(text if labels.count(text) == 1 else ", ".join(run.name for run in members), tuple(members))
        for text, members in zip(labels, groups, strict=True)
    )


def differ_in_seed_only(one: ComparedRun, other: ComparedRun) -> bool:
    """Whether two runs differ at most in their seed; facts that a queued run does not have yet are ignored.

    The device's number is ignored too: the kind of device is one of the facts.
    """
    mine, theirs = (
        {name: canonical(value) for name, value in run.settings.items() if name not in (SEED, DEVICE)}
        for run in (one, other)
    )
    shared = one.metrics.facts.keys() & other.metrics.facts.keys()
    return mine == theirs and all(one.metrics.facts[key] == other.metrics.facts[key] for key in shared)


def group_label(members: Sequence[ComparedRun]) -> str:
    """A name for a group: the name of its only run, the prefix its runs' names share, or else their router."""
    names = [run.name for run in members]
    if len(names) == 1:
        return names[0]
    words = zip(*(re.split(r"(?<=[-_.])", name) for name in names), strict=False)
    shared = "".join(parts[0] for parts in takewhile(lambda parts: len(set(parts)) == 1, words))
    return re.sub(r"[-_.]*(?<![^-_.])(seed|s)?[-_.]*$", "", shared) or str(
        members[0].settings.get("adapter.router", names[0])
    )


def mean_and_sd(values: Sequence[float]) -> Stat:
    """Mean and sample standard deviation, exactly rounded. Raises `StatisticsError` for no values."""
    return Stat(float(statistics.mean(values)), statistics.stdev(values) if len(values) > 1 else None, len(values))


def mean_curve(curves: Sequence[LossCurve], most: int) -> list[LossPoint]:
    """The mean of several curves at the steps that all of them have, thinned to at most `most` steps."""
    places = [{step: place for place, step in enumerate(points.steps)} for points in curves]
    shared = sorted(set(places[0]).intersection(*places[1:])) if places else []
    rows = (
        [points[at[step]] for points, at in zip(curves, places, strict=True)] for step in evenly_spaced(shared, most)
    )
    return [LossPoint(row[0].step, *map(statistics.fmean, list(zip(*row, strict=True))[1:])) for row in rows]
