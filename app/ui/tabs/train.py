"""The Train tab: the form of a run, and the run as it trains."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import gradio as gr

from app import settings
from app.services import visitor_limits, visitors
from app.services.run_control import start_new_run
from app.ui.forms import RunForm
from app.ui.panels.grid import build_grid, wire_grid
from app.ui.panels.live import LivePanel, build_live, show_live
from app.ui.panels.own_hardware import build_commands, command_texts
from app.ui.panels.preflight import PreflightPanel, build_preflight
from app.ui.panels.presets import build_presets, wire_presets
from app.ui.panels.preview import build_preview_panel, wire_preview
from app.ui.panels.queue import QueuePanel, build_queue, pause_queue, refresh_queue_now, resume_queue
from app.ui.panels.sources import build_sources
from app.ui.wiring import QUIET, on_change
from app.views.problem import problem_value, problem_view
from mole import runs
from mole.config import ROUTERS, AdapterConfig
from mole.core import limits
from mole.core.errors import InputError, MoleError
from mole.core.text import bytes_text
from mole.runs.run import Run

MAIN_SETTINGS = (
    ("training", "max_steps"), ("training", "num_train_epochs"),
    ("training", "per_device_train_batch_size"), ("training", "gradient_accumulation_steps"),
    ("training", "learning_rate"), ("training", "seed"),
)  # fmt: skip
MORE_SETTINGS: dict[str, tuple[tuple[str, str], ...]] = {
    "Schedule": (
        ("training", "lr_scheduler_type"), ("training", "warmup_steps"), ("training", "lr_restarts"),
        ("training", "weight_decay"), ("training", "max_grad_norm"),
    ),
    "Evaluation and checkpoints": (
        ("training", "eval_steps"), ("training", "logging_steps"),
        ("training", "save_steps"), ("training", "save_total_limit"),
    ),
    "Base model": (
        ("model", "dtype"), ("model", "quantization"),
        ("model", "device"), ("training", "gradient_checkpointing"),
        ("adapter", "init_from"),
    ),
    "Layers with experts": (
        ("adapter", "target_modules"), ("adapter", "exclude_modules"),
        ("adapter", "layers_to_transform"), ("adapter", "layers_pattern"),
        ("adapter", "rank_pattern"), ("adapter", "alpha_pattern"),
        ("adapter", "use_rslora"),
    ),
    "Trained beside the experts": (
        ("adapter", "modules_to_save"), ("adapter", "trainable_token_indices"),
        ("adapter", "bias"),
    ),
}  # fmt: skip
"""The settings that are rarely changed, by groups."""
VISITORS_NAME = "For the commands below; here a run gets a secret name."


@dataclass
class TrainTab:
    """The tab's components that the page and the other tabs need."""

    form: RunForm
    live: LivePanel
    queue: QueuePanel
    preflight: PreflightPanel

    @property
    def shown(self) -> list[Any]:
        """The outputs of `resume` and `pause`."""
        return [*self.queue.shown, self.preflight.known, self.preflight.timer]

    def resume(self) -> list[Any]:
        """The tab becomes active: the queue as of now, and polling."""
        return [*resume_queue(), {}, gr.Timer(active=True)]

    def pause(self) -> list[Any]:
        """The tab is left: polling stops."""
        return [*pause_queue(), gr.skip(), gr.Timer(active=False)]

    def fill_from(self, name: str) -> list[Any]:
        """The values of `form.inputs` that repeat a run without its name, to train it again with changes.

        Raises `InputError` when there is no such run, or its `run.yaml` cannot be read.
        """
        config = runs.get(name).config
        return self.form.fill(dataclasses.replace(config, name=None))


