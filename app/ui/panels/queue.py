"""What trains and what waits, on which device: put in another order, taken out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gradio as gr

from app import settings
from app.services.listing import LISTING
from app.services.run_control import move_in_queue, stop_training
from app.ui.panels.live import ALIVE, Live, show
from app.ui.wiring import QUIET, run_or_warn
from app.views.queue import queue_view
from mole import runs
from mole.core.errors import RunError

TICK = 2.0


@dataclass
class Queue:
    """The components; `shown` are the outputs of `refresh`, `entered` and `left`."""

    card: gr.Column
    view: gr.HTML
    known: gr.State
    timer: gr.Timer

    @property
    def shown(self) -> list[Any]:
        return [self.card, self.view, self.known, self.timer]


def build(live: Live) -> Queue:
    """Make the card where we stand in the layout; a run that is clicked is shown in `live`."""
    with gr.Column(elem_classes="card", visible=False) as card:
        gr.Markdown("## Queue", elem_classes="heading")
        view = queue_view(elem_id="queue")
    panel = Queue(card, view, gr.State({}), gr.Timer(TICK))
    panel.timer.tick(refresh, panel.known, panel.shown, queue=False, **QUIET)
    view.select(chosen, None, live.name, queue=False, **QUIET).then(show, live.name, live.shown, queue=False, **QUIET)
    pressed = view.apply(press, None, None, trigger_mode="multiple", **QUIET)  # a second press may come soon
    pressed.then(refresh_now, panel.known, panel.shown, queue=False, **QUIET)
    return panel


def entered() -> list[Any]:
    """For `shown`, when the tab comes to the front: the queue as it is, and its clock."""
    return [*refresh({})[:3], gr.Timer(active=True)]


def left() -> list[Any]:
    """For `shown`, when the tab is left: nothing ticks there."""
    return [gr.skip(), gr.skip(), gr.skip(), gr.Timer(active=False)]


def refresh(known: dict[str, Any], at_once: bool = False) -> list[Any]:
    """The queue for `shown`; what the page knows already does not travel."""
    value = {"rows": rows(at_once), "locked": bool(settings.space_id())}
    if value == known:
        return [gr.skip()] * 4
    return [gr.Column(visible=bool(value["rows"])), value, value, gr.skip()]


def refresh_now(known: dict[str, Any]) -> list[Any]:
    """The queue after something was done to it."""
    return refresh(known, at_once=True)


def rows(at_once: bool = False) -> list[dict[str, Any]]:
    """The runs that train and wait, device by device, each with its device, its place there and whether it is last."""
    lines: dict[str, list[tuple[float, str, dict[str, Any]]]] = {}
    for status in LISTING.rows(at_once):
        if status["state"] not in ALIVE:
            continue
        try:
            run = runs.get(status["name"])
            device, position = runs.place_in_queue(run)
        except RunError:
            continue
        row = {key: status[key] for key in ("name", "state", "step", "total_steps", "group")}
        first = float("-inf") if status["state"] == "running" else position
        lines.setdefault(device, []).append((first, run.name, {**row, "device": device}))
    return [row for device in sorted(lines) for row in numbered(sorted(lines[device], key=lambda item: item[:2]))]


def numbered(line: list[tuple[float, str, dict[str, Any]]]) -> list[dict[str, Any]]:
    """The rows of a device, with their place among those that wait (0: trains)."""
    made = []
    place = 0
    for _, _, row in line:
        place += row["state"] == "queued"
        made.append({**row, "place": place if row["state"] == "queued" else 0, "last": row is line[-1][2]})
    return made


def chosen(event: gr.EventData) -> str:
    """The run that was clicked."""
    return str(event._data["name"])


def press(event: gr.EventData) -> None:
    """Move a run up or down, or take it out."""
    name, action = str(event._data["name"]), str(event._data["action"])
    if action == "cancel":
        run_or_warn(lambda: stop_training(name))
    else:
        run_or_warn(lambda: move_in_queue(name, -1 if action == "up" else 1))
