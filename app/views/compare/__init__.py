"""The comparison of runs on the page: one `gr.HTML` with a constant template, fed with numbers and plain text."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import gradio as gr

from app.views.component import view
from mole.analysis import tables
from mole.analysis.compare import ComparedRun, Comparison, SeedGroup, mean_curve
from mole.analysis.run_metrics import LossCurve, LossPoint
from mole.analysis.tables import Table
from mole.core.errors import InputError

POINTS = 600
"""LossCurve of a curve that are sent and drawn; a screen has few more pixels for it."""


def compare_view(**options: Any) -> gr.HTML:
    """The component; its value is what `shown` gives."""
    return view(Path(__file__).parent, "compare", "plot", "compare", canvas=True, **options)


def shown(comparison: Comparison) -> dict[str, Any]:
    """All the page draws and says of a comparison."""
    return {
        "names": [run.name for run in comparison.runs],
        "notes": list(comparison.notes),
        "legend": tables.LEGEND,
        "metrics": table(tables.metrics_table(comparison)),
        "settings": table(tables.settings_table(comparison)),
        "markdown": tables.markdown(comparison),
        "cells": [cell_shown(group) for group in comparison.groups],
    }


def table(made: Table) -> dict[str, Any]:
    """A table as JSON."""
    rows = [{**asdict(row), "best": sorted(row.best)} for row in made.rows]
    return {"head": list(made.head), "rows": rows}


def cell_shown(cell: SeedGroup) -> dict[str, Any]:
    """A group: the curves of its runs, their mean when they are several, and the routing of each."""
    several = len(cell.counted) > 1
    return {
        "label": cell.label,
        "runs": [run_shown(run) for run in cell.runs],
        "counted": len(cell.counted),
        "mean": {
            "train": rows(mean_curve([run.metrics.train for run in cell.counted], POINTS)),
            "evals": rows(mean_curve([run.metrics.evals for run in cell.counted], POINTS)),
        } if several else None,
    }  # fmt: skip


def run_shown(run: ComparedRun) -> dict[str, Any]:
    """A run: its curves and its last routing."""
    return {
        "name": run.name,
        "seed": run.seed,
        "train": thinned(run.metrics.train),
        "evals": thinned(run.metrics.evals),
        "routing": routing(run),
        "no_routing": why_no_routing(run),
    }


def thinned(points: LossCurve) -> list[list[float]]:
    return rows(points.thinned(POINTS))


def rows(points: list[LossPoint]) -> list[list[float]]:
    """`[step, seconds, tokens, loss]` of every point."""
    return [[at.step, round(at.seconds, 1), round(at.tokens, 0), round(at.loss, 6)] for at in points]


def routing(run: ComparedRun) -> dict[str, Any] | None:
    """The last routing statistics with the experts of each layer (`counts`); None when there is nothing to see."""
    last = run.metrics.routing
    if last is None or last["experts"] < 2:
        return None
    try:
        adapter = run.run.config.adapter
    except InputError:
        return {**last, "counts": [last["experts"]] * last["layers"]}
    return {**last, "counts": adapter.experts_by_layer(last["layers"])}


def why_no_routing(run: ComparedRun) -> str:
    """What stands where the routing would."""
    if run.settings.get("adapter.router", run.status["router"]) == "lora":
        return "LoRA has one expert and no router: there is no routing."
    if run.metrics.routing is not None:
        return "It has one expert a layer: there is nothing to route."
    return "No routing has been logged yet."
