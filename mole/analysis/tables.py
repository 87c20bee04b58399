"""A comparison of runs as tables of text: for the terminal, for a paper in Markdown, and for the page. No torch."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mole.analysis.compare import Cell, Compared, Comparison, Metric, Stat, shortened

ABSENT = "–"
LEGEND = (
    "Groups: mean ± sample standard deviation (n − 1) over the finished runs, which differ in the seed alone. "
    "Training loss: mean over the last tenth of the logged steps."
)


@dataclass(frozen=True)
class Row:
    """A row of a table: its cells, the columns whose value is the best, and whether it is a seed of the row above."""

    cells: tuple[str, ...]
    best: frozenset[int] = frozenset()
    inner: bool = False


@dataclass(frozen=True)
class Table:
    """A table: its heads, and its rows with as many cells."""

    head: tuple[str, ...]
    rows: tuple[Row, ...]


def settings_table(comparison: Comparison) -> Table:
    """The settings that differ, a column a group; a group has several values in nothing but its seeds."""
    rows = []
    for name, values in comparison.differences.items():
        short = shortened(values.values())
        texts = [setting_text([values[run.name] for run in cell.runs if run.name in values], short)
                 for cell in comparison.cells]  # fmt: skip
        rows.append(Row((name, *texts)))
    return Table(("Setting", *(cell.label for cell in comparison.cells)), tuple(rows))


def setting_text(values: Sequence[Any], short: Mapping[str, str]) -> str:
    """The values of a setting in words, each once."""
    return ", ".join(dict.fromkeys(value_text(value, short) for value in values)) or ABSENT


def value_text(value: Any, short: Mapping[str, str]) -> str:
    """A setting's value as people write it."""
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
    """What came out: a row a group with mean ± deviation, beneath it a row a seed; a group of one run is that run."""
    columns = comparison.metrics
    best = [comparison.best(metric) for metric in columns]
    rows = []
    for cell in comparison.cells:
        texts = tuple(stat_text(cell.stats.get(metric.key), metric) for metric in columns)
        marks = frozenset(place for place, labels in enumerate(best, 1) if cell.label in labels)
        rows.append(Row((cell_title(cell), *texts), marks))
        if len(cell.runs) > 1:
            rows += [Row((run_title(run), *run_texts(run, columns)), inner=True) for run in cell.runs]
    return Table(("Run", *(metric.title for metric in columns)), tuple(rows))


def cell_title(cell: Cell) -> str:
    """A group's label with how many runs are counted; of a run that has not finished, its state."""
    if len(cell.runs) == 1:
        return cell.label + unfinished(cell.runs[0])
    left_out = len(cell.runs) - len(cell.counted)
    return f"{cell.label} (n = {len(cell.counted)}{f', {left_out} unfinished left out' if left_out else ''})"


def run_title(run: Compared) -> str:
    """A run with its seed."""
    return f"{run.name}{f' (seed {run.seed})' if run.seed is not None else ''}{unfinished(run)}"


def unfinished(run: Compared) -> str:
    """Its state, unless it has finished."""
    return "" if run.finished else f" [{run.status['state']}]"


def run_texts(run: Compared, columns: Sequence[Metric]) -> tuple[str, ...]:
    """A run's metrics in words."""
    return tuple(figure(run.values[m.key] * m.factor) if m.key in run.values else ABSENT for m in columns)


def stat_text(stat: Stat | None, metric: Metric) -> str:
    """`0.0472 ± 0.0013`: the deviation with two significant digits, the mean as exact as it."""
    if stat is None:
        return ABSENT
    mean = stat.mean * metric.factor
    if stat.sd is None or (not stat.sd and not metric.better):
        return figure(mean)
    sd = stat.sd * metric.factor
    if sd <= 1e-9 * abs(mean):  # the same number but for its rounding
        return f"{figure(mean)} ± 0"
    decimals = max(0, 1 - math.floor(math.log10(sd)))
    return f"{mean:,.{decimals}f} ± {sd:,.{decimals}f}"


def figure(value: float) -> str:
    """A number with four significant digits, thousands in full."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def markdown(comparison: Comparison) -> str:
    """Both tables and the notes in Markdown; the best values are bold."""
    results, settings = metrics_table(comparison), settings_table(comparison)
    parts = [table_markdown(results), LEGEND, *(escaped(note) for note in comparison.notes)]
    if settings.rows:
        parts += ["Settings that differ:", table_markdown(settings)]
    return "\n\n".join(parts) + "\n"


def table_markdown(table: Table) -> str:
    """A table in Markdown, numbers to the right."""

    def line(cells: Sequence[str]) -> str:
        return f"| {' | '.join(cells)} |"

    lines = [line([escaped(text) for text in table.head]), line(["---", *["---:"] * (len(table.head) - 1)])]
    for row in table.rows:
        texts = [f"**{escaped(text)}**" if place in row.best else escaped(text) for place, text in enumerate(row.cells)]
        lines.append(line([f"↳ {texts[0]}" if row.inner else texts[0], *texts[1:]]))
    return "\n".join(lines)


def escaped(text: str) -> str:
    """Text that means nothing in Markdown or HTML, in one line."""
    return re.sub(r"([\\`*<>\[\]|~])", r"\\\1", " ".join(text.split()))


def terminal(comparison: Comparison) -> list[tuple[list[str], list[list[str]]]]:
    """The tables as heads and rows for a terminal; an asterisk marks the best value, seeds are set in."""
    results, settings = metrics_table(comparison), settings_table(comparison)
    rows = [
        [("  " if row.inner else "") + row.cells[0],
         *(f"{text} *" if place in row.best else text for place, text in enumerate(row.cells[1:], 1))]
        for row in results.rows
    ]  # fmt: skip
    tables = [(list(results.head), rows)]
    return [*tables, (list(settings.head), [list(row.cells) for row in settings.rows])] if settings.rows else tables
