"""The Runs tab: all runs, and the chosen one's live view, log, settings, evaluations and buttons."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gradio as gr

from app import settings
from app.services.listing import LISTING, Cursor, stamp
from app.services.run_control import delete_for_good
from app.ui.panels import evaluation, live
from app.ui.panels.evaluation import EvaluationPanel
from app.ui.panels.live import Live
from app.ui.wiring import QUIET, toast_text
from app.views.run_list import run_list
from mole import runs
from mole.core import checkpoint
from mole.core.errors import MoleError, RunError

LOG_BYTES = 16_000
LIST_EVERY = 2.0
OFFERED = 8
"""The outputs of `offer`."""
CLICK_DOWNLOAD = """() => document.querySelector("#runs-download").click()"""


@dataclass(frozen=True)
class Seen:
    """What a page has been shown: the list so far, the chosen run, what is known of it, and its log."""

    cursor: Cursor = Cursor()
    chosen: str | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    log: tuple[Any, ...] = ()


@dataclass
class Actions:
    """What can be done with the chosen run, beside the live view's own buttons."""

    retry: gr.Button
    export: gr.Button
    download: gr.DownloadButton
    delete: gr.Button
    confirm: gr.Row
    yes: gr.Button
    no: gr.Button
    checkpoints: gr.Row
    checkpoint: gr.Dropdown
    open_checkpoint: gr.Button
    config: gr.Textbox

    @property
    def shown(self) -> list[Any]:
        """The first outputs of `offer`."""
        return [self.retry, self.export, self.delete, self.checkpoints, self.checkpoint, self.config]


@dataclass
class RunsTab:
    """What the other tabs and the page's start need of this one.

    `compared` holds the names of the runs marked for comparison.
    """

    live: Live
    rows: gr.HTML
    log: gr.Textbox
    known: gr.State
    compared: gr.State
    timer: gr.Timer
    actions: Actions
    evaluation: EvaluationPanel

    @property
    def shown(self) -> list[Any]:
        """The outputs of `refresh`."""
        panel = self.evaluation
        return [self.rows, self.log, self.known, *self.actions.shown, panel.group, panel.data, *panel.shown]

    @property
    def retry(self) -> gr.Button:
        """Train the chosen run again with other settings."""
        return self.actions.retry

    @property
    def checkpoint(self) -> gr.Dropdown:
        """The target to chat with: the run's name, or `RUN@STEP`."""
        return self.actions.checkpoint

    @property
    def open_checkpoint(self) -> gr.Button:
        """Chat with `checkpoint`."""
        return self.actions.open_checkpoint


def build() -> RunsTab:
    """Make the tab's components and handlers where we stand in the layout."""
    timer = gr.Timer(LIST_EVERY, active=False)
    with gr.Row(elem_classes="two-columns"):
        with gr.Column(scale=11, min_width=320, elem_classes="card"):
            gr.Markdown("## Runs", elem_classes="heading")
            rows = run_list(elem_id="run-list")
        with gr.Column(scale=12, min_width=320, elem_classes="card"):
            view = live.build("runs")
            actions = build_actions(view)
            panel = evaluation.build(view.name, actions.checkpoint)
            with gr.Accordion("Log", open=False, elem_classes="accordion-card", elem_id="runs-log"):
                log = gr.Textbox(
                    show_label=False, lines=12, max_lines=12, interactive=False, buttons=["copy"], elem_classes="log"
                )
            with gr.Accordion("Settings (run.yaml)", open=False, elem_classes="accordion-card", elem_id="runs-config"):
                actions.config.render()
    tab = RunsTab(view, rows, log, gr.State(Seen()), gr.State([]), timer, actions, panel)
    wire(tab)
    wire_actions(tab)
    return tab


def build_actions(view: Live) -> Actions:
    """The buttons beside those of the live view, the question before deleting, and the checkpoints."""
    with view.buttons:
        retry = gr.Button("Retry with changes", size="md", scale=0, min_width=110, visible=False, elem_id="runs-retry")
        export = gr.Button("Export", size="md", scale=0, min_width=110, visible=False, elem_id="runs-export")
        delete = gr.Button("Delete …", size="md", scale=0, min_width=110, visible=False, elem_id="runs-delete")
    download = gr.DownloadButton("Download", visible="hidden", elem_id="runs-download")
    with gr.Row(visible=False, elem_classes="buttons", elem_id="runs-confirm") as confirm:
        gr.Markdown("Delete the run with its checkpoints and adapter, for good?", elem_classes="quiet")
        yes = gr.Button("Delete", variant="stop", size="md", elem_id="runs-delete-yes")
        no = gr.Button("Keep", size="md")
    with gr.Row(visible=False, elem_classes="start-row", elem_id="runs-checkpoints") as checkpoints:
        chosen = gr.Dropdown(
            choices=[],
            label="Checkpoint",
            info="To chat with, or to evaluate.",
            elem_id="runs-checkpoint",
            allow_custom_value=True,  # a checkpoint that went meanwhile is said by who wants it, in words
            scale=3,
            min_width=180,
        )
        to_chat = gr.Button("Open in chat", size="md", scale=1, min_width=120, elem_id="runs-open-checkpoint")
    config = gr.Textbox(
        show_label=False,
        max_lines=24,
        interactive=False,
        buttons=["copy"],
        elem_classes="command",
        render=False,
    )
    return Actions(retry, export, download, delete, confirm, yes, no, checkpoints, chosen, to_chat, config)


