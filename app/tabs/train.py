"""The Train tab: the form of a run, and the run as it goes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gradio as gr

from app import forms, live, problem, settings
from app.live import QUIET, Live
from mole import runs
from mole.config import ROUTERS, AdapterConfig, ModelConfig
from mole.errors import DataError, InputError, ModelError, MoleError

SUGGESTED_MODELS = [
    ModelConfig().name,
    "HuggingFaceTB/SmolLM2-360M-Instruct",
    "Qwen/Qwen3-0.6B",
    "Qwen/Qwen3-1.7B",
    "meta-llama/Llama-3.2-1B-Instruct",
    "google/gemma-3-1b-it",
]
DATA_TYPES = [".json", ".jsonl", ".csv", ".parquet"]
MAIN = (
    ("training", "max_steps"), ("training", "per_device_train_batch_size"),
    ("training", "learning_rate"), ("training", "seed"),
)  # fmt: skip
MORE = (
    ("training", "num_train_epochs"), ("training", "gradient_accumulation_steps"),
    ("training", "lr_scheduler_type"), ("training", "warmup_steps"),
    ("training", "weight_decay"), ("training", "max_grad_norm"),
    ("training", "eval_steps"), ("training", "logging_steps"),
    ("training", "save_steps"), ("training", "save_total_limit"),
    ("data", "eval_path"), ("data", "eval_fraction"),
    ("data", "max_length"), ("data", "columns"),
    ("model", "dtype"), ("model", "device"),
    ("adapter", "target_modules"), ("training", "gradient_checkpointing"),
)  # fmt: skip
"""The settings one changes rarely, two in a row."""


@dataclass
class TrainTab:
    """What the other tabs and the page's start need of this one."""

    form: forms.RunForm
    live: Live


def build() -> TrainTab:
    """Make the tab's components and handlers where we stand in the layout."""
    form = forms.RunForm()
    locked = bool(settings.space_id())
    if locked:
        text = f"**Training is switched off on this Space.** {settings.how_to_duplicate()} Chat works here."
        gr.Markdown(text, elem_classes="notice", elem_id="space-notice")
    with gr.Row(elem_classes="two-columns"):
        with gr.Column(scale=11, min_width=320):
            with card("Model and data"):
                build_sources(form)
            with card("Mixture of experts"):
                summary = build_adapter(form)
            with card("Training"):
                build_training(form)
        with gr.Column(scale=12, min_width=320, elem_classes="sticky"):
            with gr.Column(elem_classes="card"):
                with gr.Row(elem_classes="start-row"):
                    form.add_name()
                    start = gr.Button("Start training", variant="primary", interactive=not locked, elem_id="start")
                note = problem.problem(elem_id="problem")
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
            with gr.Column(elem_classes="card"):
                view = live.build("train")
    wire_router(form, summary)
    wire_start(form, note, start, command, view)
    return TrainTab(form, view)


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


def build_sources(form: forms.RunForm) -> None:
    """The base model, and the data with its upload."""
    form.add("model", "name", choices=SUGGESTED_MODELS, allow_custom_value=True)
    sample = settings.sample("skills_train.jsonl")
    samples = [("Sample: four short skills", str(sample))] if sample else []
    data = form.add("data", "path", choices=samples, value=str(sample) if sample else "", allow_custom_value=True)
    upload = gr.UploadButton("Upload a file", size="sm", file_types=DATA_TYPES, elem_id="upload")

    def keep(path: str) -> Any:
        kept = live.told(lambda: settings.keep_upload(path))
        if kept is None:
            return gr.skip()
        return gr.Dropdown(choices=[*samples, (kept.name, str(kept))], value=str(kept))

    upload.upload(keep, upload, data, **QUIET)


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
    router.change(choose, router, outputs, queue=False, **QUIET)


def wire_start(form: forms.RunForm, note: gr.HTML, start: gr.Button, command: gr.Textbox, view: Live) -> None:
    """Every change checks the settings and writes the command; Start checks the files too and starts the run."""

    def check(*values: Any) -> list[Any]:
        try:
            return [problem.told(), forms.command(form.config(values))]
        except InputError as error:
            return [said(form, values, error), gr.skip()]

    def begin(*values: Any) -> list[Any]:
        settings.forbid_on_space()
        try:
            return [problem.told(), begin_run(lambda: form.config(values))]
        except MoleError as error:
            return [said(form, values, error, reveal=True), gr.skip()]

    changes = [made.change for made in form.inputs]
    gr.on(changes, check, form.inputs, [note, command], queue=False, trigger_mode="always_last", **QUIET)
    started = start.click(begin, form.inputs, [note, view.name], show_progress_on=start, api_visibility="private")
    started.then(live.show, view.name, view.shown, **QUIET)


def begin_run(config: Callable[[], Any]) -> str:
    """Check the settings, the model and the data; make the run, start it in the background and return its name."""
    checked = config()
    runs.check_inputs(checked)
    run = runs.create(checked)
    runs.start(run)
    return run.name


def said(form: forms.RunForm, values: tuple[Any, ...], error: MoleError, reveal: bool = False) -> dict[str, Any]:
    """An error as the page's problem line, at the field it is about."""
    router = form.nested(values)["adapter"]["router"]
    dotted = error.field
    if dotted is None and isinstance(error, (DataError, ModelError)):
        dotted = "data.path" if isinstance(error, DataError) else "model.name"
    return problem.told(str(error), form.element_of(dotted, router), reveal)
