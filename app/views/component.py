"""Components of our own: a `gr.HTML` with a constant template, its styles and scripts in files of one folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

KIT = tuple(Path(__file__).parent / "routing" / f"{name}.js" for name in ("kit", "heatmap"))
"""Drawing, for whoever draws: colours, curves, heatmaps."""


def script(*parts: Path) -> str:
    """The JavaScript in some files, one after the other."""
    return "\n".join(path.read_text(encoding="utf-8") for path in parts)


def component(folder: Path, name: str, *scripts: str, kit: bool = True, **given: Any) -> gr.HTML:
    """`NAME.html` and `NAME.css` of a folder, with the scripts that are named (`NAME.js` if none is).

    `kit` puts the drawing kit before them; `given` are further arguments of `gr.HTML`, and go over these.
    """
    files = [folder / f"{part}.js" for part in scripts or (name,)]
    settings: dict[str, Any] = {
        "html_template": (folder / f"{name}.html").read_text(encoding="utf-8"),
        "css_template": (folder / f"{name}.css").read_text(encoding="utf-8"),
        "js_on_load": script(*(KIT if kit else ()), *files),
        "apply_default_css": False,
        "container": False,
    }
    return gr.HTML(**{**settings, **given})
