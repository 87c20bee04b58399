"""A line of plain text under a field: what is known about its value."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from app.views.component import view


def status_line(**options: Any) -> gr.HTML:
    """The component; its value is what `status_value` returns."""
    return view(Path(__file__).parent, "status_line", **options)


def status_value(text: str = "", tone: str = "") -> dict[str, str]:
    """A line of text, and its tone: `bad` for an error."""
    return {"text": text, "tone": tone}
