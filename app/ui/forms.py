"""The form of a run: Gradio components made from the config dataclasses, and their values as a `RunConfig`.

A setting declared in `mole.config` appears here by itself, with its bounds, choices and help text.
"""

from __future__ import annotations

import dataclasses
import math
import shlex
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import gradio as gr
import yaml
from gradio.components import Component

from app.ui.further_files import FurtherFiles, flow_text
from app.views.problem import problem_value
from mole.config import ROUTERS, SECTIONS, AdapterConfig, RunConfig, spec_of, union_members
from mole.core.errors import DataError, ModelError, MoleError

LABEL_WORDS = {
    "coef": "weight", "cv": "CV", "dtype": "number format", "eval": "held-out", "grad": "gradient", "lora": "LoRA",
    "lr": "LR", "max": "maximum", "num": "number of", "z": "Z",
}  # fmt: skip
"""The parts of a setting's name in labels, where they differ."""


def label_of(item: dataclasses.Field[Any]) -> str:
    """A setting's label: its own, or its name in words."""
    spec = spec_of(item)
    if spec.label:
        return spec.label
    text = " ".join(LABEL_WORDS.get(word, word) for word in item.name.split("_"))
    return text if text.startswith(("LoRA", "CV", "LR")) else text[:1].upper() + text[1:]


def help_of(item: dataclasses.Field[Any]) -> str:
    """A setting's help, with its default where that is the paper's."""
    spec = spec_of(item)
    return f"{spec.help} Paper: {command_text(default_of(item))}." if spec.from_paper else spec.help


def element_id(dotted: str, router: str = "") -> str:
    """The element id of a setting, e.g. `field-adapter-topk-top_k`."""
    return "-".join(filter(None, ("field", *dotted.split(".")[:1], router, *dotted.split(".")[1:])))


def default_of(item: dataclasses.Field[Any]) -> Any:
    """A dataclass field's default value."""
    if item.default_factory is not dataclasses.MISSING:
        return item.default_factory()
    return item.default


MAPPINGS = {
    f"{section}.{item.name}"
    for section, owner in SECTIONS.items()
    for item in dataclasses.fields(owner)
    if "spec" in item.metadata and isinstance(default_of(item), dict)
}
"""Settings that are left out while their box is empty."""


def setting_component(owner: type, item: dataclasses.Field[Any], **options: Any) -> Component:
    """The component for one setting of a config dataclass; `options` are further arguments of the component.

    A setting with choices gets a dropdown, as a flag that may be left open; another flag gets a checkbox, a number with
    two close bounds a slider, other numbers a number box, and everything else (text, lists, mappings) a text box in the
    syntax of the command line.
    """
    spec, default = spec_of(item), default_of(item)
    kinds = union_members(typing.get_type_hints(owner)[item.name])
    shown: dict[str, Any] = {"label": label_of(item), "info": help_of(item), "value": default, **options}
    if "choices" in options:
        return gr.Dropdown(**shown)
    if spec.choices:
        return gr.Dropdown(choices=list(spec.choices), **shown)
    if bool in kinds and default is None:
        return gr.Dropdown(choices=[("Automatic", ""), ("Yes", "true"), ("No", "false")], **{**shown, "value": ""})
    if bool in kinds:
        return gr.Checkbox(**shown)
    plain = not any(map(typing.get_origin, kinds)) and str not in kinds
    if float in kinds and spec.le is not None and is_slider(item):
        step = 0.05 if spec.le > 1 else 0.01
        low = spec.ge if spec.ge is not None else step
        return gr.Slider(minimum=low, maximum=spec.le, step=step, buttons=[], **shown)
    if plain and (int in kinds or float in kinds):
        whole = float not in kinds
        return gr.Number(precision=0 if whole else None, step=1 if whole else step_of(default), **shown)
    if isinstance(default, (dict, list)):
        shown["value"] = yaml.safe_dump(default, default_flow_style=True).strip() if default else ""
    elif default is not None:
        shown["value"] = str(shown["value"])
    return gr.Textbox(**shown)


def step_of(default: float | None) -> float:
    """The step of a number box: the order of magnitude of the default."""
    return float(10 ** math.floor(math.log10(default))) if default else 0.001


