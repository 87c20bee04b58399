"""The live view of a run: progress, loss curves, alarms and routing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from app.views.component import view


def run_view(**options: Any) -> gr.HTML:
    """The component; its value is what `app.services.live_updates.run_update` returns."""
    return view(Path(__file__).parent, "run", "run", "run_curves", "run_routing", canvas=True, **options)
