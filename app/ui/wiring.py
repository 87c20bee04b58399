"""How the page's events are wired: quietly, and the last change last."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import gradio as gr

QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
"""How small events are wired: nothing flickers, and they are no part of the API."""


def on_change(changed: Sequence[Any], fn: Callable[..., Any], inputs: Any, outputs: Any, **given: Any) -> Any:
    """Call `fn` after any of these components changed; what changes while it runs is seen to by one more call.

    A handler that was waited for makes Gradio's page repeat the whole event, so two that wait on one event would wake
    each other for ever. Here each waits on a step of its own.
    """
    relay = gr.on([made.change for made in changed], None, None, None, js="() => []", trigger_mode="multiple", **QUIET)
    return relay.then(fn, inputs, outputs, trigger_mode="always_last", **{**QUIET, **given})
