"""The evaluations of a run, newest first."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from app.views.component import view


def evaluation_list(**options: Any) -> gr.HTML:
    """The component; its value is `list_evaluations(run)`, its event `select` carries `{"number"}` to cancel."""
    return view(Path(__file__).parent, "evaluations", **options)
