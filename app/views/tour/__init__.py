"""A short tour: a card that shows itself on the first visit, goes through the tabs, and stays away once closed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from app.views.component import component

HERE = Path(__file__).parent


def tour(**given: Any) -> gr.HTML:
    """The component; whether it was closed before is kept in the browser. `Tour` in the masthead opens it again."""
    return component(HERE, "tour", kit=False, elem_id="tour", **given)
