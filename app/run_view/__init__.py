"""The live view of a run, and the list of runs: two custom `gr.HTML` components with constant templates."""

from __future__ import annotations

from pathlib import Path

import gradio as gr

from app.routing_view import script

HERE = Path(__file__).parent


def _view(name: str, **given: object) -> gr.HTML:
    return gr.HTML(
        html_template=(HERE / f"{name}.html").read_text(encoding="utf-8"),
        css_template=(HERE / f"{name}.css").read_text(encoding="utf-8"),
        js_on_load=script(HERE / f"{name}.js"),
        apply_default_css=False,
        container=False,
        **given,  # type: ignore[arg-type]
    )


def run_view(**given: object) -> gr.HTML:
    """Progress, curves and routing load of one run; its value is what `app.charts.delta` gives."""
    return _view("run", **given)


def run_list(**given: object) -> gr.HTML:
    """All runs; its value is `{"runs": [status], "chosen": name}`, its event `select` carries `{"name"}`."""
    return _view("list", **given)
