"""What trains and waits, with its buttons: a custom `gr.HTML` component with a constant template."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from app.views.component import component

HERE = Path(__file__).parent


def queue_view(**given: Any) -> gr.HTML:
    """The component.

    Its value is `{"rows": [row], "locked": bool}`; its events are `select` with `{"name"}` and `apply` with
    `{"name", "action"}`, the action being `up`, `down` or `cancel`.
    """
    return component(HERE, "queue", kit=False, **given)
