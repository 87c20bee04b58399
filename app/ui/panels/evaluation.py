"""Evaluate the chosen run on a data file: the file, how many rows, progress, and all results so far."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from app import settings
from app.ui.wiring import QUIET, run_or_warn
from app.views.jobs import job_list
from app.views.problem import problem_value, problem_view
from mole import runs
from mole.core.errors import ConfigError, InputError, MoleError, RunError
from mole.data import FILE_SUFFIXES
from mole.evaluation import job as evaluation_job
from mole.preflight.data_process import evaluate


@dataclass
class EvaluationPanel:
    """The components; `shown` are the outputs of `refresh_evaluations`."""

    group: gr.Accordion
    data: gr.Dropdown
    limit: gr.Number
    note: gr.HTML
    results: gr.HTML
    seen: gr.State

    @property
    def shown(self) -> list[Any]:
        return [self.results, self.seen]


def build_evaluation(name: gr.State, target: gr.Dropdown) -> EvaluationPanel:
    """Create the panel in the current layout block.

    `name` holds the chosen run, `target` its checkpoint to evaluate; the tab polls with `refresh_evaluations`.
    """
    choices = evaluation_data("")
    with gr.Accordion("Evaluate on a file", open=False, elem_classes="accordion-card", elem_id="evaluate") as group:
        with gr.Row():
            data = gr.Dropdown(
                choices=choices,
                value=choices[0][1] if choices else "",
                allow_custom_value=True,
                label="Evaluation data",
                info="A JSON, JSONL, CSV, Parquet or text file, or a hub id.",
                elem_id="evaluate-data",
                scale=3,
            )
            limit = gr.Number(
                label="Maximum rows",
                info="0 for all.",
                precision=0,
                value=0,
                elem_id="evaluate-limit",
                scale=1,
            )
        with gr.Row(elem_classes="buttons"):
            locked = bool(settings.space_id())
            start = gr.Button(
                "Evaluate", variant="primary", size="md", interactive=not locked, elem_id="evaluate-start"
            )
            upload = gr.UploadButton(
                "Upload a file", size="md", file_types=list(FILE_SUFFIXES), elem_id="evaluate-upload"
            )
        note = problem_view(elem_id="evaluate-problem")
        results = job_list("evaluation", elem_id="evaluations")
    panel = EvaluationPanel(group, data, limit, note, results, gr.State([]))
    wire_evaluation(panel, name, target, start, upload)
    return panel


def wire_evaluation(
    panel: EvaluationPanel,
    name: gr.State,
    target: gr.Dropdown,
    start: gr.Button,
    upload: gr.UploadButton,
) -> None:
    """Starting, watching and cancelling."""
    asked = [target, panel.data, panel.limit]
    upload.upload(keep_evaluation_file, [name, upload], [panel.data, panel.note], **QUIET)
    start.click(on_evaluate, asked, panel.note, show_progress_on=start, api_visibility="private").then(
        refresh_evaluations, [name, panel.seen], panel.shown, queue=False, **QUIET
    )
    panel.results.select(cancel_evaluation, name, None, queue=False, **QUIET).then(
        refresh_evaluations, [name, panel.seen], panel.shown, queue=False, **QUIET
    )


def evaluation_data(name: str) -> list[tuple[str, str]]:
    """The files to evaluate on: the sample's held-out rows, and the run's own held-out file."""
    sample = settings.sample("skills_heldout.jsonl")
    choices = [("Sample: four short skills, held-out rows", str(sample))] if sample else []
    try:
        own = runs.get(name).config.data.eval_path if name else None
    except InputError:
        own = None
    return [(f"This run's held-out file: {Path(own).name}", own), *choices] if own else choices


def keep_evaluation_file(name: str, path: str) -> tuple[Any, dict[str, Any]]:
    """Keep an uploaded file and choose it."""
    kept = run_or_warn(lambda: settings.keep_upload(path))
    if kept is None:
        return gr.skip(), gr.skip()
    return gr.Dropdown(choices=[*evaluation_data(name), (kept.name, str(kept))], value=str(kept)), problem_value()


def on_evaluate(target: str | None, data: str | None, limit: float | None) -> dict[str, Any]:
    """Start the evaluation; returns the problem, or none."""
    settings.forbid_on_space()
    try:
        if not target:
            raise RunError("This run has no checkpoint yet; evaluate it once it has saved one.")
        if limit and limit < 1:
            raise ConfigError("limit", int(limit), "a whole number of rows", "0 takes them all.")
        evaluate(target, (data or "").strip(), int(limit) if limit else None)
    except MoleError as error:
        field = {"limit": "evaluate-limit", "data": "evaluate-data", "data.columns": "evaluate-data"}
        return problem_value(str(error), field.get(error.field or "", ""), reveal=True)
    return problem_value()


def cancel_evaluation(name: str, event: gr.EventData) -> None:
    """Cancel the evaluation whose button was pressed."""
    settings.forbid_on_space()
    run_or_warn(lambda: evaluation_job.Evaluation(runs.get(name), int(event._data["number"])).cancel())


def refresh_evaluations(name: str, seen: Sequence[dict[str, Any]]) -> tuple[Any, Any]:
    """The run's evaluations, for `shown`; nothing is sent when the page shows them already."""
    try:
        now = evaluation_job.list_evaluations(runs.get(name)) if name else []
    except RunError:
        now = []
    return (gr.skip(), gr.skip()) if now == seen else (now, now)
