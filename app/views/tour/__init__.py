"""A short tour: a card that appears on the first visit, leads through the tabs, and stays away once closed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from app.views.component import view


def tour(**options: Any) -> gr.HTML:
    """The component; whether it was closed is kept in the browser. `Tour` in the header opens it again."""
    return view(Path(__file__).parent, "tour", elem_id="tour", **options)
