"""An atlas, or two side by side: the tables of the file that `mole atlas --html` writes, in the page's colours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gradio as gr

from app.views.component import BASICS, read_texts, view
from mole.analysis.atlas.page import PARTS

HERE = Path(__file__).parent


def atlas_view(**options: Any) -> gr.HTML:
    """The component; its value is what `atlas_value` returns, or None."""
    return view(
        HERE,
        "atlas",
        css_template=read_texts(HERE / "atlas.css", PARTS / "atlas.css"),
        js_on_load=read_texts(*BASICS, PARTS / "atlas.js", HERE / "atlas.js"),
        **options,
    )


def atlas_value(shown: dict[str, Any] | None) -> str | None:
    """`{"atlases": [one or two], "comparison": None or of the two}` as the component takes it.

    A text, because Gradio's page makes every object within a value reactive: seconds for the 80,000 of an atlas.
    """
    return None if shown is None else json.dumps(shown)
