"""Formats a comparison of runs as tables: for the terminal, as Markdown, and for the page. Does not import torch."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mole.analysis.compare import ComparedRun, Comparison, Metric, SeedGroup, Stat, short_paths

ABSENT = "–"
LEGEND = (
    "Groups: mean ± sample standard deviation (n − 1) over the finished runs, which differ in the seed alone. "
    "Training loss: mean over the last tenth of the logged steps."
)


@dataclass(frozen=True)
class Row:
    """A row of a table: its cells, the columns with a best value, and whether it is one run of the group above."""

    cells: tuple[str, ...]
    best: frozenset[int] = frozenset()
    inner: bool = False


@dataclass(frozen=True)
class Table:
    """A table: the column titles, and rows with as many cells."""

    head: tuple[str, ...]
    rows: tuple[Row, ...]


def settings_table(comparison: Comparison) -> Table:
    """The settings that differ, one column per group; a group has several values for its seed only."""
    rows = []
    for name, values in comparison.differences.items():
        short = short_paths(values.values())
        texts = [cell_text([values[run.name] for run in group.runs if run.name in values], short)
                 for group in comparison.groups]  # fmt: skip
        rows.append(Row((name, *texts)))
    return Table(("Setting", *(group.label for group in comparison.groups)), tuple(rows))


def cell_text(values: Sequence[Any], short: Mapping[str, str]) -> str:
    """The distinct values of a setting as text."""
    return ", ".join(dict.fromkeys(value_text(value, short) for value in values)) or ABSENT


def value_text(value: Any, short: Mapping[str, str]) -> str:
    """One value of a setting as text."""
    if value is None:
        return "not set"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return ", ".join(value_text(entry, short) for entry in value)
    if isinstance(value, float):
        return repr(value).removesuffix(".0")
    return short.get(value, value) if isinstance(value, str) else str(value)


def metrics_table(comparison: Comparison) -> Table:
    """The metrics: a row per group with mean ± standard deviation, followed by a row per run if it has several."""
    columns = comparison.metrics
    best = [comparison.best(metric) for metric in columns]
    rows = []
    for group in comparison.groups:
        texts = tuple(stat_text(group.stats.get(metric.key), metric) for metric in columns)
        marks = frozenset(place for place, labels in enumerate(best, 1) if group.label in labels)
        rows.append(Row((group_title(group), *texts), marks))
        if len(group.runs) > 1:
            rows += [Row((run_title(run), *run_texts(run, columns)), inner=True) for run in group.runs]
    return Table(("Run", *(metric.title for metric in columns)), tuple(rows))


def group_title(group: SeedGroup) -> str:
    """A group's label with the number of runs that count, or the state of its only run if that has not finished."""
    if len(group.runs) == 1:
        return group.label + state_text(group.runs[0])
    left_out = len(group.runs) - len(group.counted)
    return f"{group.label} (n = {len(group.counted)}{f', {left_out} unfinished left out' if left_out else ''})"


def run_title(run: ComparedRun) -> str:
    """A run's name, seed and state."""
    return f"{run.name}{f' (seed {run.seed})' if run.seed is not None else ''}{state_text(run)}"


def state_text(run: ComparedRun) -> str:
    """A run's state in brackets; empty for a finished run."""
    return "" if run.finished else f" [{run.status['state']}]"


def run_texts(run: ComparedRun, columns: Sequence[Metric]) -> tuple[str, ...]:
    """A run's metrics as text, one per column."""
    return tuple(number_text(run.values[m.key] * m.factor) if m.key in run.values else ABSENT for m in columns)


def stat_text(stat: Stat | None, metric: Metric) -> str:
    """`0.0472 ± 0.0013`: the deviation has two significant digits, the mean as many decimals."""
    if stat is None:
        return ABSENT
    mean = stat.mean * metric.factor
    if stat.sd is None or (not stat.sd and not metric.better):
        return number_text(mean)
    sd = stat.sd * metric.factor
    if sd <= 1e-9 * abs(mean):  # equal up to rounding
        return f"{number_text(mean)} ± 0"
    decimals = max(0, 1 - math.floor(math.log10(sd)))
    return f"{mean:,.{decimals}f} ± {sd:,.{decimals}f}"


def number_text(value: float) -> str:
    """A number with four significant digits, without decimals from 1000 on."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def markdown(comparison: Comparison) -> str:
    """Both tables and the notes as Markdown, with the best values in bold."""
    results, settings = metrics_table(comparison), settings_table(comparison)
    parts = [table_markdown(results), LEGEND, *(escaped(note) for note in comparison.notes)]
    if settings.rows:
        parts += ["Settings that differ:", table_markdown(settings)]
    return "\n\n".join(parts) + "\n"


def table_markdown(table: Table) -> str:
    """A table as Markdown, with all columns but the first aligned right."""

    def line(cells: Sequence[str]) -> str:
        return f"| {' | '.join(cells)} |"

    lines = [line([escaped(text) for text in table.head]), line(["---", *["---:"] * (len(table.head) - 1)])]
    for row in table.rows:
        texts = [f"**{escaped(text)}**" if place in row.best else escaped(text) for place, text in enumerate(row.cells)]
        lines.append(line([f"↳ {texts[0]}" if row.inner else texts[0], *texts[1:]]))
    return "\n".join(lines)


def escaped(text: str) -> str:
    """Escape Markdown and HTML in a text, and join its lines."""
    return re.sub(r"([\\`*<>\[\]|~])", r"\\\1", " ".join(text.split()))


def terminal(comparison: Comparison) -> list[tuple[list[str], list[list[str]]]]:
    """The tables as titles and rows for the terminal; best values end in an asterisk, runs of a group are indented."""
    results, settings = metrics_table(comparison), settings_table(comparison)
    rows = [
        [("  " if row.inner else "") + row.cells[0],
         *(f"{text} *" if place in row.best else text for place, text in enumerate(row.cells[1:], 1))]
        for row in results.rows
    ]  # fmt: skip
    tables = [(list(results.head), rows)]
    return [*tables, (list(settings.head), [list(row.cells) for row in settings.rows])] if settings.rows else tables
