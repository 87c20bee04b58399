"""What is wrong with a form: one line above its button, and the same beside the field."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from app.views.component import view


def problem_view(**options: Any) -> gr.HTML:
    """The component; its value is what `problem_value` returns."""
    return view(Path(__file__).parent, "problem", **options)


def problem_value(text: str = "", field: str = "", reveal: bool = False, inside: Sequence[str] = ()) -> dict[str, Any]:
    """A problem, or none.

    Args:
        text: the line; empty for no problem.
        field: element id of the field it is about; empty for none.
        reveal: whether the page scrolls to the field.
        inside: element ids of the accordions around the field, outermost first; they are opened to show it.
    """
    return {"text": text, "field": field, "reveal": reveal, "inside": list(inside)}
