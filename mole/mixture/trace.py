"""The recorder: the routing of every token, layer and expert, while somebody listens."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate, groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mole.mixture.routers import Router, Routing, entropies_of
from mole.mixture.routing_log import Record, find_log, layer_index


class RoutingDelta(NamedTuple):
    """The routing of some tokens, a value for every layer.

    Attributes:
        weights: `(tokens, layers, E)`, mean over the layer's projections, 0 for experts a layer does not have.
        entropy: `(tokens, layers)`, mean over the layer's projections.
        active: `(tokens, layers)`, mean number of experts with a weight above 0.
        threshold: `(tokens, layers)`, mean of AdaMoLE's τ(x) over the layer's projections; None for other methods.
        projections: `(tokens, modules, E)`, the weights of every projection on its own.
    """

    weights: Tensor
    entropy: Tensor
    active: Tensor
    threshold: Tensor | None
    projections: Tensor


class Trace:
    """The routing of every token of the first batch row, over all forward passes while it listened.

    A pass is put together once, after it, and kept on the model's device as one `(tokens, modules, E + 1 or 2)`
    tensor: the weights, the entropy, and the threshold where the method has one. So nothing waits for the device until
    somebody asks, and then it is one copy for all projections.

    Attributes:
        router: the method's name, `"none"` for a model without adapter.
        modules: full names of the adapted projections.
        experts: the largest number of experts.
        layers: number of layers with adapted projections.
        layer_of: for every projection the place of its layer, from 0.
    """

    def __init__(self, model: nn.Module) -> None:
        adapted = adapted_projections(model)
        self.router = adapted[0][1].params.name if adapted else "none"
        self.modules = [name for name, _ in adapted]
        self.experts = max((router.num_experts for _, router in adapted), default=0)
        numbers = [layer_index(name) for name in self.modules]
        layers = sorted(set(numbers))
        self.layers = len(layers)
        self.layer_of = [layers.index(number) for number in numbers]
        self._index = torch.tensor(self.layer_of, dtype=torch.long)
        self._sizes = torch.bincount(self._index, minlength=self.layers)
        self._place = {name: place for place, name in enumerate(self.modules)}
        self._passes: list[Tensor] = []
        self._ends: list[int] = []
        """How many tokens there are up to and with each pass."""

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def extend(self, records: list[Record]) -> None:
        """Add a forward pass: the first batch row's tokens, kept on the model's device."""
        if not records:
            return
        wholes = {id(record.routing): record.routing for record in records}
        widths = [routing.weights.shape[-2] for routing in wholes.values()]
        first = dict(zip(wholes, accumulate(widths, initial=0), strict=False))
        placed = sorted((self._place[record.name], first[id(record.routing)] + record.place) for record in records)
        order = [column for _, column in placed]
        with torch.no_grad():
            added = torch.cat([rows(part, self.experts) for part in alike([*wholes.values()])], 1)
            if order != list(range(sum(widths))):
                added = added[:, order]
        self._passes.append(added)
        self._ends.append(len(self) + added.shape[0])

    @property
    def weights(self) -> Tensor:
        """`(tokens, modules, E)` of everything recorded, on the CPU."""
        return self._from(0)[..., : self.experts]

    @property
    def entropy(self) -> Tensor:
        """`(tokens, modules)` of everything recorded, on the CPU."""
        return self._from(0)[..., self.experts]

    def _from(self, start: int) -> Tensor:
        """`(tokens, modules, E + 1 or 2)` of the tokens from `start` on, in float32 on the CPU."""
        first = bisect_right(self._ends, start)
        if first == len(self._passes):
            return torch.zeros(0, len(self.modules), self.experts + 1)
        kept = self._passes[first:]
        before = self._ends[first - 1] if first else 0
        return (torch.cat(kept) if len(kept) > 1 else kept[0])[start - before :].float().cpu()

    def since(self, start: int) -> RoutingDelta:
        """The routing of the tokens from `start` on, by layer."""
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
        """The trace as JSON-ready values: the format `mole chat --trace` writes."""
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
    """Record what the routers do in every forward pass or `generate` inside the `with` block.

    Recording changes nothing of what the model computes. A model without an adapter of ours gives an empty trace.
    """
    trace, log = Trace(model), find_log(model)
    if log is None:
        yield trace
        return
    log.traces.append(trace)
    try:
        yield trace
    finally:
        log.traces.remove(trace)


def adapted_projections(model: nn.Module) -> list[tuple[str, Router[Any]]]:
    """The names and active routers of the adapted projections, in the model's order; none while they are disabled."""
    found = []
    for module in model.modules():
        routers, active = getattr(module, "routers", None), getattr(module, "active_adapters", [])
        if isinstance(routers, dict) and not getattr(module, "disable_adapters", False):
            names = [name for name in active if name in routers]
            if names:
                found.append((str(module.name), routers[names[-1]]))
    return found


def alike(routings: list[Routing]) -> Iterator[list[Routing]]:
    """Runs of routings among as many experts, which can be put beside each other: most often all of them."""
    for _, run in groupby(routings, key=lambda routing: routing.weights.shape[-1]):
        yield list(run)


def rows(routings: list[Routing], experts: int) -> Tensor:
    """The first batch row of routings `(…, L, E)` → `(tokens, Σ L, experts + 1 or 2)`; absent experts get 0."""
    weights = first_row(torch.cat([routing.weights for routing in routings], -2), 3)
    columns = [nn.functional.pad(weights, (0, experts - weights.shape[-1]))]
    columns.append(first_row(entropies_of(routings), 2)[..., None])
    thresholds = [routing.threshold for routing in routings if routing.threshold is not None]
    if thresholds:
        columns.append(first_row(torch.cat(thresholds, -1), 2)[..., None])
    return torch.cat(columns, -1)


def first_row(values: Tensor, dims: int) -> Tensor:
    """The first batch row of `values`, which has `dims` dimensions without a batch."""
    return values[0] if values.dim() > dims else values
