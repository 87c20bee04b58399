"""The Train tab: the form of a run, what stands around it, and the run as it goes."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import gradio as gr

from app import settings
from app.services.run_control import start_new_run
from app.ui import forms
from app.ui.panels import grid, live, preflight, presets, preview, queue, sources
from app.ui.panels.live import Live
from app.ui.panels.preflight import Preflight
from app.ui.panels.queue import Queue
from app.ui.wiring import QUIET, on_change
from app.views.problem import problem_value, problem_view
from mole import runs
from mole.config import ROUTERS, AdapterConfig
from mole.core.errors import InputError, MoleError
from mole.runs.run import Run

MAIN = (
    ("training", "max_steps"), ("training", "num_train_epochs"),
    ("training", "per_device_train_batch_size"), ("training", "gradient_accumulation_steps"),
    ("training", "learning_rate"), ("training", "seed"),
)  # fmt: skip
MORE = (
    ("training", "lr_scheduler_type"), ("training", "warmup_steps"),
    ("training", "weight_decay"), ("training", "max_grad_norm"),
    ("training", "eval_steps"), ("training", "logging_steps"),
    ("training", "save_steps"), ("training", "save_total_limit"),
    ("model", "dtype"), ("model", "quantization"),
    ("model", "device"), ("adapter", "target_modules"),
    ("training", "gradient_checkpointing"),
)  # fmt: skip
"""The settings one changes rarely, two in a row."""


@dataclass
class TrainTab:
    """What the other tabs and the page's start need of this one."""

    form: forms.RunForm
    live: Live
    queue: Queue
    preflight: Preflight

    @property
    def shown(self) -> list[Any]:
        """The outputs of `entered` and `left`."""
        return [*self.queue.shown, self.preflight.known, self.preflight.timer]

    def entered(self) -> list[Any]:
        """The tab comes to the front: the queue as it is, and its clocks go."""
        return [*queue.entered(), {}, gr.Timer(active=True)]

    def left(self) -> list[Any]:
        """The tab is left: nothing ticks there."""
        return [*queue.left(), gr.skip(), gr.Timer(active=False)]

    def fill_from(self, name: str) -> list[Any]:
        """The values of `form.inputs` that repeat a run, but for its name: to train it again with changes.

        Raises `InputError` when there is no such run, or its `run.yaml` cannot be read.
        """
        config = runs.get(name).config
        return self.form.fill(dataclasses.replace(config, name=None))


def build() -> TrainTab:
    """Make the tab's components and handlers where we stand in the layout."""
    form = forms.RunForm()
    locked = bool(settings.space_id())
    if locked:
        text = f"**Training is switched off on this Space.** {settings.how_to_duplicate()} Chat works here."
        gr.Markdown(text, elem_classes="notice", elem_id="space-notice")
    with gr.Row(elem_classes="two-columns"):
        with gr.Column(scale=11, min_width=320):
            with card("Begin with"):
                beginning = presets.build(form)
            with card("Model and data"):
                sources.build(form)
            with card("What the model sees"):
                seeing = preview.build()
            with card("Mixture of experts"):
                summary = build_adapter(form)
            with card("Training"):
                build_training(form)
            with gr.Column(elem_classes="card"):
                several = grid.build()
        with gr.Column(scale=12, min_width=320, elem_classes="sticky"):
            start = build_start(form, locked)
            with gr.Column(elem_classes="card"):
                checking = preflight.build(form, start.note)
            with gr.Column(elem_classes="card"):
                view = live.build("train")
            waiting = queue.build(view)
    wire_router(form, summary)
    presets.wire(beginning, form, start.note)
    wire_start(form, start, view, waiting)
    preview.wire(seeing, form, start.note)
    wire_grid(several, form, start, view, waiting)
    return TrainTab(form, view, waiting, checking)


@dataclass
class Start:
    """The card with the button: what is wrong, how it went, and the same as a command."""

    button: gr.Button
    note: gr.HTML
    status: gr.Markdown
    command: gr.Textbox


