"""Presets: the papers' settings, the person's own, and loading and saving `run.yaml`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.context import Context

from app import settings
from app.ui.forms import RunForm
from app.ui.wiring import QUIET, run_or_warn
from app.views.problem import problem_value
from mole.analysis.tables import escaped
from mole.config import Preset, RunConfig, all_presets, delete_preset, find_preset, save_preset
from mole.core.errors import InputError, MoleError

DEFAULTS = Preset("", "The defaults", "Every setting at its default: DynMoLE with 8 experts of rank 8, 32 steps.")
DOWNLOAD_YAML = """(text) => {
  if (!text) return;
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type: "application/yaml" }));
  link.download = "run.yaml";
  link.click();
  URL.revokeObjectURL(link.href);
}"""


@dataclass
class PresetPanel:
    """The components."""

    chosen: gr.Dropdown
    summary: gr.Markdown
    load: gr.UploadButton
    save: gr.Button
    keep: gr.Button
    delete: gr.Button
    name: gr.Textbox
    keeping: gr.Row


def build_presets() -> PresetPanel:
    """Create the choice and its buttons in the current layout block; call `wire_presets` once the form is complete."""
    chosen = gr.Dropdown(
        choices=preset_choices(),
        value=DEFAULTS.name,
        label="Preset",
        info="Sets all fields below. Model and data stay, unless the preset is for a specific model.",
        elem_id="preset",
    )
    summary = gr.Markdown(preset_summary(DEFAULTS), elem_classes="quiet", elem_id="preset-summary")
    with gr.Row(elem_classes="buttons"):
        load = gr.UploadButton("Load run.yaml", size="sm", file_types=[".yaml", ".yml"], elem_id="preset-load")
        save = gr.Button("Save run.yaml", size="sm", elem_id="preset-save")
        keep = gr.Button("Save as preset …", size="sm", elem_id="preset-keep")
        delete = gr.Button("Delete preset", size="sm", visible=False, elem_id="preset-delete")
    with gr.Row(visible=False, elem_classes="start-row", elem_id="preset-keeping") as keeping:
        name = gr.Textbox(label="Preset name", placeholder="my-preset", elem_id="preset-name")
    return PresetPanel(chosen, summary, load, save, keep, delete, name, keeping)


def preset_choices() -> list[tuple[str, str]]:
    """The title and name of every preset, the person's own at the end."""
    found = [DEFAULTS, *all_presets()]
    return [(f"Yours: {preset.title}" if preset.user_saved else preset.title, preset.name) for preset in found]


def preset_summary(preset: Preset) -> str:
    """A preset in one sentence, with its paper."""
    summary = escaped(preset.summary) if preset.user_saved else preset.summary
    return f"{summary} [Paper]({preset.paper})" if preset.paper else summary


def wire_presets(panel: PresetPanel, form: RunForm, note: gr.HTML) -> None:
    """Choosing, loading and saving; `note` is the form's problem."""

    def choose(name: str, *values: Any) -> list[Any]:
        nested = form.nested(values)
        try:
            preset = find_preset(name) if name else DEFAULTS
            config = preset.run_config(nested)
        except InputError as error:
            return [problem_value(str(error), "preset"), *[gr.skip()] * (2 + len(values))]
        config.name = nested.get("name")
        return [problem_value(), preset_summary(preset), gr.Button(visible=preset.user_saved), *form.fill(config)]

    def load(path: str) -> list[Any]:
        try:
            config = read_run_yaml(Path(path))
        except InputError as error:
            return [problem_value(str(error), "preset-load"), *[gr.skip()] * len(form.inputs)]
        return [problem_value(), *form.fill(config)]

    def yaml_text(*values: Any) -> str:
        config = run_or_warn(lambda: form.config(values))
        return config.to_yaml() if config else ""

    filled = [note, panel.summary, panel.delete, *form.inputs]
    panel.chosen.input(choose, [panel.chosen, *form.inputs], filled, queue=False, **QUIET)
    panel.load.upload(load, panel.load, [note, *form.inputs], **QUIET)
    page = Context.root_block
    if page is not None:  # presets may have been saved since the studio was started
        page.load(lambda: gr.Dropdown(choices=preset_choices()), None, panel.chosen, queue=False, **QUIET)
    text = gr.Textbox(visible=False)
    panel.save.click(yaml_text, form.inputs, text, queue=False, **QUIET).then(
        None, text, None, js=DOWNLOAD_YAML, **QUIET
    )
    wire_saving(panel, form, note)


def wire_saving(panel: PresetPanel, form: RunForm, note: gr.HTML) -> None:
    """Saving the form as a preset, and deleting one."""

    def keep(name: str, *values: Any) -> list[Any]:
        settings.forbid_on_space()
        try:
            preset = save_preset(name.strip(), form.config(values))
        except MoleError as error:
            return [problem_value(str(error), "preset-name"), *[gr.skip()] * 4]
        chosen = gr.Dropdown(choices=preset_choices(), value=preset.name)
        return [problem_value(), chosen, preset_summary(preset), gr.Button(visible=True), gr.Row(visible=False)]

    def delete(name: str) -> list[Any]:
        settings.forbid_on_space()
        run_or_warn(lambda: delete_preset(name))
        chosen = gr.Dropdown(choices=preset_choices(), value=DEFAULTS.name)
        return [chosen, "The preset is deleted; the form is unchanged.", gr.Button(visible=False)]

    shown = [panel.chosen, panel.summary, panel.delete]
    panel.keep.click(lambda: gr.Row(visible=True), None, panel.keeping, queue=False, **QUIET)
    with panel.keeping:
        confirm = gr.Button("Save", size="md", elem_id="preset-keep-yes")
    gr.on([confirm.click, panel.name.submit], keep, [panel.name, *form.inputs], [note, *shown, panel.keeping], **QUIET)
    panel.delete.click(delete, panel.chosen, shown, **QUIET)


def read_run_yaml(path: Path) -> RunConfig:
    """An uploaded config without its run's name and group. Raises `InputError` naming the file."""
    try:
        config = RunConfig.load(path)
    except InputError as error:
        raise InputError(f"{path.name} cannot be loaded: {str(error).replace(str(path), path.name)}") from None
    config.name = config.group = None
    return config
