"""Projections that read the same input, q, k and v or gate and up: one product and one routing for all of them."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from mole.mixture import grouped
from mole.mixture.decode_kernel import OneToken, Recipe, applies
from mole.mixture.experts import dropout, in_dtype
from mole.mixture.grouped import Slots, pays, slots_of
from mole.mixture.routers import Routing
from mole.mixture.routing_log import RoutingLog, Seen

if TYPE_CHECKING:
    from mole.mixture.layer import MoleLinear

SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Names of projections that models call one after another with the same tensor."""
FEW = 16
"""Up to so many tokens, putting the weights under each other costs more than it saves."""


class Answer(NamedTuple):
    """What a projection's adapter makes of its input.

    Attributes:
        hidden: x Aᵀ, `(…, E·r)`; without gradients `(x Aᵀ) ⊙ repeat(w, r)`, `(N, E·r)`, a row a token; with slots
            s·w·A_i x of each of them, `(N·k, r)`.
        gates: s·w, `(…, E)`; None without gradients or with slots.
        routing: what the log wants of it; None without a log.
        slots: which tokens use which experts, where only these are computed.
        finished: whether `hidden` is the layer's whole output, `(…, out)`: a compiled function made it.
    """

    hidden: Tensor
    gates: Tensor | None
    routing: Seen | None
    slots: Slots | None = None
    finished: bool = False


class Call(NamedTuple):
    """What must be the same for an answer to stand: the very tensor, unchanged, and how it is computed."""

    x: Tensor
    version: int
    how: tuple[Any, ...]

    def is_like(self, other: Call) -> bool:
        """Whether the answers to one call are those to the other."""
        return self.x is other.x and self.version == other.version and self.how == other.how


class InputGroup:
    """The adapted projections that read the same input; a single one where it has no siblings.

    The first that is called computes for all; the others take what is kept for them when they are called with the
    very same tensor, and compute for themselves when not. Once all have been called, nothing is kept.
    """

    def __init__(self, layers: Sequence[MoleLinear]) -> None:
        self.layers = list(layers)
        self._call: Call | None = None
        self._answers: dict[int, Answer] = {}
        self._stacks: dict[tuple[str, int], Stack] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> InputGroup:
        """A copied model's group is one of the copied layers, and keeps nothing."""
        memo[id(self)] = group = InputGroup([])
        group.layers = copy.deepcopy(self.layers, memo)
        return group

    def answer(self, layer: MoleLinear, adapter: str, x: Tensor) -> Answer:
        """What `layer`'s adapter makes of `x (…, in)`."""
        observed = layer.log if layer.log is not None and (layer.training or layer.log.traces) else None
        if torch.compiler.is_compiling():  # one graph for all layers: nothing kept that tells them apart
            return Stack([layer], adapter).answers(x, observed)[0]
        if len(self.layers) == 1:
            return self.stack([layer], adapter).answers(x, observed)[0]
        call = Call(x, version(x), (adapter, layer.training, torch.is_grad_enabled(), observed))
        if layer is self.layers[0]:
            others = [other for other in self.layers[1:] if alike(layer, other, adapter)]
            first, *rest = self.stack([layer, *others], adapter).answers(x, observed)
            self._answers = {id(other): found for other, found in zip(others, rest, strict=True)}
            self._call = call if rest else None
            return first
        kept = self._answers.pop(id(layer), None)
        fits = kept is not None and self._call is not None and call.is_like(self._call)
        if not (fits and self._answers):
            self.forget()
        return kept if kept is not None and fits else self.stack([layer], adapter).answers(x, observed)[0]

    def stack(self, layers: Sequence[MoleLinear], adapter: str) -> Stack:
        """The adapters of these layers put together, as they were last time if they are the same."""
        place = (adapter, id(layers[0]) if len(layers) == 1 else -len(layers))
        found = self._stacks.get(place)
        if found is None or not found.is_of(layers):
            found = self._stacks[place] = Stack(layers, adapter)
        return found

    def recipes(self) -> list[Recipe]:
        """The compiled functions that decoding had use for so far."""
        recipes = [stack.one_token.recipe for stack in self._stacks.values()]
        return [recipe for recipe in recipes if recipe is not None]

    def forget(self) -> None:
        """Let go of what was kept for siblings that were not called."""
        self._call, self._answers = None, {}

    def drop(self, adapter: str) -> None:
        """Let go of an adapter that was deleted."""
        self.forget()
        self._stacks = {place: stack for place, stack in self._stacks.items() if stack.adapter != adapter}


