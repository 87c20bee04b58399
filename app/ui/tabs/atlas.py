"""The Atlas tab: what the experts of a run do over a data file; computed in the background, compared, exported."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr

from app import settings
from app.services.atlases import atlas_choices, exported, read_kept
from app.services.chat_targets import run_targets
from app.ui.panels.evaluation import evaluation_data
from app.ui.wiring import QUIET, click_on, export_folder, run_or_warn, toast_text
from app.views.atlas import atlas_value, atlas_view
from app.views.jobs import job_list
from app.views.problem import problem_value, problem_view
from mole import runs
from mole.analysis.atlas.comparison import side_by_side
from mole.analysis.atlas.inputs_process import begin_atlas
from mole.analysis.atlas.job import AtlasJob, list_atlases
from mole.core.errors import ConfigError, InputError, MoleError, RunError
from mole.data import FILE_SUFFIXES
from mole.preflight.data_process import columns_of

POLL_SECONDS = 2.0
LIKELY_COLUMNS = ("skill", "language", "domain", "category", "task", "topic", "source")
"""Columns that are looked at unless something else is chosen."""
FIELDS = {"data": "atlas-data", "data.path": "atlas-data", "by": "atlas-by", "limit": "atlas-limit"}
"""The element of each field that an error may name."""


@dataclass(frozen=True)
class AtlasesShown:
    """What the page shows: which targets and atlases are offered, and the jobs of the chosen run."""

    targets: tuple[tuple[str, str], ...] = ()
    choices: tuple[tuple[str, str], ...] = ()
    jobs: tuple[dict[str, Any], ...] = ()


@dataclass
class AtlasForm:
    """What an atlas is computed of, and the jobs of the chosen run."""

    group: gr.Accordion
    target: gr.Dropdown
    data: gr.Dropdown
    by: gr.Dropdown
    limit: gr.Number
    quick: gr.Checkbox
    start: gr.Button
    upload: gr.UploadButton
    note: gr.HTML
    jobs: gr.HTML


@dataclass
class AtlasTab:
    """The components; `shown` are the outputs of `refresh_atlases`, whose inputs are `given`."""

    form: AtlasForm
    first: gr.Dropdown
    second: gr.Dropdown
    problem: gr.HTML
    view: gr.HTML
    seen: gr.State
    timer: gr.Timer

    @property
    def given(self) -> list[Any]:
        return [self.form.target, self.first, self.second, self.seen]

    @property
    def shown(self) -> list[Any]:
        return [self.form.target, self.first, self.second, self.form.jobs, self.seen]


def build_atlas_tab() -> AtlasTab:
    """Create the tab's components and handlers in the current layout block."""
    with gr.Column(elem_classes="card"):
        gr.Markdown("## Look at an atlas", elem_classes="heading")
        with gr.Row():
            first = gr.Dropdown(
                choices=[], label="Atlas", info="What the experts of a run do over a data file.", elem_id="atlas-first"
            )
            second = gr.Dropdown(
                choices=[("–", "")], value="", label="Beside it", info="Another one of the same rows.",
                elem_id="atlas-second",
            )  # fmt: skip
        with gr.Row(elem_classes="buttons"):
            exports = {suffix: export_button(suffix) for suffix in ("html", "json")}
        problem = problem_view(elem_id="atlas-shown-problem")
        form = build_form()
    with gr.Column(elem_classes="card"):
        view = atlas_view(elem_id="atlas-view")
    timer = gr.Timer(POLL_SECONDS, active=False)
    tab = AtlasTab(form, first, second, problem, view, gr.State(AtlasesShown()), timer)
    wire_form(tab)
    wire_view(tab, exports)
    return tab


def export_button(suffix: str) -> gr.Button:
    return gr.Button(f"Export {suffix.upper()}", size="md", scale=0, min_width=130, elem_id=f"atlas-{suffix}")


