"""The cost of a training step of a deep model, from those of models with one and two of its layers.

Profiling a whole model takes some tenths of a second a layer, so only small ones are profiled whole. In others layers
repeat: a model of two like layers costs by one layer more than a model of one, and so do layers that differ in what
they have of the adapter. Where that does not give the exact number of the whole model's parameters, its layers differ
in other ways (hybrids, a first layer without experts), and it is profiled whole.
"""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from mole.config import AdapterConfig
from mole.core.errors import MoleNotice
from mole.mixture import MoleLinear
from mole.mixture.model import layer_place, num_layers
from mole.preflight.memory_profile import BatchShape, StepCost, build_meta_model, profile_step

FEW = 4
"""Layers up to which a model is profiled whole."""
COUNTS = ("trainable", "parameters")
"""What is compared with the whole model's."""


class InLayer(NamedTuple):
    """What a layer has of an adapter.

    Attributes:
        ranks: its adapted projections, by their names within the layer, and their ranks.
        whole: the modules that are trained and saved whole, by their names within the layer.
        experts: number of experts.
    """

    ranks: tuple[tuple[str, int], ...] = ()
    whole: tuple[str, ...] = ()
    experts: int = 0

    @property
    def trains(self) -> bool:
        """Whether there is something to train in the layer."""
        return bool(self.ranks or self.whole)


def step_cost(
    config: Any, adapter: AdapterConfig, dtype: torch.dtype, shape: BatchShape, checkpointing: bool
) -> StepCost:
    """The cost of a forward and backward pass over one micro-batch.

    Raises whatever the architecture raises if it cannot run on tensors without data.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MoleNotice)  # `count_parameters` has them
        model = build_meta_model(config, adapter, dtype)
        if layer_count(config) > FEW:
            try:
                found = ShortModels(config, adapter, dtype, shape, checkpointing).whole_cost(model)
            except Exception:  # this architecture has no models of one or two layers, or they do not run
                found = None
            if found is not None:
                return found
    return profile_step(model, dtype, shape, checkpointing)


@dataclass
class ShortModels:
    """Profiles models of one and two layers."""

    config: Any
    adapter: AdapterConfig
    dtype: torch.dtype
    shape: BatchShape
    checkpointing: bool

    def whole_cost(self, model: Any) -> StepCost | None:
        """The cost of the whole model; None if it is not the sum of its layers."""
        parts = AdapterParts.of(model, layer_count(self.config))
        first = next((at for at, layer in enumerate(parts.layers) if layer.trains), None) if parts else None
        if parts is None or first is None:
            return None
        fixed, by_layer = [0.0] * len(StepCost._fields + COUNTS), {}
        kinds = [(layer, at >= first) for at, layer in enumerate(parts.layers)]
        for kind in dict.fromkeys(kinds):
            layer, above = kind
            if layer.trains:
                one = self.cost([layer], parts)
                by_layer[kind] = difference(self.cost([layer, layer], parts), one)
                # with checkpointing the layer that is recomputed counts once, and the largest one decides
                fixed = [max(pair) for pair in zip(fixed, difference(one, by_layer[kind]), strict=True)]
            else:  # below the first that trains, nothing is kept for the backward pass
                pair = [parts.layers[first], layer] if above else [layer, parts.layers[first]]
                by_layer[kind] = difference(self.cost(pair, parts), self.cost([parts.layers[first]], parts))
        *cost, trainable, count = map(sum, zip(fixed, *(by_layer[kind] for kind in kinds), strict=True))
        return StepCost(*cost) if (trainable, count) == sizes(model) else None

    def cost(self, layers: Sequence[InLayer], parts: AdapterParts) -> list[float]:
        """The `StepCost` of a model with such layers, and its numbers of trainable and of all parameters."""
        short = build_meta_model(with_layers(self.config, len(layers)), parts.adapter(self.adapter, layers), self.dtype)
        counts = sizes(short)
        return [*profile_step(short, self.dtype, self.shape, self.checkpointing), *counts]


@dataclass(frozen=True)
class AdapterParts:
    """An adapter by the layers of its model.

    Attributes:
        list_name: full name of the list of layers.
        layers: what each layer has.
        outside: what is adapted or trained whole elsewhere, by full names.
    """

    list_name: str
    layers: list[InLayer]
    outside: InLayer

    @classmethod
    def of(cls, model: Any, count: int) -> AdapterParts | None:
        """The parts of an adapted model; None if it has not just one list of `count` layers."""
        places = [place for name, _ in model.get_base_model().named_modules() if (place := layer_place(name, None))]
        lists = {name: max(number for other, number in places if other == name) + 1 for name, _ in set(places)}
        names = [name for name, length in lists.items() if length == count]
        if len(names) != 1:
            return None
        prefix = f"{names[0]}."
        adapted = [module for module in model.modules() if isinstance(module, MoleLinear)]
        whole = model.active_peft_config.modules_to_save or []

        def within(start: str, elsewhere: bool = False) -> InLayer:
            found = [layer for layer in adapted if layer.name.startswith(start) != elsewhere]
            saved = tuple(sorted(name.removeprefix(start) for name in whole if name.startswith(start) != elsewhere))
            ranks = tuple(sorted((layer.name.removeprefix(start), layer.r["default"]) for layer in found))
            return InLayer(ranks, saved, max((layer.num_experts["default"] for layer in found), default=0))

        return cls(names[0], [within(f"{prefix}{at}.") for at in range(count)], within(prefix, elsewhere=True))

    def adapter(self, adapter: AdapterConfig, layers: Sequence[InLayer]) -> AdapterConfig:
        """The settings of the adapter for a model with such layers only."""
        ranks, whole = dict(self.outside.ranks), list(self.outside.whole)
        for at, layer in enumerate(layers):
            ranks |= {f"{self.list_name}.{at}.{name}": rank for name, rank in layer.ranks}
            whole += [f"{self.list_name}.{at}.{name}" for name in layer.whole]
        most = max([layer.experts for layer in layers], default=0) or max(self.outside.experts, 1)
        return dataclasses.replace(
            adapter,
            target_modules=list(ranks),
            modules_to_save=whole,
            rank_pattern={name: rank for name, rank in ranks.items() if rank != adapter.r},
            num_experts=[layer.experts or most for layer in layers],
            alpha_pattern={},
            exclude_modules=None,
            layers_to_transform=None,
            layers_pattern=None,
        )


def difference(longer: list[float], shorter: list[float]) -> list[float]:
    """What the longer model costs more."""
    return [a - b for a, b in zip(longer, shorter, strict=True)]


def sizes(model: nn.Module) -> tuple[int, int]:
    """Numbers of trainable and of all parameters."""
    counts = [(weight.numel(), weight.requires_grad) for weight in model.parameters()]
    return sum(count for count, trained in counts if trained), sum(count for count, _ in counts)


def layer_count(config: Any) -> int:
    """Number of layers of a transformers config."""
    holder: Any = nn.Module()
    holder.config = config
    return num_layers(holder)


def with_layers(config: Any, layers: int) -> Any:
    """A copy of a transformers config with only the first `layers` layers."""
    short = copy.deepcopy(config)
    text = short.get_text_config()
    before, text.num_hidden_layers = text.num_hidden_layers, layers
    for name, value in vars(text).items():
        if isinstance(value, list) and len(value) == before and name.startswith("layer"):
            setattr(text, name, value[:layers])
    return short
