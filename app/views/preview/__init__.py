"""Rows of data as the tokens that the model is trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from app.views.component import view


def preview_view(**options: Any) -> gr.HTML:
    """The component; its value is `app.ui.panels.preview.packed` or `refused`, or `{"stale": true}` after a change."""
    return view(Path(__file__).parent, "preview", canvas=True, **options)
