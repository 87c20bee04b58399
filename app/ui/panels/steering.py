"""Under your hand: what can be changed in the routing of the next reply, for the adapter that is chosen."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import gradio as gr

from app.views.steering import steering_view
from mole.config import ROUTERS, AdapterConfig, spec_of
from mole.core.errors import MoleError
from mole.mixture.steering import Steering, describe, plain, steerable

STEP = 0.005


@dataclass
class SteeringPanel:
    """The components; `shown` are the outputs of `show`."""

    box: gr.Accordion
    view: gr.HTML

    @property
    def shown(self) -> list[Any]:
        return [self.box, self.view]


def build() -> SteeringPanel:
    """Make the panel where we stand in the layout; hidden as long as there is nothing to steer."""
    with gr.Accordion(
        "Under your hand", open=False, visible=False, elem_classes="accordion-card", elem_id="steering"
    ) as box:
        view = steering_view(value=None, elem_id="steering-view")
    return SteeringPanel(box, view)


def show(target: str) -> list[Any]:
    """The panel for a target, as trained, for `shown`."""
    value = offered(target)
    return [gr.Accordion(visible=value is not None), value]


def offered(target: str) -> dict[str, Any] | None:
    """What the view shows of a target as it was trained; None where there is nothing to steer."""
    config = trained(target)
    adapter = adapter_of(config)
    if adapter is None or max(adapter.expert_counts) < 2:
        return None
    experts = max(adapter.expert_counts)
    return {
        "fields": [field_of(adapter, name, experts) for name in steerable(adapter.router)],
        "experts": experts,
        "settings": {},
        "muted": [],
        "pinned": [],
    }


def trained(target: str) -> dict[str, Any]:
    """The settings an adapter was trained with; empty for a base model and for a target that is not there."""
    from mole.models.adapter_files import read_adapter_config
    from mole.models.loading import locate

    try:
        folder = locate(target)[1]
        return read_adapter_config(folder) if folder else {}
    except MoleError:
        return {}


def adapter_of(config: dict[str, Any]) -> AdapterConfig | None:
    """An adapter's settings; None for one of another method."""
    if config.get("router") not in ROUTERS:
        return None
    known = {item.name for item in fields(AdapterConfig)} | {item.name for item in fields(ROUTERS[config["router"]])}
    try:
        return AdapterConfig.from_flat({key: value for key, value in config.items() if key in known})
    except MoleError:
        return None


def field_of(adapter: AdapterConfig, name: str, experts: int) -> dict[str, Any]:
    """A setting for the view: label, help, bounds, the trained value, and that in words."""
    item = next(item for item in fields(adapter.params) if item.name == name)
    spec, value = spec_of(item), getattr(adapter.params, name)
    known = {"name": name, "label": name.replace("_", " ").capitalize(), "help": spec.help, "words": plain(value)}
    if isinstance(value, bool):
        return {**known, "kind": "bool", "trained": value}
    if isinstance(value, int):
        return {**known, "kind": "int", "min": spec.ge, "max": experts, "step": 1, "trained": min(value, experts)}
    low = spec.ge if spec.ge is not None else STEP
    here = 1 / experts if value is None else value
    return {**known, "kind": "float", "min": low, "max": max(spec.le or 1, here), "step": STEP, "trained": here}


def steering_of(value: dict[str, Any] | None) -> Steering:
    """What the person chose in the view. Raises `InputError`."""
    return Steering.from_dict({key: (value or {}).get(key) or [] for key in ("muted", "pinned")}
                              | {"settings": (value or {}).get("settings") or {}})  # fmt: skip


def words_of(steering: Steering, target: str) -> str:
    """What is different in a reply, in words; empty for nothing."""
    return describe(steering, trained(target))
