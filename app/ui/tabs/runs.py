"""The Runs tab: all runs, and the chosen one's live view, log, settings, evaluations and buttons."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import gradio as gr

from app import settings
from app.services import visitors
from app.services.listing import LISTING, ListCursor, file_stamp
from app.services.run_control import delete_for_good, import_archive
from app.ui.panels.evaluation import EvaluationPanel, build_evaluation, evaluation_data, refresh_evaluations
from app.ui.panels.live import ACTIVE_STATES, LivePanel, build_live, show_live
from app.ui.wiring import QUIET, click_on, export_folder, run_or_warn, toast_text
from app.views.run_list import run_list
from mole import runs
from mole.core import checkpoint
from mole.core.errors import MoleError, RunError
from mole.runs.archive import left_out_note

LOG_BYTES = 16_000
LIST_POLL_SECONDS = 2.0
OFFERED = 8
"""The number of outputs of `offer_actions`."""


@dataclass(frozen=True)
class RunsShown:
    """What the page shows: the list so far, the chosen run, the facts its buttons are for, and a stamp of its log."""

    cursor: ListCursor = ListCursor()
    chosen: str | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    log: tuple[Any, ...] = ()
    own: dict[str, dict[str, Any]] = field(default_factory=dict)
    """The rows of the visitor's runs, by name."""


@dataclass
class RunActions:
    """What can be done with the chosen run, besides the live view's own buttons."""

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
        """The first outputs of `offer_actions`."""
        return [self.retry, self.export, self.delete, self.checkpoints, self.checkpoint, self.config]


@dataclass
class RunsTab:
    """The tab's components; `compared` holds the names of the runs marked for comparison."""

    live: LivePanel
    rows: gr.HTML
    log: gr.Textbox
    known: gr.State
    compared: gr.State
    timer: gr.Timer
    actions: RunActions
    evaluation: EvaluationPanel
    own: Any
    """Holds the names of the visitor's runs."""

    @property
    def given(self) -> list[Any]:
        """The inputs of `refresh_runs`."""
        return [self.live.name, self.known, self.checkpoint, self.evaluation.seen, self.own]

    @property
    def shown(self) -> list[Any]:
        """The outputs of `refresh_runs`."""
        panel = self.evaluation
        return [self.rows, self.log, self.known, *self.actions.shown, panel.group, panel.data, *panel.shown]

    @property
    def retry(self) -> gr.Button:
        """Train the chosen run again with changes."""
        return self.actions.retry

    @property
    def checkpoint(self) -> gr.Dropdown:
        """The target to chat with: the run's name, or `RUN@STEP`."""
        return self.actions.checkpoint

    @property
    def open_checkpoint(self) -> gr.Button:
        """Chat with `checkpoint`."""
        return self.actions.open_checkpoint


def build_runs_tab(own: Any) -> RunsTab:
    """Create the tab's components and handlers in the current layout block; `own` holds the visitor's runs."""
    timer = gr.Timer(LIST_POLL_SECONDS, active=False)
    with gr.Row(elem_classes="two-columns"):
        with gr.Column(scale=11, min_width=320, elem_classes="card"):
            with gr.Row(elem_classes="heading-row"):
                gr.Markdown("## Runs", elem_classes="heading")
                upload = gr.UploadButton(
                    "Import a run", size="sm", file_types=[".zip"], scale=0, min_width=130, elem_id="runs-import",
                    visible=not settings.space_id(),
                )  # fmt: skip
            rows = run_list(elem_id="run-list")
        with gr.Column(scale=12, min_width=320, elem_classes="card"):
            live = build_live("runs")
            actions = build_actions(live)
            evaluation = build_evaluation(live.name, actions.checkpoint)
            with gr.Accordion("Log", open=False, elem_classes="accordion-card", elem_id="runs-log"):
                log = gr.Textbox(
                    show_label=False, lines=12, max_lines=12, interactive=False, buttons=["copy"], elem_classes="log"
                )
            with gr.Accordion("Settings (run.yaml)", open=False, elem_classes="accordion-card", elem_id="runs-config"):
                actions.config.render()
    tab = RunsTab(live, rows, log, gr.State(RunsShown()), gr.State([]), timer, actions, evaluation, own)
    wire_list(tab)
    wire_actions(tab)
    imported = upload.upload(import_zip, upload, [live.name, actions.confirm], api_visibility="private")
    imported.then(show_live, live.name, live.shown, **QUIET).then(refresh_runs, tab.given, tab.shown, **QUIET)
    return tab


