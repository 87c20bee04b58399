"""What the model sees: rows of the chosen data as tokens, on request."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gradio as gr

from app import settings
from app.ui.forms import RunForm
from app.ui.wiring import on_change
from app.views.preview import STALE, preview_value, preview_view, rejected_value
from app.views.problem import problem_value
from mole.core.errors import MoleError
from mole.preflight.data_process import preview_of

PREVIEW_ROWS = 8


@dataclass
class PreviewPanel:
    """The components."""

    button: gr.Button
    view: gr.HTML


def build_preview_panel() -> PreviewPanel:
    """Create the button and its view in the current layout block; call `wire_preview` once the form is complete."""
    button = gr.Button("Show what the model sees", size="md", elem_id="preview")
    return PreviewPanel(button, preview_view(elem_id="preview-view"))


def wire_preview(panel: PreviewPanel, form: RunForm, note: gr.HTML) -> None:
    """The button shows the preview, or the problem in `note`; a change of model or data marks the preview as stale."""

    def show(*values: Any) -> list[Any]:
        try:
            config = form.config(values)
            settings.check_public(config)
            return [problem_value(), preview_value(preview_of(config, PREVIEW_ROWS), config)]
        except MoleError as error:
            return [form.problem_of(values, error, reveal=True), rejected_value(getattr(error, "rejected", []))]

    panel.button.click(
        show,
        form.inputs,
        [note, panel.view],
        show_progress_on=panel.button,
        concurrency_limit=2,
        api_visibility="private",
    )
    previewed = [made for name, made in form.shared.items() if name.startswith(("model.name", "data."))]
    previewed += form.further.inputs if form.further else []
    on_change(previewed, lambda: STALE, None, panel.view, queue=False)
