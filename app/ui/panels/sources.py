"""The base model and the data of a run: the file, its columns, and its held-out rows."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr

from app import settings
from app.ui.forms import RunForm, command_text
from app.ui.panels.more_files import build_more_files, wire_more_files
from app.ui.wiring import QUIET, on_change, run_or_warn
from app.views.status_line import status_line, status_value
from mole.config import coerce
from mole.core.errors import InputError, MoleError
from mole.core.paths import local_path
from mole.data import (
    FILE_SUFFIXES,
    SHAPES,
    DetectedColumns,
    describe_columns,
    detect_columns,
    guess_mapping,
    mapping_for_shape,
    read_columns,
)
from mole.models import catalog
from mole.preflight.data_process import columns_of

PATH_HELP = "JSON, JSONL, CSV or Parquet file, or a hub id, as owner/name or owner/name:configuration:split."
MAX_FIELDS = 3
"""The most fields a shape of data has; each gets a dropdown."""
NO_COLUMNS = DetectedColumns((), None, {})


def build_sources(form: RunForm) -> None:
    """Create the fields of the base model and of the data in the current layout block."""
    build_model(form)
    build_data(form)


# ---------------------------------------------------------------------------------------------------------
# The base model


def build_model(form: RunForm) -> None:
    """The model, with known ones to choose from, and a line about the chosen one."""
    name = form.add("model", "name", choices=model_choices(), allow_custom_value=True)
    about = status_line(elem_id="model-about")
    gr.on(fn=lambda: gr.Dropdown(choices=model_choices()), outputs=name, queue=False, **QUIET)
    gr.on(fn=model_facts, inputs=name, outputs=about, queue=False, **QUIET)


def model_choices() -> list[tuple[str, str]]:
    """The models to choose from, as (label, `model.name`)."""
    choices = []
    for entry in catalog.models():
        verdict = catalog.fits(entry).verdict
        mark = f" · {verdict}" if verdict in ("tight", "too large") else ""
        choices.append((entry.label + mark, entry.name))
    return choices


def model_facts(name: str | None) -> dict[str, str]:
    """What is known about a model without asking the hub."""
    try:
        return status_value(catalog.about(name or "")[0])
    except MoleError as error:
        return status_value(str(error), tone="bad")


# ---------------------------------------------------------------------------------------------------------
# The data


@dataclass
class ColumnPanel:
    """The components that map columns to fields; `outputs` are the outputs of `column_updates`."""

    path: Any
    text: Any
    about: gr.HTML
    card: gr.Accordion
    shape: gr.Dropdown
    slots: list[gr.Dropdown]

    @property
    def outputs(self) -> list[Any]:
        return [self.about, self.card, self.shape, *self.slots]


def build_data(form: RunForm) -> None:
    """The training data: the sample, a file, a hub id or an upload; its columns; its held-out rows."""
    sample = settings.sample("skills_train.jsonl")
    samples = [("Sample: four short skills", str(sample))] if sample else []
    first = samples[0][1] if samples else ""
    path: Any = form.add("data", "path", choices=samples, value=first, allow_custom_value=True, info=PATH_HELP)
    upload = gr.UploadButton("Upload a file", size="sm", file_types=list(FILE_SUFFIXES), elem_id="upload")

    def keep(uploaded: str) -> Any:
        kept = run_or_warn(lambda: settings.keep_upload(uploaded))
        if kept is None:
            return gr.skip()
        return gr.Dropdown(choices=[*samples, (kept.name, str(kept))], value=str(kept))

    upload.upload(keep, upload, path, **QUIET)
    detected = detect_columns(read_columns(first), {}, first) if first else NO_COLUMNS  # our own file: read here
    wire_columns(build_columns(form, path, detected))
    more = build_more_files(samples)
    form.further = more.further
    wire_more_files(more, columns_of_further_file, samples)
    with gr.Accordion("Held-out rows and length", open=False, elem_classes="accordion-card", elem_id="data-more"):
        with gr.Row():
            form.add("data", "eval_path", min_width=180)
            form.add("data", "eval_fraction", min_width=180)
        with gr.Row():
            form.add("data", "max_length", min_width=180)
            form.add("data", "enable_thinking", min_width=180)
        with gr.Row():
            form.add("data", "name", min_width=180)
            form.add("data", "split", min_width=180)


def build_columns(form: RunForm, path: Any, detected: DetectedColumns) -> ColumnPanel:
    """A line about how a file's columns are read, and an accordion to change it."""
    about = status_line(
        elem_id="data-about", value=status_value(describe_columns(detected) if detected.columns else "")
    )
    with gr.Accordion("Columns", open=False, elem_classes="accordion-card", elem_id="data-columns") as card:
        shape = gr.Dropdown(choices=list(SHAPES), value=detected.shape, label="Read as", elem_id="columns-shape")
        with gr.Row():
            slots = [
                gr.Dropdown(**slot, min_width=140, elem_id=f"column-{number}")
                for number, slot in enumerate(slot_settings(detected), start=1)
            ]
        text = form.add("data", "columns")
    return ColumnPanel(path, text, about, card, shape, slots)