def build_actions(live: LivePanel) -> RunActions:
    """The buttons beside those of the live view, the confirmation of a deletion, and the checkpoints."""

    def button(text: str, name: str) -> gr.Button:
        return gr.Button(text, size="md", scale=0, min_width=110, visible=False, elem_id=f"runs-{name}")

    with live.buttons:
        retry, export = button("Retry with changes", "retry"), button("Export", "export")
        delete = button("Delete …", "delete")
    download = gr.DownloadButton("Download", visible="hidden", elem_id="runs-download")
    with gr.Row(visible=False, elem_classes="buttons", elem_id="runs-confirm") as confirm:
        gr.Markdown("Delete the run with its checkpoints and adapter permanently?", elem_classes="quiet")
        yes = gr.Button("Delete", variant="stop", size="md", elem_id="runs-delete-yes")
        no = gr.Button("Keep", size="md")
    with gr.Row(visible=False, elem_classes="start-row", elem_id="runs-checkpoints") as checkpoints:
        checkpoint_field = gr.Dropdown(
            choices=[],
            label="Checkpoint",
            info="For chat and evaluation.",
            elem_id="runs-checkpoint",
            allow_custom_value=True,  # if the checkpoint has been removed meanwhile, chat or evaluation says so
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
    return RunActions(retry, export, download, delete, confirm, yes, no, checkpoints, checkpoint_field, to_chat, config)


def wire_list(tab: RunsTab) -> None:
    """Choosing and watching runs; the actions depend on what is known of the chosen run."""
    live = tab.live
    tab.rows.select(choose_run, None, [live.name, tab.actions.confirm], queue=False, **QUIET).then(
        show_live, live.name, live.shown, queue=False, **QUIET
    ).then(refresh_runs, tab.given, tab.shown, queue=False, **QUIET)
    tab.rows.input(marked_runs, None, tab.compared, **QUIET)  # in the queue: without it a State reports no change
    tab.timer.tick(refresh_runs, tab.given, tab.shown, queue=False, **QUIET)


def wire_actions(tab: RunsTab) -> None:
    """Deleting, with a confirmation, and exporting."""
    live, actions = tab.live, tab.actions
    actions.delete.click(lambda: gr.Row(visible=True), None, actions.confirm, queue=False, **QUIET)
    actions.no.click(lambda: gr.Row(visible=False), None, actions.confirm, queue=False, **QUIET)
    actions.yes.click(delete_chosen, live.name, [live.name, actions.confirm], **QUIET).then(
        show_live, live.name, live.shown, queue=False, **QUIET
    ).then(refresh_runs, tab.given, tab.shown, queue=False, **QUIET)
    actions.export.click(
        export_zip, live.name, actions.download, show_progress_on=actions.export, api_visibility="private"
    )
    actions.download.change(None, None, None, js=click_on("runs-download"), **QUIET)


def choose_run(event: gr.EventData) -> tuple[str, Any]:
    """The run that was clicked; a confirmation about another one is hidden."""
    return str(event._data["name"]), gr.Row(visible=False)


def marked_runs(event: gr.EventData) -> list[str]:
    """The runs that are marked for comparison."""
    return [str(name) for name in event._data["compare"]]


def show_runs_tab(name: str, marked: Sequence[str], own: Any = ()) -> list[Any]:
    """The whole tab for `shown`, when it becomes active, with these runs marked for comparison."""
    listed, *rest = refresh_runs(name, RunsShown(), own=own)
    return [{**listed, "marked": marked}, *rest]


def skip_runs_tab() -> list[Any]:
    """For `shown` while another tab is active."""
    return [gr.skip()] * (3 + OFFERED + 2)


def refresh_runs(
    name: str, known: RunsShown, target: str | None = None, evaluated: Sequence[Any] = (), own: Any = ()
) -> list[Any]:
    """What is new of the list and of the chosen run, for `shown`; what has not changed is not sent.

    `target` is the checkpoint chosen on the page, `evaluated` the evaluations it shows, `own` the names of the
    visitor's runs.
    """
    other = name != known.chosen  # after an action of the person its result is shown at once
    delta, cursor = LISTING.since(known.cursor, at_once=other)
    mine = {row["name"]: row for row in visitors.own_rows(own)}
    if delta is None and (other or mine != known.own):
        delta = {"reset": False, "rows": [], "gone": [], "now": time.time()}
    if delta is not None:
        delta = with_own(delta, mine, known.own)
    facts = run_facts(name)
    log = (name, *file_stamp(f"{runs.runs_dir()}/{name}/train.log")) if facts else ()
    return [
        {**delta, "chosen": name} if delta else gr.skip(),
        log_tail(name) if log != known.log else gr.skip(),
        RunsShown(cursor, name, facts, log, mine),
        *(offer_actions(facts, target) if facts != known.facts or known.chosen is None else [gr.skip()] * OFFERED),
        *refresh_evaluations(name, evaluated),
    ]


def with_own(delta: dict[str, Any], mine: dict[str, Any], sent: dict[str, Any]) -> dict[str, Any]:
    """What changed of the list, with the visitor's runs, of which the page was sent `sent`."""
    fresh = [row for name, row in mine.items() if delta["reset"] or row != sent.get(name)]
    return {**delta, "rows": [*delta["rows"], *fresh], "gone": [*delta["gone"], *(sent.keys() - mine.keys())]}


def run_facts(name: str) -> dict[str, Any]:
    """What the actions depend on: the run's name, state and checkpoints; empty when there is no such run."""
    try:
        run = runs.get(name) if name else None
    except RunError:
        run = None
    if run is None:
        return {}
    state = (LISTING.row(name) or {"state": run.state})["state"]
    steps = [step for step, _ in reversed(checkpoint.steps(run.checkpoints_dir))]
    return {"name": name, "state": state, "steps": steps}


def offer_actions(facts: dict[str, Any], target: str | None) -> list[Any]:
    """The actions for the chosen run: `RunActions.shown`, the evaluation panel and its data files."""
    if not facts:
        nothing_to_do = [gr.Button(visible=False)] * 3
        no_checkpoint = [gr.Row(visible=False), gr.Dropdown(choices=[], value=None)]
        return [*nothing_to_do, *no_checkpoint, "", gr.Accordion(visible=False), gr.skip()]
    name, finished = facts["name"], facts["state"] == "finished"
    locked = bool(settings.space_id()) and not visitors.is_visitors(name)
    targets = [("final", name)] if finished else []
    targets += [(f"step-{step}", f"{name}@{step}") for step in facts["steps"]]
    values = [value for _, value in targets]
    kept = target if target in values else next(iter(values), None)
    try:
        config = runs.get(name).config_text()
    except (OSError, ValueError, RunError) as error:
        config = str(error)
    return [
        gr.Button(visible=not locked),
        gr.Button(visible=finished),
        gr.Button(visible=facts["state"] not in ACTIVE_STATES and not locked),
        gr.Row(visible=bool(targets)),
        gr.Dropdown(choices=targets, value=kept),
        config,
        gr.Accordion(visible=bool(targets)),
        gr.Dropdown(choices=evaluation_data(name)),
    ]


def log_tail(name: str) -> str:
    """The end of the run's log, with progress bars reduced to their last state."""
    try:
        return "\n".join(runs.get(name).log_lines(LOG_BYTES)).strip()
    except RunError:
        return ""


def delete_chosen(name: str) -> tuple[str, Any]:
    """Delete the run; returns the name chosen afterwards, and the hidden confirmation."""
    try:
        delete_for_good(name)
    except MoleError as error:
        gr.Warning(toast_text(str(error)), title="Not deleted")
        return name, gr.Row(visible=False)
    return "", gr.Row(visible=False)


def import_zip(path: str) -> tuple[Any, Any]:
    """Take an uploaded export back; returns the name of the run, and a hidden confirmation about another one."""
    done = run_or_warn(lambda: import_archive(path), title="Not imported")
    if done is None:
        return gr.skip(), gr.skip()
    run, left_out = done
    if left_out:
        gr.Info(toast_text(left_out_note(left_out)), title="Not all of it was taken")
    return run.name, gr.Row(visible=False)


def export_zip(name: str) -> str:
    """A zip of the finished run in Gradio's folder of downloads, which Gradio cleans up."""
    try:
        return str(runs.export(runs.get(name), export_folder() / f"{name}.zip"))
    except MoleError as error:
        raise gr.Error(toast_text(str(error)), title="Not exported", print_exception=False) from None