def build_train_tab(own: Any) -> TrainTab:
    """Create the tab's components and handlers in the current layout block; `own` holds the visitor's runs."""
    form = RunForm()
    if settings.space_id():
        gr.Markdown(space_notice(), elem_classes="notice", elem_id="space-notice")
    with gr.Row(elem_classes="two-columns"):
        with gr.Column(scale=11, min_width=320):
            with card("Start from"):
                presets = build_presets()
            with card("Model and data"):
                build_sources(form)
            with card("What the model sees"):
                preview = build_preview_panel()
            with card("Mixture of experts"):
                summary = build_adapter(form)
            with card("Training"):
                build_training(form)
            with gr.Column(elem_classes="card"):
                grid = build_grid()
        with gr.Column(scale=12, min_width=320, elem_classes="sticky"):
            start = build_start(form)
            with gr.Column(elem_classes="card"):
                preflight = build_preflight(form, start.note)
            with gr.Column(elem_classes="card"):
                live = build_live("train")
            queue = build_queue(live)
    wire_router(form, summary)
    wire_presets(presets, form, start.note)
    wire_preview(preview, form, start.note)
    show_started(wire_start(form, start, live, own), live, queue)
    started = wire_grid(grid, form, lambda made: [queue_notice(made), made[0].name], [start.status, live.name])
    show_started(started, live, queue)
    return TrainTab(form, live, queue, preflight)


@dataclass
class StartPanel:
    """The card with the Start button: what is wrong, what happened, and the same run as a command."""

    button: gr.Button
    note: gr.HTML
    status: gr.Markdown
    commands: list[Any]
    """The outputs of `command_texts`."""


def space_notice() -> str:
    """What can be trained on this Space, and how else."""
    if not settings.visitors_train():
        return f"**Training is switched off on this Space.** {settings.how_to_duplicate()} Chat works here."
    size = bytes_text(visitor_limits.DATA_BYTES)
    return (
        "**Short runs train here, on a GPU of ZeroGPU and your own quota:** the default model, the samples or an "
        f"upload of up to {size}, and up to {visitor_limits.MOST_SECONDS:g} seconds. Only you see your run. It is "
        f"deleted an hour after it ended, so export it in Runs. {settings.how_to_duplicate()}"
    )


def build_start(form: RunForm) -> StartPanel:
    """The run's name, the Start button and its messages."""
    locked = bool(settings.space_id()) and not settings.visitors_train()
    with gr.Column(elem_classes="card"):
        with gr.Row(elem_classes="start-row"):
            form.add_name(VISITORS_NAME) if settings.visitors_train() else form.add_name()
            button = gr.Button("Start training", variant="primary", interactive=not locked, elem_id="start")
        note = problem_view(elem_id="problem")
        status = gr.Markdown(elem_classes="quiet", elem_id="start-status")
        commands = build_commands(form)
    return StartPanel(button, note, status, commands)


def card(title: str) -> gr.Column:
    """A titled card, for a `with` block."""
    column = gr.Column(elem_classes="card")
    with column:
        gr.Markdown(f"## {title}", elem_classes="heading")
    return column


def add_pairs(form: RunForm, names: tuple[tuple[str, str], ...]) -> None:
    """Add settings to the form, two in a row."""
    for pair in (names[at : at + 2] for at in range(0, len(names), 2)):
        with gr.Row():
            for section, name in pair:
                form.add(section, name, min_width=180)


def build_adapter(form: RunForm) -> gr.Markdown:
    """The router with its own settings, and the settings all routers share; returns the router's summary."""
    first = AdapterConfig().router
    choices = [(params.title, name) for name, params in ROUTERS.items()]
    form.add("adapter", "router", choices=choices, info=None)
    summary = gr.Markdown(router_summary(first), elem_classes="quiet", elem_id="router-summary")
    for router in ROUTERS:
        form.add_router(router, visible=router == first)
    shared = ("num_experts", "r", "lora_alpha", "lora_dropout")
    add_pairs(form, tuple(("adapter", name) for name in shared))
    return summary


def build_training(form: RunForm) -> None:
    """Steps, batch, learning rate and seed; the other settings in an accordion."""
    add_pairs(form, MAIN_SETTINGS)
    with gr.Accordion("More", open=False, elem_classes="accordion-card", elem_id="more"):
        for title, names in MORE_SETTINGS.items():
            gr.Markdown(f"### {title}", elem_classes="group")
            add_pairs(form, names)


