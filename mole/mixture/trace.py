"""Recording: the routing of every token, layer and expert during a `with` block."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mole.mixture.routers import Router, Routing, entropies_of
from mole.mixture.routing_log import RecordedRouting, find_log, layer_index, listening, log_owner
from mole.mixture.token_layout import TokenLayout, commonest_layout, head_names, token_projections


class RoutingDelta(NamedTuple):
    """The routing of some tokens, as means over the projections of each layer that saw them; 0 where none did.

    Attributes:
        weights: `(tokens, layers, E)`; 0 for experts that a layer does not have.
        entropy: `(tokens, layers)`.
        active: `(tokens, layers)`, number of experts with a weight above 0.
        threshold: `(tokens, layers)`, AdaMoLE's τ(x); None for other methods.
        projections: `(tokens, modules, E)`, the weights of each projection, not averaged; NaN for tokens that it did
            not see.
    """

    weights: Tensor
    entropy: Tensor
    active: Tensor
    threshold: Tensor | None
    projections: Tensor


class LayerColumns:
    """Some projections, as columns of a trace, and the layers they are in.

    Attributes:
        names: full names of the projections.
        places: their places among all that the trace may have.
        layers: number of their layers.
        layer_of: for each projection the position of its layer among these, from 0.
    """

    def __init__(self, names: list[str], places: list[int]) -> None:
        self.names, self.places = names, places
        numbers = [layer_index(name) for name in names]
        layers = sorted(set(numbers))
        self.layers = len(layers)
        self.layer_of = [layers.index(number) for number in numbers]
        self._index = torch.tensor(self.layer_of, dtype=torch.long)
        self._sizes = torch.tensor([self.layer_of.count(layer) for layer in range(self.layers)])

    def means(self, values: Tensor, partial: bool) -> Tensor:
        """Mean of `values (tokens, projections, …)` over each layer's projections → `(tokens, layers, …)`.

        With `partial`, NaN has no part in a mean; where a layer has nothing else, its mean is 0.
        """
        sums = values.new_zeros(values.shape[0], self.layers, values.shape[2])
        if not partial:
            return sums.index_add_(1, self._index, values) / self._sizes[:, None]
        seen = torch.zeros_like(sums).index_add_(1, self._index, (~values.isnan()).to(values.dtype))
        return sums.index_add_(1, self._index, values.nan_to_num()) / seen.clamp(min=1)


class Trace:
    """The routing of every token of the first batch row, in all forward passes that were recorded.

    The tokens are those that the model is called with, `input_ids` or `inputs_embeds`; of an encoder-decoder, the
    decoder's. The trace has the projections that saw these tokens, each in a place that is known. Left out are those

    - that were not called, such as an image encoder's in a chat about text;
    - that saw another sequence: those of an image or audio encoder and of an encoder-decoder's encoder, and the keys
      and values of cross-attention;
    - that saw tokens gathered from all rows: the experts of a mixture-of-experts base, where these are linear layers.

    A projection that saw only some of the tokens, such as an output head that computed the last logits alone, has NaN
    for the others, and no part in their layer's means. One that a pass calls several times has the means of its calls.

    After each pass its routing is assembled into one tensor `(tokens, projections, E + 1 or 2)` on the model's device:
    the weights, the entropy, and the threshold if the method has one. Nothing synchronises with the device until values
    are read, which then takes a single copy.

    Attributes:
        router: name of the method; `"none"` for a model without an adapter.
        experts: the largest number of experts, E.
    """

    def __init__(self, model: nn.Module) -> None:
        adapted, owner = active_routers(model), log_owner(model)
        self._log = None if owner is None else find_log(owner)
        self._known = [] if owner is None else token_projections(owner, [name for name, _ in adapted])
        self._heads = set() if owner is None else head_names(owner)
        self._place = {name: place for place, name in enumerate(self._known)}
        self._unknown = len(adapted) > len(self._known)
        self.router = adapted[0][1].params.name if adapted else "none"
        self.experts = max((router.num_experts for name, router in adapted if name in self._place), default=0)
        self._columns = LayerColumns(self._known, list(range(len(self._known))))
        self._called: set[int] = set()
        self._partial = False  # whether there are NaNs
        self._passes: list[Tensor] = []
        self._ends: list[int] = []  # number of tokens up to the end of each pass

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @property
    def modules(self) -> list[str]:
        """Full names of the projections in the trace; before the first pass, of all that may be."""
        return self._columns.names

    @property
    def layers(self) -> int:
        """Number of layers with projections in the trace."""
        return self._columns.layers

    @property
    def layer_of(self) -> list[int]:
        """For each projection the position of its layer among these, from 0."""
        return self._columns.layer_of

    def extend(self, records: list[RecordedRouting]) -> None:
        """Add a forward pass: the tokens of the first batch row, kept on the model's device."""
        shapes = [routing.weights.shape[:-2] for routing in distinct(records)]
        layout = (None if self._log is None else self._log.layout) or commonest_layout(shapes)
        if layout is None:
            return
        heads: list[tuple[RecordedRouting, slice | Tensor]] = []
        if self._unknown or shapes != [(layout.rows, layout.length)] * len(shapes):
            records, heads = self._seen(records, layout)
        if not records and not heads:
            return
        places = [self._place[record.name] for record in records]
        if places != sorted(places):
            records = sorted(records, key=lambda record: self._place[record.name])
            places.sort()
        with torch.no_grad():
            added = token_columns(records, self.experts, layout) if records else None
            if added is None or heads or places != list(range(len(self._known))):
                added = self._spread(added, places, heads, layout.length)
                self._partial = True
        self._passes.append(added)
        self._ends.append(len(self) + layout.length)
        self._note({*places, *(self._place[record.name] for record, _ in heads)})

    def _seen(
        self, records: list[RecordedRouting], layout: TokenLayout
    ) -> tuple[list[RecordedRouting], list[tuple[RecordedRouting, slice | Tensor]]]:
        """The records of projections that saw all tokens, and those of heads with the positions that they saw."""
        whole, heads = [], []
        for record in records:
            shape = record.routing.weights.shape[:-2]
            if record.name not in self._place:
                continue
            positions = layout.of_head(shape) if record.name in self._heads else None
            if positions is not None:
                heads.append((record, positions))
            elif layout.is_of(shape, record.name):
                whole.append(record)
        return whole, heads

    def _spread(
        self,
        columns: Tensor | None,
        places: list[int],
        heads: list[tuple[RecordedRouting, slice | Tensor]],
        tokens: int,
    ) -> Tensor:
        """The `columns (tokens, n, …)` of the projections at some places, and those of heads, among all; else NaN."""
        rows = [(self._place[record.name], at, token_columns([record], self.experts, None)) for record, at in heads]
        like = rows[0][2] if columns is None else columns
        spread = like.new_zeros(tokens, len(self._known), like.shape[-1])
        if columns is not None:
            index = torch.tensor(places, device=columns.device)
            spread.index_add_(1, index, columns)
        calls = Counter(places)
        spread /= spread.new_tensor([[calls[place]] for place in range(len(self._known))])  # the mean; 0 / 0 is NaN
        for place, at, row in rows:
            spread[at, place] = row[:, 0]
        return spread

    def _note(self, places: set[int]) -> None:
        """Add the projections at these places to those that the trace has."""
        if not places <= self._called:
            self._called |= places
            shown = sorted(self._called)
            if shown != self._columns.places:
                self._columns = LayerColumns([self._known[place] for place in shown], shown)

    @property
    def weights(self) -> Tensor:
        """`(tokens, projections, E)`, the weights of everything recorded, on the CPU."""
        return self._from(0, self._columns)[..., : self.experts]

    @property
    def entropy(self) -> Tensor:
        """`(tokens, projections)`, the entropy of everything recorded, on the CPU."""
        return self._from(0, self._columns)[..., self.experts]

    def _from(self, start: int, columns: LayerColumns) -> Tensor:
        """The columns `(tokens, projections, E + 1 or 2)` of the tokens from `start` on, in float32 on the CPU."""
        first = bisect_right(self._ends, start)
        if first == len(self._passes):
            return torch.zeros(0, len(columns.names), self.experts + 1)
        kept = self._passes[first:]
        before = self._ends[first - 1] if first else 0
        values = (torch.cat(kept) if len(kept) > 1 else kept[0])[start - before :]
        if len(columns.places) < len(self._known):
            values = values[:, columns.places]
        return values.float().cpu()

    def since(self, start: int, modules: list[str] | None = None) -> RoutingDelta:
        """The routing of the tokens from `start` on, averaged over each layer.

        Args:
            start: number of tokens to leave out.
            modules: the projections to take, of those in `Trace.modules`; None for all. Whoever reads the tokens one
                by one passes the same each time, as a later pass may add projections to the trace.
        """
        columns = self._columns
        if modules is not None and modules != columns.names:
            columns = LayerColumns(modules, [self._place[name] for name in modules])
        values = self._from(start, columns)
        weights = values[..., : self.experts]
        active = (weights > 0).sum(-1, keepdim=True)
        if self._partial:  # no number where nothing was recorded
            active = active.where(~weights[..., :1].isnan(), torch.nan)
        means = columns.means(torch.cat([values, active], -1), self._partial)
        return RoutingDelta(
            means[..., : self.experts],
            means[..., self.experts],
            means[..., -1],
            means[..., self.experts + 1] if means.shape[-1] > self.experts + 2 else None,
            weights,
        )

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
    """Record the routing of every forward pass or `generate` inside the `with` block; `Trace` says what is in it.

    Recording does not change what the model computes. A model without a MoLE adapter gives an empty trace. The passes
    of another thread are recorded too, as of one that only generates, unless that thread records the model itself.
    """
    trace = Trace(model)
    with listening(model, trace):
        yield trace


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


