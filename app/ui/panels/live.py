"""The live view of one run with its buttons, in the Train tab and in the Runs tab."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gradio as gr

from app import settings
from app.services import live_updates, visitors
from app.services.run_control import resume_training, stop_training
from app.ui.panels.continuing import ContinuePanel, build_continue, on_continue
from app.ui.wiring import QUIET, run_or_warn
from app.views.run import run_view
from mole import runs
from mole.core.errors import RunError

LIVE_POLL_SECONDS = 1.0
LIVE_READING_SECONDS = 0.3
"""Seconds between two updates while the past of a run is still being read."""
OFFERED = 5
"""The number of outputs of `run_buttons`."""
ACTIVE_STATES = ("queued", "running")


@dataclass(frozen=True)
class LiveShown:
    """What the page shows of a run.

    Attributes:
        cursor: what has been sent of its curves.
        state: the state its buttons are for.
        interval: seconds between two updates; 0 without updates.
    """

    cursor: live_updates.LiveCursor = live_updates.LiveCursor()
    state: str = ""
    interval: float = 0.0


@dataclass
class LivePanel:
    """The components; `shown` are the outputs of `show_live`, `refresh_live` and `pause_live`."""

    name: gr.State
    seen: gr.State
    timer: gr.Timer
    view: gr.HTML
    stop: gr.Button
    resume: gr.Button
    chat: gr.Button
    longer: ContinuePanel
    buttons: gr.Row

    @property
    def shown(self) -> list[Any]:
        offered = [self.stop, self.resume, self.chat, self.longer.button, self.longer.form]
        return [self.view, self.seen, self.timer, *offered]


def build_live(prefix: str) -> LivePanel:
    """Create the view and its buttons in the current layout block; their element ids begin with `prefix`."""

    def button(text: str, name: str, **options: Any) -> gr.Button:
        size: dict[str, Any] = {"size": "md", "scale": 0, "min_width": 110}
        return gr.Button(text, visible=False, elem_id=f"{prefix}-{name}", **size, **options)

    with gr.Row(elem_classes="buttons") as buttons:
        stop, resume = button("Stop", "stop"), button("Resume", "resume")
        chat = button("Chat with this", "chat", variant="primary")
        further = button("Continue …", "continue")
    longer = build_continue(further, prefix)
    view = run_view(elem_id=f"{prefix}-run", server_functions=[live_updates.fetch_step_routing, live_updates.fetch_run])
    timer = gr.Timer(LIVE_POLL_SECONDS, active=False)
    panel = LivePanel(gr.State(""), gr.State(LiveShown()), timer, view, stop, resume, chat, longer, buttons)
    timer.tick(refresh_live, [panel.name, panel.seen], panel.shown, queue=False, **QUIET)
    for pressed in (
        stop.click(lambda name: run_or_warn(lambda: stop_training(name)), panel.name, None, **QUIET),
        resume.click(lambda name: run_or_warn(lambda: resume_training(name)), panel.name, None, **QUIET),
        longer.start.click(
            on_continue, [panel.name, longer.steps, longer.schedule], [panel.name, longer.form], **QUIET
        ),
    ):
        pressed.then(show_live, panel.name, panel.shown, **QUIET)
    return panel


def show_live(name: str) -> list[Any]:
    """The run from its beginning, for `shown`; it is updated as long as it is active."""
    return refresh_live(name, LiveShown())


def pause_live() -> list[Any]:
    """For `shown` in a tab that is left: polling stops."""
    return [gr.skip(), gr.skip(), gr.Timer(active=False), *[gr.skip()] * OFFERED]


def refresh_live(name: str, seen: LiveShown) -> list[Any]:
    """What is new of the run, for `shown`; polling ends once the run has ended and everything is read."""
    try:
        run = runs.get(name) if name else None
    except RunError:
        run = None
    if run is None:
        return [{"status": None}, LiveShown(), gr.Timer(active=False), *run_buttons("", "")]
    value, cursor = live_updates.run_update(run, seen.cursor)
    state = value["status"]["state"]
    if value["reading"] is not None:
        interval = LIVE_READING_SECONDS
    else:
        interval = LIVE_POLL_SECONDS if state in ACTIVE_STATES or cursor != seen.cursor else 0.0
    timer = gr.skip() if interval == seen.interval else gr.Timer(interval or LIVE_POLL_SECONDS, active=interval > 0)
    buttons = [gr.skip()] * OFFERED if state == seen.state else run_buttons(name, state)
    return [value, LiveShown(cursor, state, interval), timer, *buttons]


def run_buttons(name: str, state: str) -> list[Any]:
    """Stop, Resume, Chat and Continue for a run in this state, and the form of Continue, closed."""
    locked = bool(settings.space_id())
    return [
        gr.Button(visible=state in ACTIVE_STATES and (not locked or visitors.is_visitors(name))),
        gr.Button(visible=state in ("stopped", "interrupted", "failed", "imported") and not locked),
        gr.Button(visible=state == "finished"),
        gr.Button(visible=state == "finished" and not locked),
        gr.Row(visible=False),
    ]
