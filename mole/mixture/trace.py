"""Recording: the routing of every token, layer and expert during a `with` block."""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate, groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mole.mixture.routers import Router, Routing, entropies_of
from mole.mixture.routing_log import RecordedRouting, Recording, find_log, layer_index


class RoutingDelta(NamedTuple):
    """The routing of some tokens, as means over the projections of each layer.

    Attributes:
        weights: `(tokens, layers, E)`; 0 for experts that a layer does not have.
        entropy: `(tokens, layers)`.
        active: `(tokens, layers)`, number of experts with a weight above 0.
        threshold: `(tokens, layers)`, AdaMoLE's τ(x); None for other methods.
        projections: `(tokens, modules, E)`, the weights of each projection, not averaged.
    """

    weights: Tensor
    entropy: Tensor
    active: Tensor
    threshold: Tensor | None
    projections: Tensor


class Trace:
    """The routing of every token of the first batch row, in all forward passes that were recorded.

    After each pass its routing is assembled into one tensor `(tokens, modules, E + 1 or 2)` on the model's device: the
    weights, the entropy, and the threshold if the method has one. Nothing synchronises with the device until values are
    read, which then takes a single copy.

    Attributes:
        router: name of the method; `"none"` for a model without an adapter.
        modules: full names of the adapted projections.
        experts: the largest number of experts, E.
        layers: number of layers with adapted projections.
        layer_of: for each projection the position of its layer among these, from 0.
    """

    def __init__(self, model: nn.Module) -> None:
        adapted = active_routers(model)
        self.router = adapted[0][1].params.name if adapted else "none"
        self.modules = [name for name, _ in adapted]
        self.experts = max((router.num_experts for _, router in adapted), default=0)
        numbers = [layer_index(name) for name in self.modules]
        layers = sorted(set(numbers))
        self.layers = len(layers)
        self.layer_of = [layers.index(number) for number in numbers]
        self._index = torch.tensor(self.layer_of, dtype=torch.long)
        self._sizes = torch.bincount(self._index, minlength=self.layers)
        self._position = {name: position for position, name in enumerate(self.modules)}
        self._passes: list[Tensor] = []
        self._ends: list[int] = []  # number of tokens up to the end of each pass

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def extend(self, records: list[RecordedRouting]) -> None:
        """Add a forward pass: the tokens of the first batch row, kept on the model's device."""
        if not records:
            return
        # Projections that were computed together share a routing (…, L, E); each shared routing is taken once, and the
        # columns are brought into the order of `modules` afterwards, if they are not in it already.
        shared = {id(record.routing): record.routing for record in records}
        counts = [routing.weights.shape[-2] for routing in shared.values()]
        first = dict(zip(shared, accumulate(counts, initial=0), strict=False))
        columns = sorted((self._position[record.name], first[id(record.routing)] + record.column) for record in records)
        order = [column for _, column in columns]
        with torch.no_grad():
            runs = groupby(shared.values(), key=lambda routing: routing.weights.shape[-1])  # of the same E: mostly one
            added = torch.cat([token_rows(list(run), self.experts) for _, run in runs], 1)
            if order != list(range(sum(counts))):
                added = added[:, order]
        self._passes.append(added)
        self._ends.append(len(self) + added.shape[0])

    @property
    def weights(self) -> Tensor:
        """`(tokens, modules, E)`, the weights of everything recorded, on the CPU."""
        return self._from(0)[..., : self.experts]

    @property
    def entropy(self) -> Tensor:
        """`(tokens, modules)`, the entropy of everything recorded, on the CPU."""
        return self._from(0)[..., self.experts]

    def _from(self, start: int) -> Tensor:
        """The columns `(tokens, modules, E + 1 or 2)` of the tokens from `start` on, in float32 on the CPU."""
        first = bisect_right(self._ends, start)
        if first == len(self._passes):
            return torch.zeros(0, len(self.modules), self.experts + 1)
        kept = self._passes[first:]
        before = self._ends[first - 1] if first else 0
        return (torch.cat(kept) if len(kept) > 1 else kept[0])[start - before :].float().cpu()

    def since(self, start: int) -> RoutingDelta:
        """The routing of the tokens from `start` on, averaged over each layer."""
        values = self._from(start)
        weights = values[..., : self.experts]
        active = (weights > 0).sum(-1, keepdim=True)
        means = self._by_layer(torch.cat([values, active], -1))
        return RoutingDelta(
            means[..., : self.experts],
            means[..., self.experts],
            means[..., -1],
            means[..., self.experts + 1] if means.shape[-1] > self.experts + 2 else None,
            weights,
        )

    def _by_layer(self, values: Tensor) -> Tensor:
        """Mean of `values (tokens, modules, …)` over each layer's projections → `(tokens, layers, …)`."""
        sums = values.new_zeros(values.shape[0], self.layers, values.shape[2]).index_add_(1, self._index, values)
        return sums / self._sizes[:, None]

    def to_dict(self, tokens: list[str], prompt_tokens: int) -> dict[str, Any]:
        """The trace in the format of `mole chat --trace`.

        Args:
            tokens: the text of each token.
            prompt_tokens: how many of them are the prompt.
        """
        delta = self.since(0)
        return {
            "router": self.router,
            "experts": self.experts,
            "layers": self.layers,
            "modules": self.modules,
            "tokens": tokens,
            "prompt_tokens": prompt_tokens,
            "weights": delta.weights.tolist(),
            "entropy": delta.entropy.tolist(),
            "active": delta.active.tolist(),
        }


@contextmanager
def record_routing(model: nn.Module) -> Iterator[Trace]:
    """Record the routing of every forward pass or `generate` inside the `with` block.

    Recording does not change what the model computes. A model without a MoLE adapter gives an empty trace. The passes
    of another thread are recorded too, as of one that only generates, unless that thread records the model itself.
    """
    trace, log = Trace(model), find_log(model)
    if log is None:
        yield trace
        return
    recording = Recording(threading.get_ident(), trace)
    log.recordings.append(recording)
    try:
        yield trace
    finally:
        log.recordings.remove(recording)


def active_routers(model: nn.Module) -> list[tuple[str, Router[Any]]]:
    """Name and active router of each adapted projection, in the model's order; empty while adapters are disabled."""
    found = []
    for module in model.modules():
        routers, active = getattr(module, "routers", None), getattr(module, "active_adapters", [])
        if isinstance(routers, dict) and not getattr(module, "disable_adapters", False):
            names = [name for name in active if name in routers]
            if names:
                found.append((str(module.name), routers[names[-1]]))
    return found


def token_rows(routings: list[Routing], experts: int) -> Tensor:
    """The columns of a `Trace` for the first batch row of routings `(…, L, E)` → `(tokens, Σ L, experts + 1 or 2)`.

    Experts from E on, which these projections do not have, get 0.
    """
    weights = first_row(torch.cat([routing.weights for routing in routings], -2), 3)
    columns = [nn.functional.pad(weights, (0, experts - weights.shape[-1]))]
    columns.append(first_row(entropies_of(routings), 2)[..., None])
    thresholds = [routing.threshold for routing in routings if routing.threshold is not None]
    if thresholds:
        columns.append(first_row(torch.cat(thresholds, -1), 2)[..., None])
    return torch.cat(columns, -1)


def first_row(values: Tensor, dims: int) -> Tensor:
    """The first batch row of `values`, if it has more than `dims` dimensions, which it has without a batch."""
    return values[0] if values.dim() > dims else values
