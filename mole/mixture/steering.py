"""Under your hand: other router settings, muted and pinned experts, for as long as a `with` block lasts.

The adapter is as it was afterwards, and nothing of this is ever saved. A muted expert is treated as if it were not
there: the softmax, the entropy's normalisation and the method's rule see the remaining experts only. Pinned experts
are the only ones that stay; the router decides among them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from mole.config import MAX_INTEGER, ROUTERS, RouterParams, coerce, params_class, unknown_setting
from mole.core.errors import InputError, brief

if TYPE_CHECKING:
    from torch import nn

STEERABLE: dict[str, tuple[str, ...]] = {
    "dynmole": ("entropy_threshold", "top_p", "keep_top_k", "inclusive_top_p"),
    "adamole": ("max_threshold",),
    "topk": ("top_k",),
    "topp": ("top_p",),
    "threshold": ("threshold",),
}
"""The settings that say how an already trained router selects; all others belong to what was trained."""


@dataclass(frozen=True)
class Steering:
    """What a reply changes; empty: nothing.

    Attributes:
        settings: router settings by name, e.g. `{"top_p": 0.5}`.
        muted: experts that are left out, counted from 0.
        pinned: the only experts that stay, counted from 0; empty for no such choice. A layer that has none of them
            routes among all it has; one whose experts are all muted adds nothing to its base.

    Raises `InputError` for an expert that is both muted and pinned, or no whole number of at least 0.
    """

    settings: Mapping[str, Any] = field(default_factory=dict)
    muted: frozenset[int] = frozenset()
    pinned: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        object.__setattr__(self, "settings", MappingProxyType(dict(self.settings)))
        for name in ("muted", "pinned"):
            object.__setattr__(self, name, experts_of(getattr(self, name), f"steering.{name}"))
        if both := self.muted & self.pinned:
            raise InputError(f"Expert {min(both)} is both muted and pinned; choose one.", field="steering.pinned")

    def __bool__(self) -> bool:
        return bool(self.settings or self.muted or self.pinned)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any] | None) -> Steering:
        """Make one from plain values, `{"settings": {…}, "muted": […], "pinned": […]}`. Raises `InputError`."""
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
        """Plain values; `from_dict` gives an equal steering back."""
        return {"settings": dict(self.settings), "muted": sorted(self.muted), "pinned": sorted(self.pinned)}

    def among(self, experts: int) -> list[int]:
        """Those of a layer's experts that stay."""
        chosen = self.pinned & set(range(experts)) or set(range(experts))
        return sorted(chosen - self.muted)


def experts_of(values: Iterable[Any], name: str) -> frozenset[int]:
    """Expert numbers as a set. Raises `InputError`."""
    try:
        experts = frozenset(coerce(int, value, name) for value in values)
    except TypeError:
        raise InputError(f"{name} must be a list of expert numbers, counted from 0.", field=name) from None
    if experts and min(experts) < 0:
        raise InputError(f"{name} has {min(experts)}; experts are counted from 0.", field=name)
    return experts


AS_TRAINED = Steering()
"""Nothing is different."""


def steerable(router: str) -> tuple[str, ...]:
    """The settings of a router that may be changed at inference; none for a router (`"none"`) that is not ours."""
    return STEERABLE.get(router, ())


def changed(params: RouterParams, settings: Mapping[str, Any]) -> RouterParams:
    """A router's settings with some of them changed. Raises `InputError` or `ConfigError`."""
    allowed = steerable(params.name)
    for name in settings:
        if name not in allowed:
            there = f"only {', '.join(allowed)}" if allowed else "it has no such settings"
            raise InputError(
                f"{name} cannot be changed for a reply of the router {params.name!r}: {there}.",
                field=f"steering.{name}",
            )
    return dataclasses.replace(params, **settings)


def check(steering: Steering, router: str, experts: int) -> None:
    """Hold a steering against a router with at most `experts` experts a layer. Raises `InputError`, `ConfigError`."""
    if not steering:
        return
    if router not in ROUTERS:
        raise InputError("There is no router to steer: this is no mixture of experts.", field="steering")
    changed(params_class(router)(), steering.settings)
    for name in ("muted", "pinned"):
        if (last := max(getattr(steering, name), default=-1)) >= experts:
            raise InputError(
                f"steering.{name} has {last}; this adapter's experts are 0 to {experts - 1}.", field=f"steering.{name}"
            )


@contextmanager
def steer(model: nn.Module, steering: Steering) -> Iterator[None]:
    """Let the model's active adapter route as `steering` says inside the `with` block.

    Raises `InputError` or `ConfigError`, before anything is changed, for what this adapter does not have.
    """
    import torch

    from mole.mixture.trace import adapted_projections

    routers = [router for _, router in adapted_projections(model)]
    most = max((router.num_experts for router in routers), default=0)
    check(steering, routers[0].params.name if routers else "none", most)
    if not steering:
        yield
        return
    before = [(router, router.params, router.allowed) for router in routers]
    try:
        for router in routers:
            left = steering.among(router.num_experts)
            device = next((weight.device for weight in router.parameters()), None)
            router.params = changed(router.params, steering.settings)
            router.allowed = (
                torch.tensor(left, dtype=torch.long, device=device) if len(left) < router.num_experts else None
            )
        yield
    finally:
        for router, params, allowed in before:
            router.params, router.allowed = params, allowed


def describe(steering: Steering, trained: Mapping[str, Any]) -> str:
    """What is changed in words, experts counted from 1: `"top p 0.75 → 0.5 · expert 2 muted"`; empty for nothing.

    `trained` are the adapter's own settings, as in `adapter_config.json`.
    """
    parts = [f"{name.replace('_', ' ')} {plain(trained.get(name))} → {plain(value)}"
             for name, value in steering.settings.items() if value != trained.get(name)]  # fmt: skip
    for name, what in (("muted", "muted"), ("pinned", "only")):
        if experts := sorted(expert + 1 for expert in getattr(steering, name)):
            numbers = f"expert{'s' if len(experts) > 1 else ''} {', '.join(map(str, experts))}"
            parts.append(f"only {numbers}" if what == "only" else f"{numbers} {what}")
    return " · ".join(parts)


def plain(value: Any) -> str:
    """A setting's value in words."""
    if value is None:
        return "1/E"  # AdaMoLE's default, the only setting that may be empty
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:g}" if isinstance(value, (int, float)) and abs(value) < MAX_INTEGER else brief(value)
