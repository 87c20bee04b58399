"""Memory, time and parameters of a run before it starts, and ways to reduce memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from app.views.component import view


def preflight_view(**options: Any) -> gr.HTML:
    """The component; its value is `{"estimate", "measurement", "state"}`, each as the preflight job writes it, or None.

    Its event `select` carries `{"at"}`: the suggestion that was clicked, counted from 0.
    """
    return view(Path(__file__).parent, "preflight", **options)