def token_columns(records: list[RecordedRouting], experts: int, layout: TokenLayout | None) -> Tensor:
    """The columns of a `Trace` of the first batch row → `(tokens, projections, experts + 1 or 2)`.

    Args:
        records: of projections that see the tokens.
        experts: the largest number of experts, E; those that a projection does not have get 0.
        layout: which the tokens are; None for all of the first row of `(B, T)`.
    """
    # Projections that were computed together share a routing (…, L, E). Each is taken once, those of one shape in one
    # operation, and the columns are brought into the order of `records` afterwards, if they are not in it already.
    groups: dict[tuple[Any, ...], list[Routing]] = {}
    for routing in distinct(records):
        *leading, _, count = routing.weights.shape
        groups.setdefault((*leading, count, routing.weights.device), []).append(routing)
    added = [token_rows(group, experts, layout) for group in groups.values()]
    values = added[0] if len(added) == 1 else torch.cat([rows.to(added[0].device) for rows in added], 1)
    routings = [routing for group in groups.values() for routing in group]
    counts = accumulate([routing.weights.shape[-2] for routing in routings], initial=0)
    first = dict(zip(map(id, routings), counts, strict=False))
    order = [first[id(record.routing)] + record.column for record in records]
    return values if order == list(range(values.shape[1])) else values[:, order]


def distinct(records: list[RecordedRouting]) -> list[Routing]:
    """The routings of some records, each once."""
    return list({id(record.routing): record.routing for record in records}.values())


def token_rows(routings: list[Routing], experts: int, layout: TokenLayout | None) -> Tensor:
    """The columns of routings `(…, L, E)` of one shape → `(tokens, Σ L, experts + 1 or 2)`, see `token_columns`."""
    shape = routings[0].weights.shape[:-2]
    tokens = (layout or TokenLayout(*shape[:2])).of_first_row(shape)
    weights = torch.cat([routing.weights for routing in routings], -2).flatten(0, -3)[tokens]
    columns = [nn.functional.pad(weights, (0, experts - weights.shape[-1]))]
    columns.append(entropies_of(routings).flatten(0, -2)[tokens][..., None])
    thresholds = [routing.threshold for routing in routings if routing.threshold is not None]
    if thresholds:
        columns.append(torch.cat(thresholds, -1).flatten(0, -2)[tokens][..., None])
    return torch.cat(columns, -1)