def build_start(form: forms.RunForm, locked: bool) -> Start:
    """The run's name, Start, and what there is to say about it."""
    with gr.Column(elem_classes="card"):
        with gr.Row(elem_classes="start-row"):
            form.add_name()
            button = gr.Button("Start training", variant="primary", interactive=not locked, elem_id="start")
        note = problem_view(elem_id="problem")
        status = gr.Markdown(elem_classes="quiet", elem_id="start-status")
        with gr.Accordion("The same on the command line", open=False, elem_classes="accordion-card"):
            command = gr.Textbox(
                value=forms.command(form.config([made.value for made in form.inputs])),
                show_label=False,
                max_lines=20,
                interactive=False,
                buttons=["copy"],
                elem_classes="command",
                elem_id="command",
            )
    return Start(button, note, status, command)


def card(title: str) -> gr.Column:
    """A titled card; use it in a `with` block."""
    column = gr.Column(elem_classes="card")
    with column:
        gr.Markdown(f"## {title}", elem_classes="heading")
    return column


def rows(form: forms.RunForm, settings_: tuple[tuple[str, str], ...]) -> None:
    """Settings, two in a row."""
    for pair in (settings_[at : at + 2] for at in range(0, len(settings_), 2)):
        with gr.Row():
            for section, name in pair:
                form.add(section, name, min_width=180)


def build_adapter(form: forms.RunForm) -> gr.Markdown:
    """The router with its summary and own settings, and what all routers share; returns the summary."""
    chosen = AdapterConfig().router
    choices = [(params.title, name) for name, params in ROUTERS.items()]
    form.add("adapter", "router", choices=choices, info=None)
    summary = gr.Markdown(describe(chosen), elem_classes="quiet", elem_id="router-summary")
    for router in ROUTERS:
        form.add_router(router, visible=router == chosen)
    rows(form, (("adapter", "num_experts"), ("adapter", "r"), ("adapter", "lora_alpha"), ("adapter", "lora_dropout")))
    return summary


def build_training(form: forms.RunForm) -> None:
    """Steps, batch, learning rate and seed; the rest folded away."""
    rows(form, MAIN)
    with gr.Accordion("More", open=False, elem_classes="accordion-card", elem_id="more"):
        rows(form, MORE)


def describe(router: str) -> str:
    """A router in one sentence, with its paper."""
    params = ROUTERS[router]
    return f"{params.summary} [Paper]({params.paper})" if params.paper else params.summary


def wire_router(form: forms.RunForm, summary: gr.Markdown) -> None:
    """Choosing a router shows its summary and its own settings only."""
    names = list(form.groups)

    def choose(router: str) -> list[Any]:
        return [describe(router), *(gr.Column(visible=name == router) for name in names)]

    outputs = [summary, *form.groups.values()]
    router: Any = form.shared["adapter.router"]
    on_change([router], choose, router, outputs, queue=False)


def wire_start(form: forms.RunForm, start: Start, view: Live, waiting: Queue) -> None:
    """Every change checks the settings and writes the command; Start checks the files too and starts the run."""

    def check(*values: Any) -> list[Any]:
        try:
            return [problem_value(), forms.command(form.config(values))]
        except InputError as error:
            return [form.problem_of(values, error), gr.skip()]

    def begin(*values: Any) -> list[Any]:
        try:
            run = start_new_run(lambda: form.config(values))
            return [problem_value(), began([run]), run.name]
        except MoleError as error:
            return [form.problem_of(values, error, reveal=True), "", gr.skip()]

    on_change(form.inputs, check, form.inputs, [start.note, start.command], queue=False)
    started = start.button.click(
        begin,
        form.inputs,
        [start.note, start.status, view.name],
        show_progress_on=start.button,
        api_visibility="private",
    )
    show_after(started, view, waiting)


def wire_grid(several: grid.Grid, form: forms.RunForm, start: Start, view: Live, waiting: Queue) -> None:
    """Several runs at once: the first of them is shown."""

    def queued(made: list[Run]) -> list[Any]:
        return [began(made), made[0].name]

    show_after(grid.wire(several, form, queued, [start.status, view.name]), view, waiting)


def show_after(started: Any, view: Live, waiting: Queue) -> None:
    """Once something was started, it is to be seen."""
    started.then(live.show, view.name, view.shown, **QUIET).then(
        queue.refresh_now, waiting.known, waiting.shown, queue=False, **QUIET
    )


def began(made: list[Run]) -> str:
    """What is said of runs that were just started: what the first of them waits for; nothing when it need not."""
    before = runs.ahead_of(made[0])
    if not before:
        return ""
    others = f" and {len(before) - 1} more" if len(before) > 1 else ""
    return f"Queued behind `{before[0]}`{others}: it starts by itself, also when this page is closed."
