"""The runs of this page's visitor: their names, kept in the browser, and what the tabs show of them."""

from __future__ import annotations

from typing import Any

import gradio as gr

from app import settings

KEY = "mole-visitor-runs"


def build_own_runs() -> Any:
    """The component with the names: kept in the browser where visitors train, else empty.

    The names are the only key to the runs. They are not encrypted: they belong to who reads this browser's storage.
    """
    return gr.BrowserState([], storage_key=KEY, secret=KEY) if settings.visitors_train() else gr.State([])