def build_form() -> AtlasForm:
    """Create the components in the current layout block."""
    choices = evaluation_data("")
    locked = bool(settings.space_id())
    with gr.Accordion("Compute an atlas", open=False, elem_classes="accordion-card", elem_id="atlas-compute") as group:
        with gr.Row():
            target = gr.Dropdown(
                choices=[], label="Run or checkpoint", info="An adapter's folder: mole atlas FOLDER --data FILE.",
                allow_custom_value=True, elem_id="atlas-target", scale=2,
            )  # fmt: skip
            data = gr.Dropdown(
                choices=choices, value=choices[0][1] if choices else "", allow_custom_value=True, label="Data",
                info="A JSON, JSONL, CSV, Parquet or text file, or a hub id.", elem_id="atlas-data", scale=3,
            )  # fmt: skip
        with gr.Row():
            by = gr.Dropdown(
                choices=[], value=[], multiselect=True, allow_custom_value=True, label="Columns",
                info="Also tell what experts have to do with these.", elem_id="atlas-by", scale=3,
            )  # fmt: skip
            limit = gr.Number(
                label="Maximum rows", info="0 for all.", precision=0, value=0, elem_id="atlas-limit", scale=1
            )
        quick = gr.Checkbox(
            label="Quick", value=True, elem_id="atlas-quick",
            info="Leaves out saturation and muting, which read a sample of the rows many times.",
        )  # fmt: skip
        with gr.Row(elem_classes="buttons"):
            start = gr.Button("Compute", variant="primary", size="md", interactive=not locked, elem_id="atlas-start")
            upload = gr.UploadButton("Upload a file", size="md", file_types=list(FILE_SUFFIXES), elem_id="atlas-upload")
        note = problem_view(elem_id="atlas-problem")
        jobs = job_list("atlas", elem_id="atlas-jobs")
    return AtlasForm(group, target, data, by, limit, quick, start, upload, note, jobs)


def wire_form(tab: AtlasTab) -> None:
    """Choosing data, starting, watching and cancelling."""
    form = tab.form
    form.upload.upload(keep_data, [form.target, form.upload], [form.data, form.note], **QUIET)
    form.group.expand(offer_first_columns, [form.data, form.by], form.by, **QUIET)
    form.data.change(offer_columns, form.data, form.by, trigger_mode="always_last", **QUIET)
    asked = [form.target, form.data, form.by, form.limit, form.quick]
    form.start.click(on_compute, asked, form.note, show_progress_on=form.start, api_visibility="private").then(
        refresh_atlases, tab.given, tab.shown, queue=False, **QUIET
    )
    form.jobs.select(cancel_job, form.target, None, queue=False, **QUIET).then(
        refresh_atlases, tab.given, tab.shown, queue=False, **QUIET
    )
    form.target.change(offer_data, form.target, form.data, **QUIET)
    tab.timer.tick(refresh_atlases, tab.given, tab.shown, queue=False, **QUIET)


def wire_view(tab: AtlasTab, exports: dict[str, gr.Button]) -> None:
    """Showing what is chosen, and exporting it."""
    chosen = [tab.first, tab.second]
    for dropdown in chosen:
        dropdown.change(show_atlases, chosen, [tab.view, tab.problem], trigger_mode="always_last", **QUIET)
    download = gr.DownloadButton("Download", visible="hidden", elem_id="atlas-download")
    for suffix, button in exports.items():
        button.click(
            lambda *keys, suffix=suffix: export(keys, suffix),
            chosen, download, show_progress_on=button, api_visibility="private",
        )  # fmt: skip
    download.change(None, None, None, js=click_on("atlas-download"), **QUIET)


# ---------------------------------------------------------------------------------------------------------
# Computing


def keep_data(target: str | None, path: str) -> tuple[Any, dict[str, Any]]:
    """Keep an uploaded file and choose it."""
    kept = run_or_warn(lambda: settings.keep_upload(path))
    if kept is None:
        return gr.skip(), gr.skip()
    choices = [*evaluation_data(run_name(target)), (kept.name, str(kept))]
    return gr.Dropdown(choices=choices, value=str(kept)), problem_value()


def run_name(target: str | None) -> str:
    """The run of a target."""
    return (target or "").partition("@")[0]


def offer_data(target: str | None) -> Any:
    """The files to choose from for a target; what is chosen stays."""
    return gr.Dropdown(choices=evaluation_data(run_name(target)))


def offer_columns(path: str | None) -> Any:
    """The columns of the chosen data, if they can be read; an error is told when the atlas is started."""
    try:
        there = columns_of((path or "").strip()) if path and settings.is_public(path) else ()
    except MoleError:
        there = ()
    return gr.Dropdown(choices=list(there), value=[name for name in LIKELY_COLUMNS if name in there])


