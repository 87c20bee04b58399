"""Several runs at once: routers × seeds × the values of one more setting, queued as a named group."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gradio as gr

from app import settings
from app.ui.forms import RunForm, label_of
from app.ui.wiring import on_change
from app.views.problem import problem_value, problem_view
from mole import runs
from mole.config import ROUTERS, SECTIONS, RunConfig
from mole.core.errors import MoleError
from mole.preflight.data_process import check_inputs
from mole.runs import grid
from mole.runs.run import Run

GRID_ELEMENTS = {"adapter.router": "grid-routers", "training.seed": "grid-seeds", "group": "grid-group"}
"""The element that shows an error about a setting."""


@dataclass
class GridPanel:
    """The components; `inputs` define the grid."""

    routers: gr.Dropdown
    seeds: gr.Textbox
    field: gr.Dropdown
    values: gr.Textbox
    group: gr.Textbox
    note: gr.HTML
    summary: gr.Markdown
    start: gr.Button

    @property
    def inputs(self) -> list[Any]:
        return [self.routers, self.seeds, self.field, self.values, self.group]


def build_grid() -> GridPanel:
    """Create the panel in the current layout block; call `wire_grid` once the form is complete."""
    with gr.Accordion("Several runs at once", open=False, elem_classes="accordion-card", elem_id="grid"):
        gr.Markdown(
            "Queues one run for each combination, with all other settings as in the form. The runs form a group that "
            "can be compared in the Runs tab.",
            elem_classes="quiet",
        )
        with gr.Row():
            routers = gr.Dropdown(
                choices=[(params.title, name) for name, params in ROUTERS.items()],
                multiselect=True,
                label="Routers",
                info="Leave empty for the one in the form.",
                elem_id="grid-routers",
            )
            seeds = gr.Textbox(label="Seeds", info="Separated by commas.", placeholder="0,1,2", elem_id="grid-seeds")
        with gr.Row():
            field = gr.Dropdown(
                choices=[("None", ""), *grid_fields()],
                value="",
                label="Another setting",
                info="Optional.",
                elem_id="grid-field",
            )
            values = gr.Textbox(
                label="Its values",
                info="Separated by commas; lists in brackets.",
                placeholder="8,[2,4,6,8]",
                elem_id="grid-values",
            )
        with gr.Row(elem_classes="start-row"):
            group = gr.Textbox(
                label="Group name", info="Leave empty to generate one.", placeholder="sweep", elem_id="grid-group"
            )
            start = gr.Button("Queue runs", interactive=False, elem_id="grid-start")
        note = problem_view(elem_id="grid-problem")
        summary = gr.Markdown(elem_classes="quiet", elem_id="grid-summary")
    return GridPanel(routers, seeds, field, values, group, note, summary, start)


def grid_fields() -> list[tuple[str, str]]:
    """Every other setting that can be varied, as (label, dotted name)."""
    owners = [(section, owner) for section, owner in SECTIONS.items()]
    owners += [("adapter", params) for params in ROUTERS.values()]
    found: dict[str, str] = {}
    for section, owner in owners:
        for item in dataclasses.fields(owner):
            dotted = f"{section}.{item.name}"
            if "spec" in item.metadata and dotted not in (*GRID_ELEMENTS, "data.columns"):
                found.setdefault(dotted, f"{label_of(item)} ({dotted})")
    return sorted((label, dotted) for dotted, label in found.items())


def grid_axes(routers: list[str] | None, seeds: str, field: str, values: str) -> grid.Axes:
    """The fields as the axes of a grid."""
    given = {
        "adapter.router": list(routers or []),
        "training.seed": grid.parse_values(seeds),
        **({field: grid.parse_values(values)} if field else {}),
    }
    return {dotted: found for dotted, found in given.items() if found or dotted == field}


def wire_grid(panel: GridPanel, form: RunForm, queued: Callable[[list[Run]], list[Any]], outputs: list[Any]) -> Any:
    """Every change counts the runs, the button queues them; `queued` returns the values of `outputs` afterwards."""

    def expand(values: tuple[Any, ...]) -> list[RunConfig]:
        *axes, group = values[: len(panel.inputs)]
        given = grid_axes(*axes)
        name = group.strip() or grid.free_group()
        return grid.expand(form.nested(values[len(panel.inputs) :]), given, name) if given else []

    def count(*values: Any) -> list[Any]:
        try:
            made = expand(values)
        except MoleError as error:
            return [grid_problem(error, values), "", gr.Button("Queue runs", interactive=False)]
        locked = bool(settings.space_id())
        return [
            problem_value(),
            grid_summary(made),
            gr.Button(queue_label(made), interactive=bool(made) and not locked),
        ]

    def queue(*values: Any) -> list[Any]:
        settings.forbid_on_space()
        try:
            made = grid.queue_all(expand(values), check_inputs)
        except MoleError as error:
            return [grid_problem(error, values, reveal=True), gr.skip(), *[gr.skip()] * len(outputs)]
        text = f"Queued {len(made)} runs in the group **{made[0].group}**."
        return [problem_value(), text, *queued(made)]

    def grid_problem(error: MoleError, values: tuple[Any, ...], reveal: bool = False) -> dict[str, Any]:
        field = error.field or ""
        if field and field == values[panel.inputs.index(panel.field)]:
            return problem_value(str(error), "grid-values")
        if field in GRID_ELEMENTS:
            return problem_value(str(error), GRID_ELEMENTS[field])
        return form.problem_of(values[len(panel.inputs) :], error, reveal)

    given = [*panel.inputs, *form.inputs]
    on_change(panel.inputs, count, given, [panel.note, panel.summary, panel.start], queue=False)
    return panel.start.click(
        queue, given, [panel.note, panel.summary, *outputs], show_progress_on=panel.start, api_visibility="private"
    )


def queue_label(configs: list[RunConfig]) -> str:
    """The button's text."""
    return f"Queue {len(configs)} run{'s' * (len(configs) != 1)}" if configs else "Queue runs"


def grid_summary(configs: list[RunConfig]) -> str:
    """The names, devices and steps of these runs."""
    if not configs:
        return ""
    names = [f"`{config.name}`" for config in configs]
    shown = ", ".join(names) if len(names) <= 4 else f"{names[0]}, {names[1]} … {names[-1]}"
    devices = sorted({runs.device_of(config) for config in configs})
    steps = sum(config.training.max_steps for config in configs)
    lengths = f", {steps} steps in total" if all(config.training.max_steps for config in configs) else ""
    return f"{shown}: one after another on {', '.join(devices)}{lengths}."
