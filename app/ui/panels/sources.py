"""What a run is made of: the base model, the data, which column is what, and what is held out."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr

from app import settings
from app.ui import forms
from app.ui.wiring import QUIET, on_change, run_or_warn
from app.views.status_line import status_line, status_value
from mole.config import coerce
from mole.core.errors import InputError, MoleError
from mole.core.paths import local_path
from mole.data import (
    SHAPES,
    DetectedColumns,
    describe_columns,
    detect_columns,
    guess_mapping,
    mapping_for_shape,
    read_columns,
)
from mole.models import catalog

DATA_TYPES = [".json", ".jsonl", ".csv", ".tsv", ".parquet"]
SLOTS = 3
"""The most fields a shape has."""
NOTHING = DetectedColumns((), None, {})


def build(form: forms.RunForm) -> None:
    """The base model, and the data with its upload, columns and held-out part, where we stand in the layout."""
    build_model(form)
    build_data(form)


# ---------------------------------------------------------------------------------------------------------
# The base model


def build_model(form: forms.RunForm) -> None:
    """The model with its suggestions, and under it what is known of the chosen one."""
    name = form.add("model", "name", choices=suggestions(), allow_custom_value=True)
    about = status_line(elem_id="model-about")
    gr.on(fn=lambda: gr.Dropdown(choices=suggestions()), outputs=name, queue=False, **QUIET)  # what is here may change
    gr.on(fn=about_model, inputs=name, outputs=about, queue=False, **QUIET)


def suggestions() -> list[tuple[str, str]]:
    """The models to choose from, as (label, `model.name`)."""
    labelled = []
    for entry in catalog.models():
        verdict = catalog.fits(entry).verdict
        mark = f" · {verdict}" if verdict in ("tight", "too large") else ""
        labelled.append((entry.label + mark, entry.name))
    return labelled


def about_model(name: str | None) -> dict[str, str]:
    """What is known of a model on this machine; the hub is not asked."""
    try:
        return status_value(catalog.about(name or "")[0])
    except MoleError as error:
        return status_value(str(error), tone="bad")


# ---------------------------------------------------------------------------------------------------------
# The data


@dataclass
class Mapping:
    """The components that say which column is what; `outputs` takes what `shown` gives."""

    path: Any
    text: Any
    about: gr.HTML
    card: gr.Accordion
    shape: gr.Dropdown
    slots: list[gr.Dropdown]

    @property
    def outputs(self) -> list[Any]:
        return [self.about, self.card, self.shape, *self.slots]


def build_data(form: forms.RunForm) -> None:
    """The training data: the sample, a file, a hub id, or an upload; its columns; what is held out of it."""
    sample = settings.sample("skills_train.jsonl")
    samples = [("Sample: four short skills", str(sample))] if sample else []
    first = samples[0][1] if samples else ""
    path: Any = form.add("data", "path", choices=samples, value=first, allow_custom_value=True)
    upload = gr.UploadButton("Upload a file", size="sm", file_types=DATA_TYPES, elem_id="upload")

    def keep(uploaded: str) -> Any:
        kept = run_or_warn(lambda: settings.keep_upload(uploaded))
        if kept is None:
            return gr.skip()
        return gr.Dropdown(choices=[*samples, (kept.name, str(kept))], value=str(kept))

    upload.upload(keep, upload, path, **QUIET)
    wire_columns(build_columns(form, path, look(first, {}, None) if first else NOTHING))
    with gr.Accordion("Held-out rows and length", open=False, elem_classes="accordion-card", elem_id="data-more"):
        with gr.Row():
            form.add("data", "eval_path", min_width=180)
            form.add("data", "eval_fraction", min_width=180)
        form.add("data", "max_length")


def build_columns(form: forms.RunForm, path: Any, found: DetectedColumns) -> Mapping:
    """What a file's columns are read as, and folded away how to change it."""
    about = status_line(
        elem_id="data-about", value=status_value(describe_columns(found)) if found.columns else status_value()
    )
    with gr.Accordion("Columns", open=False, elem_classes="accordion-card", elem_id="data-columns") as card:
        shape = gr.Dropdown(choices=list(SHAPES), value=found.shape, label="Read as", elem_id="columns-shape")
        with gr.Row():
            slots = [
                gr.Dropdown(**slot, min_width=140, elem_id=f"column-{number}")
                for number, slot in enumerate(slots_of(found), start=1)
            ]
        text = form.add("data", "columns")
    return Mapping(path, text, about, card, shape, slots)