def offer_first_columns(path: str | None, chosen: Sequence[str] | None) -> Any:
    """As `offer_columns`, once the form is opened; what is chosen stays."""
    return gr.skip() if chosen else offer_columns(path)


def on_compute(
    target: str | None, data: str | None, by: Sequence[str] | None, limit: float | None, quick: bool
) -> dict[str, Any]:
    """Start an atlas; returns the problem, or none."""
    settings.forbid_on_space()
    try:
        if not target:
            raise RunError("Choose a run with a checkpoint first.", field="target")
        if limit and limit < 1:
            raise ConfigError("limit", int(limit), "a whole number of rows", "0 takes them all.")
        begin_atlas(target, (data or "").strip(), list(by or []), int(limit) if limit else None, bool(quick))
    except MoleError as error:
        field = FIELDS.get(error.field or "", "atlas-target")
        return problem_value(str(error), field, reveal=True, inside=["atlas-compute"])
    return problem_value()


def cancel_job(target: str | None, event: gr.EventData) -> None:
    """Cancel the atlas whose button was pressed."""
    settings.forbid_on_space()
    run_or_warn(lambda: AtlasJob(runs.get(run_name(target)), int(event._data["number"])).cancel())


# ---------------------------------------------------------------------------------------------------------
# Showing


def refresh_atlases(target: str | None, first: str | None, second: str | None, seen: AtlasesShown) -> list[Any]:
    """What is new of the targets, the atlases and the run's jobs, for `shown`; what has not changed is not sent.

    An atlas that has just been finished is chosen.
    """
    targets, choices = tuple(run_targets()), tuple(atlas_choices())
    target = target or (targets[0][1] if targets else None)
    try:
        jobs = tuple(list_atlases(runs.get(run_name(target)))) if target else ()
    except InputError:
        jobs = ()
    keys = [key for _, key in choices]
    known = [key for _, key in seen.choices]
    came = [key for key in keys if known and key not in known]
    first = came[0] if came else first if first in keys else keys[0] if keys else None
    second = second if second in keys else ""
    changed = choices != seen.choices
    return [
        gr.Dropdown(choices=list(targets), value=target) if targets != seen.targets else gr.skip(),
        gr.Dropdown(choices=list(choices), value=first) if changed else gr.skip(),
        gr.Dropdown(choices=[("–", ""), *choices], value=second) if changed else gr.skip(),
        list(jobs) if jobs != seen.jobs else gr.skip(),
        AtlasesShown(targets, choices, jobs),
    ]


def show_atlas_tab(target: str | None, first: str | None, second: str | None) -> list[Any]:
    """The whole tab for `shown` and its timer, when it becomes active."""
    return [*refresh_atlases(target, first, second, AtlasesShown()), gr.Timer(active=True)]


def pause_atlas_tab() -> list[Any]:
    """For `shown` and the timer, while another tab is active."""
    return [*[gr.skip()] * 5, gr.Timer(active=False)]


def show_atlases(first: str | None, second: str | None) -> tuple[Any, dict[str, Any]]:
    """The chosen atlas, or two side by side; and the problem, or none."""
    try:
        atlases = read_chosen([first, second])
        return atlas_value(side_by_side(atlases) if atlases else None), problem_value()
    except MoleError as error:
        return None, problem_value(str(error), "atlas-first")


def read_chosen(keys: Sequence[str | None]) -> list[dict[str, Any]]:
    """The atlases of one key or two; empty if none is chosen. Raises `InputError`."""
    return [read_kept(key) for key in dict.fromkeys(filter(None, keys))]


def export(keys: Sequence[str | None], suffix: str) -> str:
    """The chosen atlases as a file in Gradio's folder of downloads, which Gradio cleans up."""
    try:
        atlases = read_chosen(keys)
        if not atlases:
            raise InputError("Choose an atlas first.", field="atlas")
        text = exported(atlases, suffix)
    except MoleError as error:
        raise gr.Error(toast_text(str(error)), title="Not exported", print_exception=False) from None
    path = export_folder() / f"atlas.{suffix}"
    path.write_text(text, encoding="utf-8")
    return str(path)
