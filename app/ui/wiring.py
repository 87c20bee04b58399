"""How the page's events are wired: without flicker, the latest change wins, errors become warnings."""

from __future__ import annotations

import html
import secrets
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import gradio as gr

from app.services.messages import short_message
from mole.core.errors import MoleError

_T = TypeVar("_T")

QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
"""Options of small events: no progress indicator, and not part of the API."""


def on_change(changed: Sequence[Any], fn: Callable[..., Any], inputs: Any, outputs: Any, **options: Any) -> Any:
    """Call `fn` after any of these components changed; changes while it runs cause one more call.

    Two handlers that wait for their turn on one event would trigger each other for ever, because Gradio's page repeats
    the whole event for a handler that had to wait. So each waits on a step of its own.
    """
    relay = gr.on([made.change for made in changed], None, None, None, js="() => []", trigger_mode="multiple", **QUIET)
    return relay.then(fn, inputs, outputs, trigger_mode="always_last", **{**QUIET, **options})


def click_on(elem_id: str) -> str:
    """A script that clicks on a hidden button."""
    return f'() => document.querySelector("#{elem_id}").click()'


def export_folder() -> Path:
    """A new folder among Gradio's downloads, which Gradio cleans up."""
    folder = Path(gr.utils.get_upload_folder()) / "exports" / secrets.token_hex(8)
    folder.mkdir(parents=True)
    return folder


def run_or_warn(action: Callable[[], _T], title: str = "Not done") -> _T | None:
    """Run an action; a `MoleError` becomes a warning on the page, and the result None."""
    try:
        return action()
    except MoleError as error:
        gr.Warning(toast_text(str(error)), title=title)
        return None


def toast_text(text: str) -> str:
    """A message for Gradio's toasts, which would render it as HTML."""
    return html.escape(short_message(text), quote=False)