def version(x: Tensor) -> int:
    """How often a tensor was written into; tensors of inference mode do not count it, nor does anybody change them."""
    return 0 if x.is_inference() else x._version


def alike(first: MoleLinear, layer: MoleLinear, adapter: str) -> bool:
    """Whether two layers' adapters of one name route by the same rule among as many experts of the same kind."""
    if adapter not in layer.routers or layer.disable_adapters or layer.active_adapters != first.active_adapters:
        return False
    one, other = first.routers[adapter], layer.routers[adapter]
    return (
        type(one) is type(other)
        and one.num_experts == other.num_experts
        and vars(one.params) == vars(other.params)
        and one.allowed is None
        and other.allowed is None
        and first.r[adapter] == layer.r[adapter]
        and first.scaling[adapter] == layer.scaling[adapter]
        and first.dropout[adapter] == layer.dropout[adapter]
        and first.down(adapter).dtype == layer.down(adapter).dtype
        and first.training == layer.training
    )


class Stack:
    """The adapters of one name of layers that are alike, put together: looked up once, computed as if one."""

    def __init__(self, layers: Sequence[MoleLinear], adapter: str) -> None:
        self.layers, self.adapter, self.count = list(layers), adapter, len(layers)
        self.routers = [layer.routers[adapter] for layer in layers]
        self.downs = [layer.experts[adapter][0] for layer in layers]
        self.router = self.routers[0]
        self.readers = [
            distinct([getattr(router, name) for router in self.routers]) for name in self.router.input_linears
        ]
        self.scorers = [reader for group in self.readers for reader in group]
        self.bases = [layer.base_layer for layer in layers]
        self.sizes = (layers[0].in_features, *(layer.out_features for layer in layers))

    @cached_property
    def one_token(self) -> OneToken:
        """The way to a compiled function for decoding."""
        return OneToken(self)

    def is_of(self, layers: Sequence[MoleLinear]) -> bool:
        """Whether these are still the layers' adapters and base layers."""
        return [layer.routers[self.adapter] for layer in layers] == self.routers and [
            layer._modules["base_layer"] for layer in layers
        ] == self.bases

    def answers(self, x: Tensor, observed: RoutingLog | None) -> list[Answer]:
        """What each layer's adapter makes of `x (…, in)`, in as many operations as for one of them."""
        made = self.one_token(x) if applies(x) else None
        if made is not None:
            seen = observed.see(self.router, made.routing, False) if observed else [None] * self.count
            return [Answer(output, None, own, finished=True) for output, own in zip(made.outputs, seen, strict=True)]
        first, count, learns = self.layers[0], self.count, torch.is_grad_enabled()
        scale, rate = first.scaling[self.adapter], first.dropout[self.adapter] if first.training else 0.0
        downs, used = [module.weight for module in self.downs], self.router.max_active
        few = pays(x, downs[0], self.router.num_experts, used, self.sizes)
        hidden, routing = self.read(x, downs, apart=few or rate > 0)
        routings = observed.see(self.router, routing, first.training) if observed else [None] * count
        if not hidden:
            x = dropout(in_dtype(x, downs[0].dtype), rate, first.training)
        if few:
            return [*chosen(x, downs, routing.weights * scale, used, routings)]
        hidden = hidden or [F.linear(x, down) for down in downs]
        if learns:
            gates = in_dtype(routing.weights * scale, hidden[0].dtype).unbind(-2)
            return [Answer(*parts) for parts in zip(hidden, gates, routings, strict=True)]
        gated = self.gated(hidden, routing.weights)
        return [Answer(rows, None, own) for rows, own in zip(gated, routings, strict=True)]

    def gated(self, hidden: Sequence[Tensor], weights: Tensor) -> Sequence[Tensor]:
        """Each layer's `(x Aᵀ) ⊙ repeat(w, r)`, `(N, E·r)`, of all x Aᵀ and `weights (…, layers, E)`."""
        weights = in_dtype(weights, hidden[0].dtype)
        together = hidden[0] if len(hidden) == 1 else torch.cat([*hidden], -1)
        width = together.shape[-1] // self.count
        return (together.view(*weights.shape, -1) * weights.unsqueeze(-1)).view(-1, self.count, width).unbind(1)

    def read(self, x: Tensor, downs: Sequence[Tensor], apart: bool) -> tuple[Sequence[Tensor], Routing]:
        """x times each layer's A where one product gives that and the scores, else nothing; and the routing.

        The routers compute in float32 (float64 for float64 inputs) and see the input without dropout.
        """
        device = x.device.type
        hidden: Sequence[Tensor] = []
        autocast = torch.is_autocast_enabled(device)
        one_product = not (apart or autocast) and x.dtype == downs[0].dtype and x.dtype.itemsize >= 4
        with torch.autocast(device, enabled=False) if autocast else nullcontext():
            if one_product and (torch.is_grad_enabled() or x.numel() > FEW * x.shape[-1]):
                *hidden, scores = self.products(x, downs)
            else:
                scores = self.scores(x)
            if self.readers:
                return hidden, self.router.routing_of(*outputs(scores, self.readers), defer_entropy=True)
            return hidden, self.router(x[..., None, :].expand(*x.shape[:-1], self.count, -1))

    def products(self, x: Tensor, downs: Sequence[Tensor]) -> Sequence[Tensor]:
        """x times each layer's A, `(…, E·r)`, without gradients one `(…, layers·E·r)`; and its scores, last."""
        weights = [*downs, *(in_dtype(reader.weight, x.dtype) for reader in self.scorers)]
        compiles = torch.compiler.is_compiling()
        made = F.linear(x, joined(weights, x.dtype)) if compiles else cast(Tensor, JoinedProduct.apply(x, *weights))
        width = len(downs[0])
        columns = [width] * self.count if torch.is_grad_enabled() else [width * self.count]
        return made.split([*columns, made.shape[-1] - sum(columns)], -1)

    def scores(self, x: Tensor) -> Tensor:
        """x times what all routers read it with, `(…, Σ n)`, in float32 or 64."""
        high = in_dtype(x, torch.promote_types(x.dtype, torch.float32))
        if not self.scorers:
            return high[..., :0]
        return F.linear(high, joined([reader.weight for reader in self.scorers], high.dtype))