def wire_columns(made: Mapping) -> None:
    """The mapping follows the file; `data.columns` is the one truth, the dropdowns show it and write it."""
    given = [made.path, made.text, made.shape]
    on_change([made.path], settled, given[:2], [made.text, *made.outputs])
    on_change([made.text], shown, given, made.outputs)
    made.shape.input(read_as, [made.path, made.shape], [made.text, *made.outputs], **QUIET)
    gr.on([slot.input for slot in made.slots], written, [*given, *made.slots], made.text, **QUIET)


def is_here(path: str | None) -> bool:
    """Whether the data are a file on this machine: what is not is not looked up before the run starts."""
    return bool(path) and settings.is_public(str(path)) and os.path.isfile(local_path(str(path)))


def mapping_of(text: str | None) -> dict[str, str]:
    """The mapping that `data.columns` spells. Raises `ConfigError`."""
    mapping: dict[str, str] = coerce(dict[str, str], text, "data.columns") if (text or "").strip() else {}
    return mapping


def look(path: str, mapping: dict[str, str], shape: str | None) -> DetectedColumns:
    """A file's columns under a mapping. Raises `DataError`."""
    return detect_columns(read_columns(path), mapping, path, shape)


def shown(path: str | None, text: str | None, shape: str | None) -> list[Any]:
    """For `outputs`: the file's columns, and what they are read as."""
    if not path or not is_here(path):
        words = f"{path} is no file here: the hub is asked for it when the run starts." if path else ""
        return [status_value(words), gr.skip(), gr.Dropdown(list(SHAPES), value=None), *updates(NOTHING)]
    try:
        found = look(path, mapping_of(text), shape)
    except InputError as error:
        return [status_value(str(error), tone="bad"), gr.skip(), gr.skip(), *[gr.skip()] * SLOTS]
    asks = found.shape is None or any(column is None for name, column in found.fields.items() if name != "input")
    card = gr.Accordion(open=True) if asks else gr.skip()
    return [status_value(describe_columns(found)), card, gr.Dropdown(list(SHAPES), value=found.shape), *updates(found)]


def slots_of(found: DetectedColumns) -> list[dict[str, Any]]:
    """The settings of the dropdowns: one for each field of the shape, the others hidden."""
    slots: list[dict[str, Any]] = []
    for name, column in found.fields.items():
        label = f"{name}, if any, is in" if name == "input" else f"{name} is in"
        slots.append({"choices": list(found.columns), "value": column, "label": label, "visible": True})
    hidden = {"choices": list(found.columns), "value": None, "label": "Column", "visible": False}
    return slots + [hidden] * (SLOTS - len(slots))


def updates(found: DetectedColumns) -> list[gr.Dropdown]:
    """The same as what a handler returns."""
    return [gr.Dropdown(**slot) for slot in slots_of(found)]


def settled(path: str | None, text: str | None) -> list[Any]:
    """For `data.columns` and `outputs`, after another file was chosen: a mapping that does not fit is guessed anew."""
    try:
        if path and is_here(path):
            there = read_columns(path)
            mapping = mapping_of(text)
            if not mapping or not {*mapping.values()} <= {*there}:
                known = detect_columns(there, {}, path).shape
                text = forms.spelled({} if known else guess_mapping(there))
    except InputError:
        pass  # `shown` says it
    return [text, *shown(path, text, None)]


def read_as(path: str | None, shape: str | None) -> list[Any]:
    """For `data.columns` and `outputs`, after a shape was chosen by hand: its fields, as far as they can be guessed."""
    if not path or not shape or not is_here(path):
        return [gr.skip()] * (4 + SLOTS)
    text = forms.spelled(mapping_for_shape(read_columns(path), shape))
    return [text, *shown(path, text, shape)]


def written(path: str | None, text: str | None, shape: str | None, *slots: str | None) -> Any:
    """`data.columns` after a column was chosen by hand: what differs from the names, all of it where they mislead."""
    if not path or not is_here(path):
        return gr.skip()
    there: Sequence[str] = read_columns(path)
    fields = detect_columns(there, mapping_of(text), path, shape).fields
    wanted = dict(zip(fields, slots, strict=False))
    mapping = {name: column for name, column in wanted.items() if column}
    short = {name: column for name, column in mapping.items() if name != column}
    return forms.spelled(short if detect_columns(there, short, path).fields == wanted else mapping)
