"""The live view of a run, the list of runs, and a run's evaluations: `gr.HTML` components with constant templates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from app.views.component import component

HERE = Path(__file__).parent


def run_view(**given: Any) -> gr.HTML:
    """Progress, curves and routing of one run; its value is what `app.services.charts.delta` gives."""
    return component(HERE, "run", "run", "run_curves", "run_routing", **given)


def run_list(**given: Any) -> gr.HTML:
    """All runs; its value is what `Listing.since` gives with `chosen`, the name of the run that is shown.

    Its event `select` carries `{"name"}`, its event `input` `{"compare": [names]}`, the runs marked for comparison.
    """
    return component(HERE, "list", **given)


def evaluation_list(**given: Any) -> gr.HTML:
    """A run's evaluations; its value is `list_evaluations(run)`, its event `select` `{"number"}`."""
    return component(HERE, "evaluations", **given)