def wire_columns(panel: ColumnPanel) -> None:
    """The mapping follows the file. The field `data.columns` holds it; the dropdowns show it and write to it."""
    given = [panel.path, panel.text, panel.shape]
    on_change([panel.path], columns_for_file, given[:2], [panel.text, *panel.outputs])
    on_change([panel.text], column_updates, given, panel.outputs)
    panel.shape.input(columns_for_shape, [panel.path, panel.shape], [panel.text, *panel.outputs], **QUIET)
    gr.on([slot.input for slot in panel.slots], columns_setting, [*given, *panel.slots], panel.text, **QUIET)


def is_local_file(path: str | None) -> bool:
    """Whether the data are a file on this machine; anything else is not read before the run starts."""
    return bool(path) and settings.is_public(str(path)) and os.path.isfile(local_path(str(path)))


def parse_mapping(text: str | None) -> dict[str, str]:
    """The mapping in the text of `data.columns`. Raises `ConfigError`."""
    mapping: dict[str, str] = coerce(dict[str, str], text, "data.columns") if (text or "").strip() else {}
    return mapping


def detected_in(path: str, mapping: dict[str, str], shape: str | None) -> DetectedColumns:
    """A file's columns under a mapping. Raises `DataError`."""
    return detect_columns(columns_of(path), mapping, path, shape)


def columns_of_further_file(path: str | None, text: str | None) -> list[Any]:
    """The text of a further file's columns, guessed again if they do not fit it, and the line about them."""
    text, about = columns_for_file(path, text)[:2]
    return [text, {**about, "text": about["text"].replace("to fields below", "under Columns")}]


def column_updates(path: str | None, text: str | None, shape: str | None) -> list[Any]:
    """The file's columns and how they are read, for `ColumnPanel.outputs`."""
    if not path or not is_local_file(path):
        words = f"{path} is not a local file; it is loaded from the hub when the run starts." if path else ""
        if (path or "").startswith(("[", "{")):
            words = "Several files or data sets; the preview shows what is read of each."
        return [status_value(words), gr.skip(), gr.Dropdown(list(SHAPES), value=None), *slot_updates(NO_COLUMNS)]
    try:
        detected = detected_in(path, parse_mapping(text), shape)
    except InputError as error:
        return [status_value(str(error), tone="bad"), gr.skip(), gr.skip(), *[gr.skip()] * MAX_FIELDS]
    asks = detected.shape is None or any(column is None for name, column in detected.fields.items() if name != "input")
    card = gr.Accordion(open=True) if asks else gr.skip()
    return [
        status_value(describe_columns(detected)),
        card,
        gr.Dropdown(list(SHAPES), value=detected.shape),
        *slot_updates(detected),
    ]


def slot_settings(detected: DetectedColumns) -> list[dict[str, Any]]:
    """The arguments of the dropdowns: one for each field of the shape, the others hidden."""
    slots: list[dict[str, Any]] = []
    for name, column in detected.fields.items():
        label = f"{name}, if any, is in" if name == "input" else f"{name} is in"
        slots.append({"choices": list(detected.columns), "value": column, "label": label, "visible": True})
    hidden = {"choices": list(detected.columns), "value": None, "label": "Column", "visible": False}
    return slots + [hidden] * (MAX_FIELDS - len(slots))


def slot_updates(detected: DetectedColumns) -> list[gr.Dropdown]:
    """`slot_settings` as a handler returns them."""
    return [gr.Dropdown(**slot) for slot in slot_settings(detected)]


def columns_for_file(path: str | None, text: str | None) -> list[Any]:
    """For `data.columns` and `outputs`, after a file was chosen: a mapping that does not fit it is guessed again."""
    try:
        if path and is_local_file(path):
            there = columns_of(path)
            mapping = parse_mapping(text)
            if not mapping or not {*mapping.values()} <= {*there}:
                known = detect_columns(there, {}, path).shape
                text = command_text({} if known else guess_mapping(there))
    except InputError:
        pass  # `column_updates` shows the error
    return [text, *column_updates(path, text, None)]


def columns_for_shape(path: str | None, shape: str | None) -> list[Any]:
    """For `data.columns` and `outputs`, after the person chose a shape: its fields, as far as they can be guessed."""
    if not path or not shape or not is_local_file(path):
        return [gr.skip()] * (4 + MAX_FIELDS)
    text = command_text(mapping_for_shape(columns_of(path), shape))
    return [text, *column_updates(path, text, shape)]


def columns_setting(path: str | None, text: str | None, shape: str | None, *slots: str | None) -> Any:
    """`data.columns` after the person chose a column; fields that are detected by their name are left out."""
    if not path or not is_local_file(path):
        return gr.skip()
    there: Sequence[str] = columns_of(path)
    fields = detect_columns(there, parse_mapping(text), path, shape).fields
    wanted = dict(zip(fields, slots, strict=False))
    mapping = {name: column for name, column in wanted.items() if column}
    short = {name: column for name, column in mapping.items() if name != column}
    return command_text(short if detect_columns(there, short, path).fields == wanted else mapping)