class JoinedProduct(torch.autograd.Function):
    """`x [W_1; W_2; …]ᵀ`, `(…, Σ n_i)`, of `x (…, in)` and weights `(n_i, in)`, by one product.

    The weights under each other are formed again in the backward pass: in short batches they are most of what an
    adapter would keep.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, *weights: Tensor) -> Tensor:
        ctx.save_for_backward(x, *weights)
        return F.linear(x, joined(weights, x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        grad_x = grad @ joined(weights, x.dtype) if ctx.needs_input_grad[0] else None
        if not any(ctx.needs_input_grad[1:]):
            return (grad_x, *[None] * len(weights))
        grad_weights = grad.flatten(0, -2).t() @ x.flatten(0, -2)
        return grad_x, *grad_weights.split([len(weight) for weight in weights])


def chosen(
    x: Tensor, downs: Sequence[Tensor], gates: Tensor, used: int, routings: Sequence[Seen | None]
) -> Iterator[Answer]:
    """The answers where at most `used` experts of a token are computed, of `x (…, in)` and `gates (…, layers, E)`."""
    rows = x.reshape(-1, x.shape[-1])
    for down, own, routing in zip(downs, gates.unbind(-2), routings, strict=True):
        slots = slots_of(in_dtype(own, down.dtype).reshape(-1, own.shape[-1]), used)
        yield Answer(grouped.down(rows, slots, down), None, routing, slots)


def distinct(modules: Sequence[nn.Linear]) -> list[nn.Linear]:
    """The modules, or the one that all of them are (LD-MoLE's networks are shared)."""
    return [modules[0]] if all(module is modules[0] for module in modules) else list(modules)


def joined(weights: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Weights `(n_i, in)` under each other."""
    return in_dtype(torch.cat(list(weights)) if len(weights) > 1 else weights[0], dtype)


def outputs(scores: Tensor, readers: Sequence[Sequence[nn.Linear]]) -> list[Tensor]:
    """The columns of `scores (…, sum)` as each reader's outputs `(…, layers, n)`, biases added."""
    found = []
    if len(readers) == 1 and readers[0][0].bias is None:  # most methods: nothing to take apart
        return [scores.view(*scores.shape[:-1], len(readers[0]), -1)]
    for group, columns in zip(readers, scores.split([sum(len(r.weight) for r in g) for g in readers], -1), strict=True):
        apart = columns.unflatten(-1, (len(group), -1))
        biases = [reader.bias.to(scores.dtype) for reader in group if reader.bias is not None]
        found.append(apart + torch.stack(biases) if biases else apart)
    return found
