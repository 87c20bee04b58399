"""Rows of data as the tokens a model is trained on: a custom `gr.HTML` with a constant template."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from app.views.component import component

HERE = Path(__file__).parent


def preview_view(**given: Any) -> gr.HTML:
    """The component; its value is `app.ui.panels.preview.packed` or `refused`, or `{"stale": true}` after a change."""
    return component(HERE, "preview", **given)
