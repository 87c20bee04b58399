"""Routing overrides: sliders with the trained value marked, and a chip for every expert."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from app.views.component import view


def steering_view(**options: Any) -> gr.HTML:
    """The component; its value is what `app.services.steering_options` returns, with the person's choices in it."""
    return view(Path(__file__).parent, "steering", canvas=True, **options)