def router_summary(router: str) -> str:
    """A router in one sentence, with its paper."""
    params = ROUTERS[router]
    return f"{params.summary} [Paper]({params.paper})" if params.paper else params.summary


def wire_router(form: RunForm, summary: gr.Markdown) -> None:
    """Choosing a router shows its summary, and its own settings only."""

    def choose(router: str) -> list[Any]:
        return [router_summary(router), *(gr.Column(visible=name == router) for name in form.groups)]

    router: Any = form.shared["adapter.router"]
    on_change([router], choose, router, [summary, *form.groups.values()], queue=False)


def wire_start(form: RunForm, start: StartPanel, live: LivePanel, own: Any) -> Any:
    """Every change checks the settings and updates the commands; Start also checks the files and starts the run."""

    def check(*values: Any) -> list[Any]:
        try:
            return [problem_value(), *command_texts(form.config(values))]
        except InputError as error:
            return [form.problem_of(values, error), *[gr.skip()] * len(start.commands)]

    def begin(*values: Any) -> list[Any]:
        try:
            run = start_new_run(lambda: form.config(values))
            return [problem_value(), queue_notice([run]), run.name]
        except MoleError as error:
            return [form.problem_of(values, error, reveal=True), "", gr.skip()]

    on_change(form.inputs, check, form.inputs, [start.note, *start.commands], queue=False)
    if settings.visitors_train():
        return wire_visitor(form, start, live, own)
    return start.button.click(
        begin,
        form.inputs,
        [start.note, start.status, live.name],
        show_progress_on=start.button,
        api_visibility="private",
    )


def wire_visitor(form: RunForm, start: StartPanel, live: LivePanel, own: Any) -> Any:
    """Start creates a visitor's run, which the page then shows, and trains it in an event of its own until it ends."""
    pending = gr.State(None)

    def begin(names: Any, *values: Any) -> list[Any]:
        try:
            run, seconds = visitors.create_run(lambda: form.config(values), names)
        except MoleError as error:
            return [form.problem_of(values, error, reveal=True), "", gr.skip(), gr.skip(), None]
        asked = visitors.call_seconds(run.name, seconds)
        text = f"Waiting for a GPU, for up to {asked:.0f} seconds of your quota."
        names = [*(names or []), run.name][-visitors.OWN_RUNS :]
        return [problem_value(), text, run.name, names, (run.name, seconds)]

    def train(asked: tuple[str, float] | None) -> list[Any]:
        if asked is None:
            return [gr.skip(), gr.skip()]
        try:
            state = visitors.train(*asked)
        except MoleError as error:
            return [problem_value(str(error)), ""]
        if state != "finished":
            return [gr.skip(), f"Your run has {state}." if state == "failed" else f"Your run was {state}."]
        return [gr.skip(), "Your run has ended. Within an hour, chat with it, or export it in Runs."]

    started = start.button.click(
        begin,
        [own, *form.inputs],
        [start.note, start.status, live.name, own, pending],
        show_progress_on=start.button,
        api_visibility="private",
    )
    started.then(train, pending, [start.note, start.status], concurrency_limit=limits.VISITORS, **QUIET)
    return started


def show_started(started: Any, live: LivePanel, queue: QueuePanel) -> None:
    """Show what was just started, and the queue."""
    started.then(show_live, live.name, live.shown, **QUIET).then(
        refresh_queue_now, queue.known, queue.shown, queue=False, **QUIET
    )


def queue_notice(started: list[Run]) -> str:
    """What runs that were just started wait for; empty if the first need not wait."""
    before = runs.ahead_of(started[0])
    if not before:
        return ""
    others = f" and {len(before) - 1} more" if len(before) > 1 else ""
    return f"Queued behind `{before[0]}`{others}: it starts automatically, even when this page is closed."
