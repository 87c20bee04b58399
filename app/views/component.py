"""The one way to make a view: a `gr.HTML` with a constant template, its styles and scripts in files of one folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

SHARED = Path(__file__).parent / "shared"
BASICS = (SHARED / "dom.js", SHARED / "text.js")
"""Elements and texts, for every view."""
CANVAS = (SHARED / "canvas.js", SHARED / "heatmap.js")
"""Colours, curves and heatmaps, for the views that draw."""


def read_texts(*paths: Path) -> str:
    """The text of some files, one after the other."""
    return "\n".join(path.read_text(encoding="utf-8") for path in paths)


def view(folder: Path, name: str, *scripts: str, canvas: bool = False, **options: Any) -> gr.HTML:
    """A component from a folder's `NAME.html` and `NAME.css`.

    Args:
        folder: the view's folder.
        name: of its template and its style sheet.
        scripts: its scripts, in order, without `.js`; `name` if none is given.
        canvas: whether it draws, and needs the shared scripts for that.
        options: further arguments of `gr.HTML`; they override those set here.
    """
    shared = (*BASICS, *CANVAS) if canvas else BASICS
    settings: dict[str, Any] = {
        "html_template": read_texts(folder / f"{name}.html"),
        "css_template": read_texts(folder / f"{name}.css"),
        "js_on_load": read_texts(*shared, *(folder / f"{part}.js" for part in scripts or (name,))),
        "apply_default_css": False,
        "container": False,
    }
    return gr.HTML(**{**settings, **options})
