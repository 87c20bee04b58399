"""What a run takes and whether it fits: a custom `gr.HTML` component with a constant template."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from app.views.component import component

HERE = Path(__file__).parent


def preflight_view(**given: Any) -> gr.HTML:
    """The estimate, the measurement and the suggestions; its value is what `app.ui.panels.preflight.value_of` gives.

    Its event `select` carries `{"at"}`: the index of the suggestion that was clicked.
    """
    return component(HERE, "preflight", kit=False, **given)
