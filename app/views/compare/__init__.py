"""The comparison of runs: results, curves, differing settings and routing, as numbers and plain text."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import gradio as gr

from app.views.component import view
from mole.analysis import tables
from mole.analysis.compare import ComparedRun, Comparison, SeedGroup, mean_curve
from mole.analysis.run_metrics import LossPoint
from mole.analysis.tables import Table
from mole.core.errors import InputError

CURVE_POINTS = 600
"""Points sent and drawn of a curve; a screen has hardly more pixels for it."""


def compare_view(**options: Any) -> gr.HTML:
    """The component; its value is what `comparison_value` returns."""
    return view(Path(__file__).parent, "compare", "plot", "compare", canvas=True, **options)


def comparison_value(comparison: Comparison) -> dict[str, Any]:
    """A comparison as the component takes it."""
    return {
        "names": [run.name for run in comparison.runs],
        "notes": list(comparison.notes),
        "legend": tables.LEGEND,
        "metrics": table_json(tables.metrics_table(comparison)),
        "settings": table_json(tables.settings_table(comparison)),
        "markdown": tables.markdown(comparison),
        "groups": [group_json(group) for group in comparison.groups],
    }


def table_json(table: Table) -> dict[str, Any]:
    """A table as JSON."""
    rows = [{**asdict(row), "best": sorted(row.best)} for row in table.rows]
    return {"head": list(table.head), "rows": rows}


def group_json(group: SeedGroup) -> dict[str, Any]:
    """A group: its runs, and the mean of their curves if there are several."""
    several = len(group.counted) > 1
    return {
        "label": group.label,
        "runs": [run_json(run) for run in group.runs],
        "counted": len(group.counted),
        "mean": {
            "train": curve_json(mean_curve([run.metrics.train for run in group.counted], CURVE_POINTS)),
            "evals": curve_json(mean_curve([run.metrics.evals for run in group.counted], CURVE_POINTS)),
        } if several else None,
    }  # fmt: skip


def run_json(run: ComparedRun) -> dict[str, Any]:
    """A run: its curves and its last routing."""
    return {
        "name": run.name,
        "seed": run.seed,
        "train": curve_json(run.metrics.train.thinned(CURVE_POINTS)),
        "evals": curve_json(run.metrics.evals.thinned(CURVE_POINTS)),
        "routing": last_routing(run),
        "no_routing": no_routing_text(run),
    }


def curve_json(points: list[LossPoint]) -> list[list[float]]:
    """`[step, seconds, tokens, loss]` of every point."""
    return [[at.step, round(at.seconds, 1), round(at.tokens, 0), round(at.loss, 6)] for at in points]


def last_routing(run: ComparedRun) -> dict[str, Any] | None:
    """The last routing statistics with the experts of each layer (`counts`); None without routing to show."""
    last = run.metrics.routing
    if last is None or last["experts"] < 2:
        return None
    try:
        adapter = run.run.config.adapter
    except InputError:
        return {**last, "counts": [last["experts"]] * last["layers"]}
    return {**last, "counts": adapter.experts_by_layer(last["layers"])}


def no_routing_text(run: ComparedRun) -> str:
    """The text shown in place of the routing of a run that has none."""
    if run.settings.get("adapter.router", run.status["router"]) == "lora":
        return "LoRA has one expert and no router: there is no routing."
    if run.metrics.routing is not None:
        return "It has one expert per layer: there is nothing to route."
    return "No routing has been logged yet."
