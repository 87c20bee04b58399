"""Rows of data as the tokens that the model is trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import gradio as gr

from app.views.component import view
from mole.config import RunConfig
from mole.data import RejectedRow
from mole.preflight.preview import MAX_REJECTIONS, Preview, PreviewRow

STALE: dict[str, Any] = {"stale": True}
"""The component's value once the settings have changed."""


def preview_view(**options: Any) -> gr.HTML:
    """The component; its value is what `preview_value` or `rejected_value` returns, or `STALE`."""
    return view(Path(__file__).parent, "preview", canvas=True, **options)


def preview_value(preview: Preview, config: RunConfig) -> dict[str, Any]:
    """A preview of this run's data as the component takes it."""
    return {
        "source": Path(preview.source).name if not preview.sources else f"{len(preview.sources)} files",
        "model": Path(config.model.name).name,
        "shape": preview.shape,
        "used": preview.used,
        "held_out": preview.held_out,
        "rejected": preview.rejected,
        "truncated": preview.truncated,
        "complete": preview.complete,
        "looked_at": preview.read,
        "max_length": preview.max_length,
        "tokens": preview.tokens,
        "learnt_tokens": preview.learnt_tokens,
        "rejections": rejections_json(preview.rejections),
        "lengths": asdict(preview.lengths),
        "rows": [row_json(row) for row in preview.rows],
        "notices": preview.notices,
        "sources": [asdict(source) for source in preview.sources],
    }


def rejected_value(rejected: Sequence[RejectedRow]) -> dict[str, Any]:
    """The component's value when nothing can be trained on: the rejected rows, if rows are the reason."""
    return {"rows": [], "rejected": len(rejected), "rejections": rejections_json(rejected)} if rejected else STALE


def rejections_json(rejected: Sequence[RejectedRow]) -> list[dict[str, Any]]:
    """The first rejected rows with their reasons."""
    return [{"row": item.row, "reason": item.reason, "source": item.source} for item in rejected[:MAX_REJECTIONS]]


def row_json(row: PreviewRow) -> dict[str, Any]:
    """A row with its tokens: their texts, ids, and one digit each (1: carries loss, 2: special, 3: both)."""
    return {
        "number": row.number,
        "source": row.source,
        "dropped": row.dropped,
        "cut": row.cut,
        "held_out": row.held_out,
        "texts": [token.text for token in row.tokens],
        "ids": [token.id for token in row.tokens],
        "flags": "".join(str(token.learnt + 2 * token.special) for token in row.tokens),
    }
