"""The Runs tab: all runs, and the chosen one's live view, log and buttons."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import gradio as gr

from app import live, settings
from app.live import QUIET, Live
from app.run_view import run_list
from mole import runs
from mole.errors import MoleError, RunError

LOG_BYTES = 16_000
LIST_EVERY = 2.0


@dataclass
class RunsTab:
    """What the other tabs and the page's start need of this one."""

    live: Live
    rows: gr.HTML
    log: gr.Textbox
    delete: gr.Button
    confirm: gr.Row
    known: gr.State
    timer: gr.Timer

    @property
    def shown(self) -> list[Any]:
        """The outputs of `refresh`."""
        return [self.rows, self.log, self.delete, self.known]


def build() -> RunsTab:
    """Make the tab's components and handlers where we stand in the layout."""
    with gr.Row(elem_classes="two-columns"):
        with gr.Column(scale=11, min_width=320, elem_classes="card"):
            gr.Markdown("## Runs", elem_classes="heading")
            runs_list = run_list(elem_id="run-list")
        with gr.Column(scale=12, min_width=320, elem_classes="card"):
            view = live.build("runs")
            with view.buttons:
                delete = gr.Button("Delete …", size="md", visible=False, elem_id="runs-delete")
            with gr.Row(visible=False, elem_classes="buttons", elem_id="runs-confirm") as confirm:
                gr.Markdown("Delete the run with its checkpoints and adapter, for good?", elem_classes="quiet")
                yes = gr.Button("Delete", variant="stop", size="md", elem_id="runs-delete-yes")
                no = gr.Button("Keep", size="md")
            with gr.Accordion("Log", open=False, elem_classes="accordion-card", elem_id="runs-log"):
                log = gr.Textbox(show_label=False, lines=12, max_lines=12, interactive=False, elem_classes="log")
    tab = RunsTab(view, runs_list, log, delete, confirm, gr.State({}), gr.Timer(LIST_EVERY, active=False))
    wire(tab, yes, no)
    return tab


def wire(tab: RunsTab, yes: gr.Button, no: gr.Button) -> None:
    """Choosing, watching and deleting."""
    view = tab.live
    tab.rows.select(choose, None, [view.name, tab.confirm], queue=False, **QUIET).then(
        live.show, view.name, view.shown, queue=False, **QUIET
    ).then(refresh, [view.name, tab.known], tab.shown, queue=False, **QUIET)
    tab.timer.tick(refresh, [view.name, tab.known], tab.shown, queue=False, **QUIET)
    tab.delete.click(lambda: gr.Row(visible=True), None, tab.confirm, queue=False, **QUIET)
    no.click(lambda: gr.Row(visible=False), None, tab.confirm, queue=False, **QUIET)
    yes.click(delete_run, view.name, [view.name, tab.confirm], **QUIET).then(
        live.show, view.name, view.shown, queue=False, **QUIET
    ).then(refresh, [view.name, tab.known], tab.shown, queue=False, **QUIET)


def choose(event: gr.EventData) -> tuple[str, Any]:
    """The run that was clicked."""
    return str(event._data["name"]), gr.Row(visible=False)


def refresh(name: str, known: dict[str, Any]) -> list[Any]:
    """List, log, Delete button and what the page knows now; what has not changed does not travel."""
    statuses = [run.status() for run in reversed(runs.list_runs())]
    states = {status["name"]: status["state"] for status in statuses}
    now: dict[str, Any] = {
        "list": {"runs": statuses, "chosen": name},
        "log": log_tail(name) if name in states else "",
        "delete": states.get(name) not in (None, *live.ALIVE) and not settings.space_id(),
    }
    shown = [
        now["list"] if known.get("list") != now["list"] else gr.skip(),
        now["log"] if known.get("log") != now["log"] else gr.skip(),
        gr.Button(visible=now["delete"]) if known.get("delete") != now["delete"] else gr.skip(),
    ]
    return [*shown, now]


def log_tail(name: str) -> str:
    """The end of the run's log, progress bars reduced to their last state."""
    try:
        with runs.get(name).log_path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - LOG_BYTES))
            text = file.read().decode("utf-8", errors="replace")
    except (OSError, RunError):
        return ""
    return "\n".join(line.rpartition("\r")[2] for line in text.replace("\r\n", "\n").split("\n")).strip()


def delete_run(name: str) -> tuple[str, Any]:
    """Delete it, for good; the name that is chosen then, and the question put away."""
    settings.forbid_on_space()
    try:
        runs.delete(runs.get(name))
    except MoleError as error:
        gr.Warning(str(error), title="Not deleted")
        return name, gr.Row(visible=False)
    return "", gr.Row(visible=False)
