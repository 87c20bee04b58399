"""Several runs at once: routers × seeds × the values of one more setting, queued as a named group."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gradio as gr

from app import settings
from app.ui import forms
from app.ui.wiring import on_change
from app.views.problem import problem_value, problem_view
from mole import runs
from mole.config import ROUTERS, SECTIONS, RunConfig
from mole.core.errors import MoleError
from mole.runs import grid
from mole.runs.run import Run

ELEMENTS = {"adapter.router": "grid-routers", "training.seed": "grid-seeds", "group": "grid-group"}
"""Where an error about one of these is shown."""


@dataclass
class Grid:
    """The components; `inputs` are what a grid is made of."""

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


def build() -> Grid:
    """Make the panel where we stand in the layout; `wire` when the form is whole."""
    with gr.Accordion("Try several at once", open=False, elem_classes="accordion-card", elem_id="grid"):
        gr.Markdown(
            "Every combination of these becomes a run, with all else as in the form; they are queued as one group, "
            "to be compared in the Runs tab.",
            elem_classes="quiet",
        )
        with gr.Row():
            routers = gr.Dropdown(
                choices=[(params.title, name) for name, params in ROUTERS.items()],
                multiselect=True,
                label="Routers",
                info="None: the one in the form.",
                elem_id="grid-routers",
            )
            seeds = gr.Textbox(
                label="Seeds", info="With commas between them.", placeholder="0,1,2", elem_id="grid-seeds"
            )
        with gr.Row():
            field = gr.Dropdown(
                choices=[("None", ""), *fields()],
                value="",
                label="One more setting",
                info="Any of them.",
                elem_id="grid-field",
            )
            values = gr.Textbox(
                label="Its values",
                info="With commas between them; a list in brackets.",
                placeholder="8,[2,4,6,8]",
                elem_id="grid-values",
            )
        with gr.Row(elem_classes="start-row"):
            group = gr.Textbox(
                label="Name of the group", info="Empty takes one by itself.", placeholder="sweep", elem_id="grid-group"
            )
            start = gr.Button("Queue runs", interactive=False, elem_id="grid-start")
        note = problem_view(elem_id="grid-problem")
        summary = gr.Markdown(elem_classes="quiet", elem_id="grid-summary")
    return Grid(routers, seeds, field, values, group, note, summary, start)


def fields() -> list[tuple[str, str]]:
    """Every setting that can be varied, by label and dotted name; routers and seeds have fields of their own."""
    owners = [(section, owner) for section, owner in SECTIONS.items()]
    owners += [("adapter", params) for params in ROUTERS.values()]
    found: dict[str, str] = {}
    for section, owner in owners:
        for item in dataclasses.fields(owner):
            dotted = f"{section}.{item.name}"
            if "spec" in item.metadata and dotted not in (*ELEMENTS, "data.columns"):
                found.setdefault(dotted, f"{forms.label_of(item)} ({dotted})")
    return sorted((label, dotted) for dotted, label in found.items())


def axes_of(routers: list[str] | None, seeds: str, field: str, values: str) -> grid.Axes:
    """What was filled in, as the axes of a grid."""
    given = {
        "adapter.router": list(routers or []),
        "training.seed": grid.parse_values(seeds),
        **({field: grid.parse_values(values)} if field else {}),
    }
    return {dotted: found for dotted, found in given.items() if found or dotted == field}


def wire(panel: Grid, form: forms.RunForm, queued: Callable[[list[Run]], list[Any]], outputs: list[Any]) -> Any:
    """Every change counts the runs, the button queues them; `queued` gives what to put into `outputs` then."""

    def expanded(values: tuple[Any, ...]) -> list[RunConfig]:
        *axes, group = values[: len(panel.inputs)]
        given = axes_of(*axes)
        name = group.strip() or grid.free_group()
        return grid.expand(form.nested(values[len(panel.inputs) :]), given, name) if given else []

    def count(*values: Any) -> list[Any]:
        try:
            made = expanded(values)
        except MoleError as error:
            return [said(error, values), "", gr.Button("Queue runs", interactive=False)]
        locked = bool(settings.space_id())
        return [problem_value(), words(made), gr.Button(button(made), interactive=bool(made) and not locked)]

    def queue(*values: Any) -> list[Any]:
        settings.forbid_on_space()
        try:
            made = grid.queue_all(expanded(values))
        except MoleError as error:
            return [said(error, values, reveal=True), gr.skip(), *[gr.skip()] * len(outputs)]
        text = f"Queued {len(made)} runs in the group **{made[0].group}**."
        return [problem_value(), text, *queued(made)]

    def said(error: MoleError, values: tuple[Any, ...], reveal: bool = False) -> dict[str, Any]:
        field = error.field or ""
        if field and field == values[panel.inputs.index(panel.field)]:
            return problem_value(str(error), "grid-values")
        if field in ELEMENTS:
            return problem_value(str(error), ELEMENTS[field])
        return form.problem_of(values[len(panel.inputs) :], error, reveal)

    given = [*panel.inputs, *form.inputs]
    on_change(panel.inputs, count, given, [panel.note, panel.summary, panel.start], queue=False)
    return panel.start.click(
        queue, given, [panel.note, panel.summary, *outputs], show_progress_on=panel.start, api_visibility="private"
    )


def button(made: list[RunConfig]) -> str:
    """What the button says."""
    return f"Queue {len(made)} run{'s' * (len(made) != 1)}" if made else "Queue runs"


def words(made: list[RunConfig]) -> str:
    """How many runs, what they are called, and about what they take together."""
    if not made:
        return ""
    names = [f"`{config.name}`" for config in made]
    shown = ", ".join(names) if len(names) <= 4 else f"{names[0]}, {names[1]} … {names[-1]}"
    devices = sorted({runs.device_of(config) for config in made})
    steps = sum(config.training.max_steps for config in made)
    lengths = f", {steps} steps in all" if all(config.training.max_steps for config in made) else ""
    return f"{shown}: one after another on {', '.join(devices)}{lengths}."
