"""The component to steer a reply with: sliders with the trained value marked, and a chip for every expert."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from app.views.component import component

HERE = Path(__file__).parent


def steering_view(**given: Any) -> gr.HTML:
    """The component; its value is what `app.services.steering_options` gives, and holds what the person chose."""
    return component(HERE, "steering", **given)
