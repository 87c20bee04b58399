"""The form that trains a finished run for longer, as a new run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gradio as gr

from app.services.run_control import continue_training
from app.ui.wiring import QUIET, run_or_warn

SCHEDULES = [("warms up again", "restart"), ("as planned so", "extend")]


@dataclass
class ContinuePanel:
    """The button that opens the form, and the form."""

    button: gr.Button
    form: gr.Row
    steps: gr.Number
    schedule: gr.Dropdown
    start: gr.Button


def build_continue(button: gr.Button, prefix: str) -> ContinuePanel:
    """Create the form, hidden, in the current layout block; its element ids begin with `prefix`."""
    with gr.Row(visible=False, elem_classes=["buttons", "at-bottom"], elem_id=f"{prefix}-continue-form") as form:
        steps = gr.Number(
            20,
            label="Further steps",
            precision=0,
            minimum=1,
            min_width=90,
            scale=1,
            elem_id=f"{prefix}-continue-steps",
        )
        schedule = gr.Dropdown(
            SCHEDULES,
            value="restart",
            label="Learning rate",
            min_width=120,
            scale=2,
            elem_id=f"{prefix}-continue-schedule",
        )
        size: dict[str, Any] = {"size": "md", "scale": 0, "min_width": 90}
        start = gr.Button("Continue", variant="primary", elem_id=f"{prefix}-continue-start", **size)
        cancel = gr.Button("Cancel", elem_id=f"{prefix}-continue-cancel", **size)
    button.click(lambda: gr.Row(visible=True), None, form, queue=False, **QUIET)
    cancel.click(lambda: gr.Row(visible=False), None, form, queue=False, **QUIET)
    return ContinuePanel(button, form, steps, schedule, start)


def on_continue(name: str, steps: float | None, schedule: str) -> list[Any]:
    """Start the longer run; returns the name of the run to show, and the form, which stays open if that failed."""
    made = run_or_warn(lambda: continue_training(name, steps, schedule))
    return [gr.skip(), gr.skip()] if made is None else [made.name, gr.Row(visible=False)]
