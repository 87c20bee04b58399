"""Routing overrides: other router settings, muted and pinned experts, during a `with` block.

Afterwards the adapter is as before, and nothing is ever saved. A muted expert is treated as absent: the softmax, the
normalisation of the entropy and the method's rule see the remaining experts only. If experts are pinned, the router
chooses among these alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from mole.config import MAX_INTEGER, ROUTERS, RouterParams, coerce, params_class, spec_of, unknown_setting
from mole.core.errors import InputError, brief

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Steering:
    """The routing overrides of a reply; by default there are none.

    Attributes:
        settings: router settings by name, e.g. `{"top_p": 0.5}`.
        muted: experts not to use, counted from 0. A layer whose experts are all muted adds nothing to its base.
        pinned: the only experts to use, counted from 0; empty for all. A layer that has none of them uses all it has.

    Raises:
        InputError: an expert is both muted and pinned, or is not a whole number of at least 0.
    """

    settings: Mapping[str, Any] = field(default_factory=dict)
    muted: frozenset[int] = frozenset()
    pinned: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        object.__setattr__(self, "settings", MappingProxyType(dict(self.settings)))
        for name in ("muted", "pinned"):
            object.__setattr__(self, name, expert_numbers(getattr(self, name), f"steering.{name}"))
        if both := self.muted & self.pinned:
            raise InputError(f"Expert {min(both)} is both muted and pinned; choose one.", field="steering.pinned")

    def __bool__(self) -> bool:
        return bool(self.settings or self.muted or self.pinned)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any] | None) -> Steering:
        """Create one from plain values, `{"settings": {…}, "muted": […], "pinned": […]}`; None for no overrides.

        Raises:
            InputError: a name or value is not valid.
        """
        known = {item.name for item in dataclasses.fields(cls)}
        if not isinstance(values or {}, Mapping):
            raise InputError(f"steering is {brief(values)}; it must be a mapping of {', '.join(sorted(known))}.")
        for name, value in (values or {}).items():
            if name not in known:
                raise unknown_setting("steering", name, known)
            if name == "settings" and not isinstance(value, Mapping):
                raise InputError("steering.settings must be a mapping of router settings.", field="steering.settings")
        return cls(**(values or {}))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, from which `from_dict` creates an equal steering."""
        return {"settings": dict(self.settings), "muted": sorted(self.muted), "pinned": sorted(self.pinned)}

    def allowed_experts(self, num_experts: int) -> list[int]:
        """The experts that a layer with `num_experts` experts may use, in order."""
        pinned = self.pinned & set(range(num_experts)) or set(range(num_experts))
        return sorted(pinned - self.muted)


def expert_numbers(values: Iterable[Any], name: str) -> frozenset[int]:
    """Check expert numbers, and return them as a set.

    Raises:
        InputError: `values` is not a list of whole numbers of at least 0; `name` names it in the message.
    """
    try:
        experts = frozenset(coerce(int, value, name) for value in values)
    except TypeError:
        raise InputError(f"{name} must be a list of expert numbers, counted from 0.", field=name) from None
    if experts and min(experts) < 0:
        raise InputError(f"{name} has {min(experts)}; experts are counted from 0.", field=name)
    return experts


AS_TRAINED = Steering()
"""No overrides."""


def steerable(router: str) -> tuple[str, ...]:
    """The settings of a router that may be overridden; none if it is not a router of this library (`"none"`)."""
    params = ROUTERS.get(router)
    return tuple(item.name for item in dataclasses.fields(params) if spec_of(item).steerable) if params else ()


def override_params(params: RouterParams, settings: Mapping[str, Any]) -> RouterParams:
    """A copy of a router's settings with `settings` overridden.

    Raises:
        InputError: a setting may not be overridden for this router.
        ConfigError: a value is outside its bounds.
    """
    allowed = steerable(params.name)
    for name in settings:
        if name not in allowed:
            there = f"only {', '.join(allowed)}" if allowed else "it has no such settings"
            raise InputError(
                f"{name} cannot be changed for a reply of the router {params.name!r}: {there}.",
                field=f"steering.{name}",
            )
    return dataclasses.replace(params, **settings)


def check_steering(steering: Steering, router: str, experts: int) -> None:
    """Check that a steering fits a router with at most `experts` experts in a layer.

    Raises:
        InputError: there is no router, a setting may not be overridden, or an expert does not exist.
        ConfigError: the value of a setting is outside its bounds.
    """
    if not steering:
        return
    if router not in ROUTERS:
        raise InputError("There is no router to steer: the model has no mixture of experts.", field="steering")
    override_params(params_class(router)(), steering.settings)
    for name in ("muted", "pinned"):
        if (last := max(getattr(steering, name), default=-1)) >= experts:
            raise InputError(
                f"steering.{name} has {last}; this adapter's experts are 0 to {experts - 1}.", field=f"steering.{name}"
            )


@contextmanager
def steer(model: nn.Module, steering: Steering, only: Collection[str] | None = None) -> Iterator[None]:
    """Apply `steering` to the model's active adapter inside the `with` block.

    Args:
        model: the model, or one that wraps it.
        steering: the overrides.
        only: full names of the projections that it applies to; None for all.

    Raises:
        InputError, ConfigError: the steering does not fit the adapter (see `check_steering`); nothing was changed.
    """
    import torch

    from mole.mixture.trace import active_routers

    routers = [router for name, router in active_routers(model) if only is None or name in only]
    max_experts = max((router.num_experts for router in routers), default=0)
    check_steering(steering, routers[0].params.name if routers else "none", max_experts)
    if not steering:
        yield
        return
    before = [(router, router.params, router.allowed) for router in routers]
    try:
        for router in routers:
            experts = steering.allowed_experts(router.num_experts)
            devices = (weight.device for weight in router.parameters())  # offloaded weights are on the meta device
            device = next((device for device in devices if device.type != "meta"), None)
            router.params = override_params(router.params, steering.settings)
            router.allowed = None
            if len(experts) < router.num_experts:
                router.allowed = torch.tensor(experts, dtype=torch.long, device=device)
        yield
    finally:
        for router, params, allowed in before:
            router.params, router.allowed = params, allowed


def describe_steering(steering: Steering, trained: Mapping[str, Any]) -> str:
    """The overrides as text, experts counted from 1: `"top p 0.75 → 0.5 · expert 2 muted"`; empty for none.

    Args:
        steering: the overrides.
        trained: the adapter's own settings, as in `adapter_config.json`.
    """
    parts = [f"{name.replace('_', ' ')} {override_text(trained.get(name))} → {override_text(value)}"
             for name, value in steering.settings.items() if value != trained.get(name)]  # fmt: skip
    if steering.muted:
        parts.append(f"{experts_text(steering.muted)} muted")
    if steering.pinned:
        parts.append(f"only {experts_text(steering.pinned)}")
    return " · ".join(parts)


def experts_text(experts: Collection[int]) -> str:
    """Experts as text, counted from 1: `"experts 2, 5"`."""
    return f"expert{'s' if len(experts) > 1 else ''} {', '.join(str(expert + 1) for expert in sorted(experts))}"


def override_text(value: Any) -> str:
    """The value of a setting as text."""
    if value is None:
        return "1/E"  # AdaMoLE's default, the only setting that may be empty
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:g}" if isinstance(value, (int, float)) and abs(value) < MAX_INTEGER else brief(value)