def is_slider(item: dataclasses.Field[Any]) -> bool:
    """Whether a number is bounded on both sides, and its default is not squeezed into one end of the range."""
    spec, default = spec_of(item), default_of(item)
    low = spec.ge if spec.ge is not None else spec.gt
    if low is None or spec.le is None or default is None:
        return False
    return bool(default - low >= 0.01 * (spec.le - low))


@dataclass
class RunForm:
    """The components of a whole run, by dotted name; a router's own settings are kept by router."""

    shared: dict[str, Component] = field(default_factory=dict)
    own: dict[str, dict[str, Component]] = field(default_factory=dict)
    groups: dict[str, gr.Column] = field(default_factory=dict)
    further: FurtherFiles | None = None
    accordions: dict[str, list[str]] = field(default_factory=dict)
    """The accordions around a field, outermost first, by element id; noted here, because a served page loses them."""

    def add(self, section: str, name: str, **options: Any) -> Component:
        """Create the component of the setting `section.name` in the current layout block."""
        owner = SECTIONS[section]
        item = next(entry for entry in dataclasses.fields(owner) if entry.name == name)
        dotted = f"{section}.{name}"
        self.shared[dotted] = self._noted(setting_component(owner, item, elem_id=element_id(dotted), **options))
        return self.shared[dotted]

    def _noted(self, component: Component) -> Component:
        self.accordions[str(component.elem_id)] = accordions_around(component)
        return component

    def add_name(self, info: str = "Leave empty to generate one.") -> Component:
        """The run's name, which belongs to no section."""
        self.shared["name"] = gr.Textbox(
            label="Run name",
            info=info,
            placeholder="my-first-mixture",
            elem_id=element_id("name"),
        )
        return self.shared["name"]

    def add_router(self, router: str, visible: bool) -> gr.Column:
        """A router's own settings, with the weights of its losses in an accordion."""
        items = dataclasses.fields(ROUTERS[router])
        losses = [item for item in items if item.name.endswith("_loss_coef")]
        self.own[router] = {}
        with gr.Column(visible=visible, elem_classes="own-fields", elem_id=f"router-{router}") as group:
            self._add_own(router, [item for item in items if item not in losses])
            with gr.Accordion("Loss weights", open=False, elem_classes="accordion-card", elem_id=f"losses-{router}"):
                self._add_own(router, losses)
        self.groups[router] = group
        return group

    def _add_own(self, router: str, items: Sequence[dataclasses.Field[Any]]) -> None:
        for pair in (items[at : at + 2] for at in range(0, len(items), 2)):
            with gr.Row():
                for item in pair:
                    dotted = element_id(f"adapter.{item.name}", router)
                    made = setting_component(ROUTERS[router], item, elem_id=dotted, min_width=180)
                    self.own[router][item.name] = self._noted(made)

    @property
    def inputs(self) -> list[Any]:
        """All components, in the order of `values`."""
        own = (made for group in self.own.values() for made in group.values())
        return [*self.shared.values(), *own, *(self.further.inputs if self.further else [])]

    def nested(self, values: Sequence[Any]) -> dict[str, Any]:
        """The values of `inputs` in the form of `run.yaml`, with the chosen router's own settings only."""
        by_component = dict(zip(self.inputs, values, strict=True))
        shared = {dotted: by_component[made] for dotted, made in self.shared.items()}
        router = shared["adapter.router"]
        for name, made in self.own.get(router, {}).items():
            shared[f"adapter.{name}"] = by_component[made]
        nested: dict[str, Any] = {section: {} for section in SECTIONS}
        for dotted, value in shared.items():
            section, _, name = dotted.rpartition(".")
            if isinstance(value, str):
                value = value.strip()
            if dotted in MAPPINGS and not value:
                continue
            if dotted in ("name", "data.eval_path", "data.name", "data.split"):
                value = value or None
            (nested[section] if section else nested)[name] = value
        if self.further:
            nested["data"] = self.further.join(nested["data"], [by_component[made] for made in self.further.inputs])
        return nested

    def config(self, values: Sequence[Any]) -> RunConfig:
        """The run that the form describes. Raises `InputError` naming the field."""
        return RunConfig.from_dict(self.nested(values))

    def fill(self, config: RunConfig) -> list[Any]:
        """The values of `inputs` that show a config; the settings of other routers go back to their defaults."""
        values = config.to_dict()
        first, further = self.further.split(config) if self.further else ({}, [])
        values["data"] |= first
        filled = [component_value(made, dotted, value_at(values, dotted)) for dotted, made in self.shared.items()]
        for router, group in self.own.items():
            chosen = config.adapter if router == config.adapter.router else AdapterConfig.from_flat({"router": router})
            filled += [component_value(made, name, chosen.to_flat()[name]) for name, made in group.items()]
        return [*filled, *further]

    def problem_of(self, values: Sequence[Any], error: MoleError, reveal: bool = False) -> dict[str, Any]:
        """An error as `problem_value`, at the field it is about; `values` are those of `inputs`."""
        dotted = error.field
        if dotted is None and isinstance(error, (DataError, ModelError)):
            dotted = "data.path" if isinstance(error, DataError) else "model.name"
        if dotted and self.further and dotted.startswith("data.path."):
            if dotted.startswith("data.path.1.columns"):
                dotted = "data.columns"
            element = self.further.element_of(dotted, values[-len(self.further.inputs) :])
            if element:
                return problem_value(str(error), element, reveal, self.accordions.get(element, []))
        element = self.element_of(dotted, self.nested(values)["adapter"]["router"])
        return problem_value(str(error), element, reveal, self.accordions.get(element, []))

    def element_of(self, dotted: str | None, router: str) -> str:
        """The element id of a setting named by an error; empty when the form has no such setting."""
        if not dotted:
            return ""
        section, _, name = dotted.partition(".")
        if section == "adapter" and name in self.own.get(router, {}):
            return element_id(dotted, router)
        known = dotted if dotted in self.shared else ".".join(dotted.split(".")[:2])
        return element_id(known) if known in self.shared else ""