def wire(tab: RunsTab) -> None:
    """Choosing and watching; what is offered for the chosen run follows what is known of it."""
    view, given = tab.live, refresh_inputs(tab)
    tab.rows.select(choose, None, [view.name, tab.actions.confirm], queue=False, **QUIET).then(
        live.show, view.name, view.shown, queue=False, **QUIET
    ).then(refresh, given, tab.shown, queue=False, **QUIET)
    tab.rows.input(marked, None, tab.compared, **QUIET)  # through the queue, without which a state tells no change
    tab.timer.tick(refresh, given, tab.shown, queue=False, **QUIET)


def refresh_inputs(tab: RunsTab) -> list[Any]:
    """What `refresh` is told by the page."""
    return [tab.live.name, tab.known, tab.checkpoint, tab.evaluation.seen]


def wire_actions(tab: RunsTab) -> None:
    """Deleting, asked twice, and exporting."""
    view, actions = tab.live, tab.actions
    actions.delete.click(lambda: gr.Row(visible=True), None, actions.confirm, queue=False, **QUIET)
    actions.no.click(lambda: gr.Row(visible=False), None, actions.confirm, queue=False, **QUIET)
    actions.yes.click(delete_run, view.name, [view.name, actions.confirm], **QUIET).then(
        live.show, view.name, view.shown, queue=False, **QUIET
    ).then(refresh, refresh_inputs(tab), tab.shown, queue=False, **QUIET)
    actions.export.click(
        export_run, view.name, actions.download, show_progress_on=actions.export, api_visibility="private"
    )
    actions.download.change(None, None, None, js=CLICK_DOWNLOAD, **QUIET)


def choose(event: gr.EventData) -> tuple[str, Any]:
    """The run that was clicked."""
    return str(event._data["name"]), gr.Row(visible=False)


def marked(event: gr.EventData) -> list[str]:
    """The runs that are marked for comparison."""
    return [str(name) for name in event._data["compare"]]


def refresh(name: str, known: Seen, target: str | None = None, evaluated: Sequence[Any] = ()) -> list[Any]:
    """What is new of the list and of the chosen run, for `shown`; what has not changed does not travel.

    `target` is the checkpoint chosen on the page, `evaluated` the evaluations it shows.
    """
    other = name != known.chosen  # somebody just did something: what it changed is to be seen now
    delta, cursor = LISTING.since(known.cursor, at_once=other)
    if delta is None and other:
        delta = {"reset": False, "rows": [], "gone": [], "now": time.time()}
    facts = facts_of(name)
    log = (name, *stamp(f"{runs.runs_dir()}/{name}/train.log")) if facts else ()
    return [
        {**delta, "chosen": name} if delta else gr.skip(),
        log_tail(name) if log != known.log else gr.skip(),
        Seen(cursor, name, facts, log),
        *(offer(facts, target) if facts != known.facts or known.chosen is None else [gr.skip()] * OFFERED),
        *evaluation.show(name, evaluated),
    ]


def skipped() -> list[Any]:
    """For `shown` while another tab is in front."""
    return [gr.skip()] * (3 + OFFERED + 2)


def facts_of(name: str) -> dict[str, Any]:
    """What the page offers of a run depends on: its name, state and checkpoints; empty when there is no such run."""
    try:
        run = runs.get(name) if name else None
    except RunError:
        run = None
    if run is None:
        return {}
    state = (LISTING.row(name) or {"state": run.state})["state"]
    steps = [step for step, _ in reversed(checkpoint.steps(run.checkpoints_dir))]
    return {"name": name, "state": state, "steps": steps}


def offer(facts: dict[str, Any], target: str | None) -> list[Any]:
    """What is offered for the chosen run: `Actions.shown`, the evaluation panel and the data at hand for it."""
    if not facts:
        hidden = [gr.Button(visible=False)] * 3
        return [
            *hidden,
            gr.Row(visible=False),
            gr.Dropdown(choices=[], value=None),
            "",
            gr.Accordion(visible=False),
            gr.skip(),
        ]
    name, finished, locked = facts["name"], facts["state"] == "finished", bool(settings.space_id())
    targets = [("final", name)] if finished else []
    targets += [(f"step-{step}", f"{name}@{step}") for step in facts["steps"]]
    values = [value for _, value in targets]
    kept = target if target in values else next(iter(values), None)
    try:
        config = runs.get(name).config_path.read_text(encoding="utf-8")
    except (OSError, RunError) as error:
        config = str(error)
    return [
        gr.Button(visible=not locked),
        gr.Button(visible=finished),
        gr.Button(visible=facts["state"] not in live.ALIVE and not locked),
        gr.Row(visible=bool(targets)),
        gr.Dropdown(choices=targets, value=kept),
        config,
        gr.Accordion(visible=bool(targets)),
        gr.Dropdown(choices=evaluation.data_choices(name)),
    ]


def log_tail(name: str) -> str:
    """The end of the run's log, progress bars reduced to their last state."""
    try:
        return "\n".join(runs.get(name).log_lines(LOG_BYTES)).strip()
    except RunError:
        return ""


def delete_run(name: str) -> tuple[str, Any]:
    """Delete it, for good; the name that is chosen then, and the question put away."""
    try:
        delete_for_good(name)
    except MoleError as error:
        gr.Warning(toast_text(str(error)), title="Not deleted")
        return name, gr.Row(visible=False)
    return "", gr.Row(visible=False)


def export_run(name: str) -> str:
    """A zip of the finished run in Gradio's own folder of files to download, which it tidies up."""
    folder = Path(gr.utils.get_upload_folder()) / "exports" / secrets.token_hex(8)
    folder.mkdir(parents=True)
    try:
        return str(runs.export(runs.get(name), folder / f"{name}.zip"))
    except MoleError as error:
        raise gr.Error(toast_text(str(error)), title="Not exported", print_exception=False) from None
