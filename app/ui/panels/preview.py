"""What the model sees: rows of the chosen data as tokens, at the press of a button."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from app import settings
from app.ui import forms
from app.ui.wiring import on_change
from app.views.preview import preview_view
from app.views.problem import problem_value
from mole.config import RunConfig
from mole.core.errors import MoleError
from mole.data import RejectedRow
from mole.preflight.preview import MAX_REJECTIONS, Preview, PreviewRow, preview

ROWS = 8


@dataclass
class PreviewPanel:
    """The components."""

    button: gr.Button
    view: gr.HTML


def build() -> PreviewPanel:
    """The button and what it shows, where we stand in the layout."""
    button = gr.Button("Show what the model sees", size="md", elem_id="preview")
    return PreviewPanel(button, preview_view(elem_id="preview-view"))


def wire(panel: PreviewPanel, form: forms.RunForm, note: gr.HTML) -> None:
    """Press to look; what is wrong is said in `note`, at its field. To be called once the form is complete."""

    def look(*values: Any) -> list[Any]:
        try:
            config = form.config(values)
            settings.check_public(config)
            return [problem_value(), packed(preview(config, ROWS), config)]
        except MoleError as error:
            return [form.problem_of(values, error, reveal=True), refused(getattr(error, "rejected", []))]

    panel.button.click(
        look,
        form.inputs,
        [note, panel.view],
        show_progress_on=panel.button,
        concurrency_limit=2,
        api_visibility="private",
    )
    concerned: list[Any] = [made for name, made in form.shared.items() if name.startswith(("model.name", "data."))]
    on_change(concerned, lambda: {"stale": True}, None, panel.view, queue=False)


def listed(rejected: Sequence[RejectedRow]) -> list[dict[str, Any]]:
    """Rejected rows with their reasons."""
    return [{"row": item.row, "reason": item.reason} for item in rejected[:MAX_REJECTIONS]]


def refused(rejected: Sequence[RejectedRow]) -> dict[str, Any]:
    """What the component shows when nothing can be trained on: the rows that are to blame, if it was rows."""
    return {"rows": [], "rejected": len(rejected), "rejections": listed(rejected)} if rejected else {"stale": True}


def packed(seen: Preview, config: RunConfig) -> dict[str, Any]:
    """A preview as the component takes it."""
    return {
        "source": Path(seen.source).name,
        "model": Path(config.model.name).name,
        "shape": seen.shape,
        "used": seen.used,
        "held_out": seen.held_out,
        "rejected": seen.rejected,
        "truncated": seen.truncated,
        "complete": seen.complete,
        "looked_at": seen.used + seen.held_out + seen.rejected,
        "max_length": seen.max_length,
        "tokens": seen.tokens,
        "learnt_tokens": seen.learnt_tokens,
        "rejections": listed(seen.rejections),
        "lengths": {
            "width": seen.lengths.width,
            "counts": seen.lengths.counts,
            "longest": seen.lengths.longest,
            "open": seen.lengths.open,
        },
        "rows": [packed_row(row) for row in seen.rows],
        "notices": seen.notices,
    }


def packed_row(row: PreviewRow) -> dict[str, Any]:
    """A row with its tokens side by side: texts, ids, and a digit each (1: carries loss, 2: special, 3: both)."""
    return {
        "number": row.number,
        "dropped": row.dropped,
        "cut": row.cut,
        "held_out": row.held_out,
        "texts": [token.text for token in row.tokens],
        "ids": [token.id for token in row.tokens],
        "flags": "".join(str(token.learnt + 2 * token.special) for token in row.tokens),
    }