def accordions_around(component: Component) -> list[str]:
    """The element ids of the accordions around a component, outermost first."""
    found: list[str] = []
    block: Any = component.parent
    while block is not None:
        if isinstance(block, gr.Accordion) and block.elem_id:
            found.insert(0, block.elem_id)
        block = block.parent
    return found


def value_at(values: Mapping[str, Any], dotted: str) -> Any:
    """The setting `section.name` (or `name`) of the nested form of `run.yaml`."""
    for part in dotted.split("."):
        values = values[part]
    return values


def component_value(made: Component, dotted: str, value: Any) -> Any:
    """A setting's value as its component takes it: text boxes, and choices, in the syntax of the command line."""
    as_text = isinstance(made, gr.Textbox) or (isinstance(made, gr.Dropdown) and not isinstance(value, str))
    return setting_text(dotted, value) if as_text else value


def non_default_settings(config: RunConfig) -> Iterator[tuple[str, Any, str | None]]:
    """Every setting that is not at its default, as (dotted name, value, its own flag or None)."""
    router = config.adapter.router
    default = RunConfig.from_dict({"adapter": {"router": router}}).to_dict()
    for section, values in config.to_dict().items():
        if not isinstance(values, Mapping):
            continue
        owners = (SECTIONS[section], ROUTERS[router]) if section == "adapter" else (SECTIONS[section],)
        flags = {
            item.name: spec_of(item).flag
            for owner in owners
            for item in dataclasses.fields(owner)
            if "spec" in item.metadata
        }
        for name, value in values.items():
            if value != default[section][name] or name in ("path", "router"):
                yield f"{section}.{name}", value, flags.get(name)


def command_line(config: RunConfig) -> str:
    """The `mole train …` command that starts the same run, one line per setting."""
    parts = ["mole train"]
    if config.name:
        parts.append(f"--name {shlex.quote(config.name)}")
    for dotted, value, flag in non_default_settings(config):
        text = setting_text(dotted, value)
        if text:
            parts.append(f"{flag} {shlex.quote(text)}" if flag else f"--set {shlex.quote(f'{dotted}={text}')}")
    return " \\\n  ".join(parts)


def command_text(value: Any) -> str:
    """A setting's value in the syntax of the command line; empty for one that is not set."""
    if isinstance(value, (list, tuple)):
        text = ",".join(str(entry) for entry in value)
        return text if len(value) > 1 else f"[{text}]"
    if isinstance(value, dict):
        flow = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10_000).strip()
        return flow if value else ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() else repr(value)
    return "" if value is None else str(value)


def setting_text(dotted: str, value: Any) -> str:
    """`command_text` of the setting `dotted`: a list of paths, whose names may have commas, is YAML."""
    return flow_text(value) if dotted == "data.path" and isinstance(value, list) else command_text(value)
