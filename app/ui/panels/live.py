"""The live view of one run with its buttons: the same piece in the Train tab and in the Runs tab."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gradio as gr

from app import settings
from app.services import charts
from app.services.run_control import resume_training, stop_training
from app.ui.wiring import QUIET, run_or_warn
from app.views.run import run_view
from mole import runs
from mole.core.errors import RunError

TICK = 1.0
TICK_READING = 0.3
"""Seconds between two looks at a run, and while its past is still being read."""
ALIVE = ("queued", "running")


@dataclass(frozen=True)
class Seen:
    """What a page has been shown, the state the buttons stand for, and the seconds between its looks (0: none)."""

    cursor: charts.Cursor = charts.Cursor()
    state: str = ""
    pace: float = 0.0


@dataclass
class Live:
    """The components; `shown` are the outputs of `open` and `tick`."""

    name: gr.State
    seen: gr.State
    timer: gr.Timer
    view: gr.HTML
    stop: gr.Button
    resume: gr.Button
    chat: gr.Button
    buttons: gr.Row

    @property
    def shown(self) -> list[Any]:
        return [self.view, self.seen, self.timer, self.stop, self.resume, self.chat]


def build(prefix: str) -> Live:
    """Make the view and its buttons where we stand in the layout; `prefix` begins their element ids."""
    with gr.Row(elem_classes="buttons") as buttons:
        stop = gr.Button("Stop", size="md", scale=0, min_width=110, visible=False, elem_id=f"{prefix}-stop")
        resume = gr.Button("Resume", size="md", scale=0, min_width=110, visible=False, elem_id=f"{prefix}-resume")
        chat = gr.Button(
            "Chat with this",
            variant="primary",
            size="md",
            scale=0,
            min_width=110,
            visible=False,
            elem_id=f"{prefix}-chat",
        )
    view = run_view(elem_id=f"{prefix}-run", server_functions=[charts.routing_at, charts.whole])
    live = Live(gr.State(""), gr.State(Seen()), gr.Timer(TICK, active=False), view, stop, resume, chat, buttons)
    live.timer.tick(tick, [live.name, live.seen], live.shown, queue=False, **QUIET)
    stop.click(press_stop, live.name, None, **QUIET).then(show, live.name, live.shown, **QUIET)
    resume.click(press_resume, live.name, None, **QUIET).then(show, live.name, live.shown, **QUIET)
    return live


def show(name: str) -> list[Any]:
    """The run from its beginning, for `shown`; the timer ticks as long as it is alive."""
    return tick(name, Seen())


def hide() -> list[Any]:
    """For the `shown` of a view in a tab that is left: nothing ticks there."""
    return [gr.skip(), gr.skip(), gr.Timer(active=False), gr.skip(), gr.skip(), gr.skip()]


def tick(name: str, seen: Seen) -> list[Any]:
    """What is new of the run, for `shown`; the timer ends once the run has and nothing more is written."""
    try:
        run = runs.get(name) if name else None
    except RunError:
        run = None
    if run is None:
        return [{"status": None}, Seen(), gr.Timer(active=False), *[gr.Button(visible=False)] * 3]
    value, cursor = charts.delta(run, seen.cursor)
    state = value["status"]["state"]
    reading = value["reading"] is not None
    pace = TICK_READING if reading else TICK if state in ALIVE or cursor != seen.cursor else 0.0
    timer = gr.skip() if pace == seen.pace else gr.Timer(pace or TICK, active=pace > 0)
    shown = Seen(cursor, state, pace)
    if state == seen.state:
        return [value, shown, timer, gr.skip(), gr.skip(), gr.skip()]
    locked = bool(settings.space_id())
    return [
        value,
        shown,
        timer,
        gr.Button(visible=state in ALIVE and not locked),
        gr.Button(visible=state in ("stopped", "interrupted", "failed") and not locked),
        gr.Button(visible=state == "finished"),
    ]


def press_stop(name: str) -> None:
    """Ask the run to save and stop."""
    run_or_warn(lambda: stop_training(name))


def press_resume(name: str) -> None:
    """Go on with a stopped run from its last checkpoint."""
    run_or_warn(lambda: resume_training(name))
