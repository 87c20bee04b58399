"""The list of runs: search, filter, groups, and marks for comparison."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from app.views.component import view


def run_list(**options: Any) -> gr.HTML:
    """The component; its value is what `Listing.since` returns, with the shown run's name as `chosen`.

    Its event `select` carries `{"name"}`; its event `input` carries `{"compare": [names]}`, the runs marked for
    comparison.
    """
    return view(Path(__file__).parent, "run_list", **options)
