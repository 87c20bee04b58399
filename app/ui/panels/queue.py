"""The queue: which runs train and wait on which device, with buttons to reorder and cancel them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gradio as gr

from app import settings
from app.services.listing import LISTING
from app.services.run_control import move_in_queue, stop_training
from app.ui.panels.live import ACTIVE_STATES, LivePanel, show_live
from app.ui.wiring import QUIET, run_or_warn
from app.views.queue import queue_view
from mole import runs
from mole.core.errors import RunError

QUEUE_POLL_SECONDS = 2.0


@dataclass
class QueuePanel:
    """The components; `shown` are the outputs of `refresh_queue`, `resume_queue` and `pause_queue`."""

    card: gr.Column
    view: gr.HTML
    known: gr.State
    timer: gr.Timer

    @property
    def shown(self) -> list[Any]:
        return [self.card, self.view, self.known, self.timer]


def build_queue(live: LivePanel) -> QueuePanel:
    """Create the card in the current layout block; a run that is clicked is shown in `live`."""
    with gr.Column(elem_classes="card", visible=False) as card:
        gr.Markdown("## Queue", elem_classes="heading")
        view = queue_view(elem_id="queue")
    panel = QueuePanel(card, view, gr.State({}), gr.Timer(QUEUE_POLL_SECONDS))
    panel.timer.tick(refresh_queue, panel.known, panel.shown, queue=False, **QUIET)
    view.select(clicked_run, None, live.name, queue=False, **QUIET).then(
        show_live, live.name, live.shown, queue=False, **QUIET
    )
    pressed = view.apply(change_queue, None, None, trigger_mode="multiple", **QUIET)  # presses may come in a row
    pressed.then(refresh_queue_now, panel.known, panel.shown, queue=False, **QUIET)
    return panel


def resume_queue() -> list[Any]:
    """For `shown`, when the tab becomes active: the queue as of now, and polling."""
    return [*refresh_queue({})[:3], gr.Timer(active=True)]


def pause_queue() -> list[Any]:
    """For `shown`, when the tab is left: polling stops."""
    return [gr.skip(), gr.skip(), gr.skip(), gr.Timer(active=False)]


def refresh_queue(known: dict[str, Any], at_once: bool = False) -> list[Any]:
    """The queue for `shown`; nothing is sent when the page shows it already. `at_once` as in `Listing.since`."""
    value = {"rows": queue_rows(at_once), "locked": bool(settings.space_id())}
    if value == known:
        return [gr.skip()] * 4
    return [gr.Column(visible=bool(value["rows"])), value, value, gr.skip()]


def refresh_queue_now(known: dict[str, Any]) -> list[Any]:
    """The queue after an action on it."""
    return refresh_queue(known, at_once=True)


def queue_rows(at_once: bool = False) -> list[dict[str, Any]]:
    """The runs that train and wait, device by device, with their device, place and whether they are the last there."""
    lines: dict[str, list[tuple[float, str, dict[str, Any]]]] = {}
    for status in LISTING.rows(at_once):
        if status["state"] not in ACTIVE_STATES:
            continue
        try:
            device, position = runs.place_in_queue(runs.get(status["name"]))
        except RunError:
            continue
        row = {key: status[key] for key in ("name", "state", "step", "total_steps", "group")}
        order = float("-inf") if status["state"] == "running" else position
        lines.setdefault(device, []).append((order, row["name"], {**row, "device": device}))
    return [row for device in sorted(lines) for row in numbered(sorted(lines[device], key=lambda item: item[:2]))]


def numbered(line: list[tuple[float, str, dict[str, Any]]]) -> list[dict[str, Any]]:
    """The rows of one device with their place among the waiting runs; 0 for the run that trains."""
    rows = []
    waiting = 0
    for _, _, row in line:
        waiting += row["state"] == "queued"
        rows.append({**row, "place": waiting if row["state"] == "queued" else 0, "last": row is line[-1][2]})
    return rows


def clicked_run(event: gr.EventData) -> str:
    """The name of the run that was clicked."""
    return str(event._data["name"])


def change_queue(event: gr.EventData) -> None:
    """Move a run up or down, or cancel it."""
    name, action = str(event._data["name"]), str(event._data["action"])
    if action == "cancel":
        run_or_warn(lambda: stop_training(name))
    else:
        run_or_warn(lambda: move_in_queue(name, -1 if action == "up" else 1))
