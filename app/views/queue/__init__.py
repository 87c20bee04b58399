"""The queue: which runs train and wait, with buttons to reorder and cancel them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from app.views.component import view


def queue_view(**options: Any) -> gr.HTML:
    """The component; its value is `{"rows": [row], "locked": bool}`.

    Its event `select` carries `{"name"}`; its event `apply` carries `{"name", "action"}`, the action being `up`, `down`
    or `cancel`.
    """
    return view(Path(__file__).parent, "queue", **options)
