"""Routing overrides of a chat target: which settings can be changed for a reply, and what was changed, in words."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from mole.config import ROUTERS, AdapterConfig, spec_of
from mole.core.errors import MoleError
from mole.mixture.steering import Steering, describe_steering, override_text, steerable

STEP = 0.005


def steering_options(target: str) -> dict[str, Any] | None:
    """What the steering view shows of a target as it was trained; None where there is nothing to override."""
    adapter = adapter_config(trained_settings(target))
    if adapter is None or max(adapter.expert_counts) < 2:
        return None
    experts = max(adapter.expert_counts)
    return {
        "fields": [option_field(adapter, name, experts) for name in steerable(adapter.router)],
        "experts": experts,
        "settings": {},
        "muted": [],
        "pinned": [],
    }


def trained_settings(target: str) -> dict[str, Any]:
    """The settings an adapter was trained with; empty for a base model and for a target that does not exist."""
    from mole.models.adapter_files import read_adapter_config
    from mole.runs.targets import locate

    try:
        folder = locate(target)[1]
        return read_adapter_config(folder) if folder else {}
    except MoleError:
        return {}


def adapter_config(values: dict[str, Any]) -> AdapterConfig | None:
    """The settings in an `adapter_config.json`; None for an adapter of another method."""
    if values.get("router") not in ROUTERS:
        return None
    known = {item.name for item in fields(AdapterConfig)} | {item.name for item in fields(ROUTERS[values["router"]])}
    try:
        return AdapterConfig.from_flat({key: value for key, value in values.items() if key in known})
    except MoleError:
        return None


def option_field(adapter: AdapterConfig, name: str, experts: int) -> dict[str, Any]:
    """A router setting as the view takes it: label, help, bounds, the trained value, and that value in words."""
    item = next(item for item in fields(adapter.params) if item.name == name)
    spec, value = spec_of(item), getattr(adapter.params, name)
    known = {
        "name": name,
        "label": name.replace("_", " ").capitalize(),
        "help": spec.help,
        "words": override_text(value),
    }
    if isinstance(value, bool):
        return {**known, "kind": "bool", "trained": value}
    if isinstance(value, int):
        return {**known, "kind": "int", "min": spec.ge, "max": experts, "step": 1, "trained": min(value, experts)}
    low = spec.ge if spec.ge is not None else STEP
    trained = 1 / experts if value is None else value
    return {**known, "kind": "float", "min": low, "max": max(spec.le or 1, trained), "step": STEP, "trained": trained}


def chosen_steering(value: dict[str, Any] | None) -> Steering:
    """What the person chose in the view, whose value this is. Raises `InputError`."""
    chosen = value or {}
    return Steering.from_dict(
        {"settings": chosen.get("settings") or {}, **{key: chosen.get(key) or [] for key in ("muted", "pinned")}}
    )


def overrides_text(steering: Steering, target: str) -> str:
    """What a reply changes, in words: `"top p 0.75 → 0.5 · expert 2 muted"`; empty for nothing."""
    return describe_steering(steering, trained_settings(target)) if steering else ""
