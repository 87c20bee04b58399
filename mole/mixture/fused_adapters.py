"""The adapters of layers that read the same input, computed together: one routing and one product for all of them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext
from functools import cached_property
from typing import Any, NamedTuple, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mole.mixture.called_adapters import add_called, called_hidden, called_routing
from mole.mixture.decode_kernel import DecodeCall, KernelOutput, is_decode_step
from mole.mixture.experts import DropoutMask, add_experts, add_gated, dropout, dropout_mask, in_dtype, is_transformed
from mole.mixture.grouped import TokenGroups, add_grouped, group_tokens, grouped_down, grouped_is_faster
from mole.mixture.own_linears import OwnLinears, check_whole, must_be_called
from mole.mixture.routers import Router, Routing
from mole.mixture.routing_log import LogEntry, RoutingLog

CONCATENATE_ABOVE = 16
"""Number of tokens above which concatenating the weights for one product is faster than several products."""


class AdaptedLayer(Protocol):
    """What this module reads of an adapted projection, `mole.mixture.layer.MoleLinear`; dictionaries are by adapter."""

    base_layer: nn.Module
    in_features: int
    out_features: int
    training: bool
    routers: dict[str, Router[Any]]
    experts: dict[str, tuple[nn.Linear, nn.Linear]]
    scaling: dict[str, float]
    dropout: dict[str, float]
    r: dict[str, int]
    log: RoutingLog | None
    name: str

    def own_linears(self, adapter_name: str) -> list[Mapping[str, Any]]:
        """Where an adapter's own linear layers are registered: for each of them a dictionary of modules by adapter."""

    def lent(self, adapter_name: str) -> Collection[str]:
        """Names of the linear layers of an adapter's router that another layer owns."""

    def use_registered_linears(self, adapter_name: str) -> None:
        """Let `experts` and the router refer to the modules that are registered there now."""

    @property
    def active_adapters(self) -> list[str]:
        """Names of the adapters in use."""

    @property
    def disable_adapters(self) -> bool:
        """Whether the layer computes its base alone."""


class AdapterOutput(NamedTuple):
    """What an adapter computed for one layer: all but the product with B, or the layer's complete output.

    Attributes:
        hidden: with `gates`, x Aᵀ `(…, E·r)`; with `groups`, s·w·A_i x of each pair `(N·k, r)`; with neither of them,
            `(x Aᵀ) ⊙ repeat(w, r)`, `(N, E·r)`, or the complete output.
        gates: s·w, `(…, E)`.
        groups: the tokens of each expert.
        complete: whether `hidden` is the layer's output `(…, out)`, base included.
        up: the layer with B, which is to be called with `hidden` and `gates` as above; None if its weight may be read.
        log_entry: for the routing log; None without a log.
    """

    hidden: Tensor
    gates: Tensor | None = None
    groups: TokenGroups | None = None
    complete: bool = False
    up: nn.Linear | None = None
    log_entry: LogEntry | None = None

    def add_to(self, base: Tensor, up: nn.Linear, scaling: float, in_place: bool) -> Tensor:
        """Add the adapter's update to the base layer's output: `base (…, out) + s · Σ_i w_i · B_i A_i x`.

        Args:
            base: `(…, out)`.
            up: the layer with B, `(out, E·r)`.
            scaling: s.
            in_place: write into `base`; nothing else may refer to it.
        """
        if self.up is not None and self.gates is not None:
            return add_called(base, self.hidden, self.gates, self.up)
        if self.groups is not None:
            return add_grouped(base, self.hidden, self.groups, up.weight, in_place)
        if self.gates is not None:
            return add_experts(base, self.hidden, self.gates, up.weight, in_place)
        return add_gated(base, self.hidden, up.weight, scaling, in_place)


class FusedAdapters:
    """The adapters of one name in L layers that read the same input, with the same settings, computed as one.

    The layers are routed together, as tokens `(…, L)`: L gates are one product, and the routing rule runs once. There
    are three ways to compute the experts; `outputs` chooses one for each call:

    1. **Decode kernel**: a single token on a CPU without gradients. One compiled function computes the base layers, the
       routers and the experts of all L layers. See `decode_kernel`.
    2. **Grouped product**: the experts that each token uses, where E·r is so large that all of them take longer. See
       `grouped`.
    3. **Fused product**: all experts, `((x Aᵀ) ⊙ repeat(w, r)) Bᵀ`. For L layers x Aᵀ and the logits are one product
       with the concatenated weights. See `experts`.

    All of them read the weights of the adapters' own linear layers. Where something takes part in the calls of these,
    such as a hook, they are called instead. See `own_linears`.

    B is applied by the layer itself, to the base layer's output (`AdapterOutput.add_to`).
    """

    def __init__(self, layers: Sequence[AdaptedLayer], adapter: str) -> None:
        self.layers, self.adapter, self.count = list(layers), adapter, len(layers)
        self.routers = [layer.routers[adapter] for layer in layers]
        self.downs = [layer.experts[adapter][0] for layer in layers]
        self.ups = [layer.experts[adapter][1] for layer in layers]
        self.bases = [layer.base_layer for layer in layers]
        self.widths = (layers[0].in_features, *(layer.out_features for layer in layers))
        self.router = self.routers[0]  # its rule routes all layers
        self.input_linears = [
            one_if_shared([getattr(router, name) for router in self.routers]) for name in self.router.input_linears
        ]
        self.flat_input_linears = [linear for linears in self.input_linears for linear in linears]

    @cached_property
    def own_linears(self) -> OwnLinears:
        """The own linear layers of these adapters."""
        return OwnLinears(self.adapter, [place for layer in self.layers for place in layer.own_linears(self.adapter)])

    @cached_property
    def lent(self) -> list[nn.Module]:
        """The linear layers that a layer shares and does not own: a wrapper around the owner may have sharded them."""
        return [
            getattr(layer.routers[self.adapter], name) for layer in self.layers for name in layer.lent(self.adapter)
        ]

    @property
    def must_be_called(self) -> bool:
        """Whether something takes part in the calls of the adapters' own linear layers."""
        if not torch.compiler.is_compiling():
            if self.lent:
                check_whole(self.lent)
            return self.own_linears.must_be_called()
        # The same for the layers that own a shared linear layer as for the others, so that all have one graph.
        others = [getattr(router, name) for router in self.routers for name in router.linears]
        return any(must_be_called(module) for module in (*self.downs, *self.ups, *others))

    @property
    def scaling(self) -> float:
        """alpha / r, the same in all layers."""
        return self.layers[0].scaling[self.adapter]

    @cached_property
    def decode_call(self) -> DecodeCall:
        """Calls the decode kernel for these adapters."""
        return DecodeCall(self)

    def is_of(self, layers: Sequence[AdaptedLayer]) -> bool:
        """Whether the adapters and base layers of `layers` are still those this was built from."""
        bases = [layer._modules["base_layer"] for layer in layers]  # type: ignore[attr-defined]  # faster than getattr
        same = bases == self.bases and [layer.routers[self.adapter] for layer in layers] == self.routers
        return same and self.own_linears.are_registered()

    def outputs(self, x: Tensor, log: RoutingLog | None) -> list[AdapterOutput]:
        """Compute the adapters for the input `x (…, in)` → one output for each layer.

        Args:
            x: `(…, in)`.
            log: gets the routing; None if nothing is to be logged.
        """
        if self.must_be_called:
            return self.called_outputs(x, log)
        kernel_output = self.decode(x)
        if kernel_output is not None:  # 1. decode kernel
            entries = self.log_entries(log, kernel_output.routing, training=False)
            complete = zip(kernel_output.outputs, entries, strict=True)
            return [AdapterOutput(output, complete=True, log_entry=entry) for output, entry in complete]
        first = self.layers[0]
        rate = first.dropout[self.adapter] if first.training else 0.0
        downs = [module.weight for module in self.downs]  # L of (E·r, in)
        grouped = grouped_is_faster(x, downs[0], self.router.num_experts, self.router.max_active, self.widths)
        # Routers read x without dropout: with dropout, A and the routers have different inputs and are two products.
        hidden, routing = self.project_and_route(x, downs, separately=grouped or rate > 0)
        entries = self.log_entries(log, routing, first.training)
        if grouped:  # 2. grouped product
            x = dropout(in_dtype(x, downs[0].dtype), rate, first.training)
            return self.grouped_outputs(x, downs, routing.weights * self.scaling, entries)
        return self.fused_outputs(hidden or self.hidden(x, downs, rate), routing.weights, entries)  # 3. fused product

    def decode(self, x: Tensor) -> KernelOutput | None:
        """The outputs for a single token from a decode kernel; None where none is applicable or available."""
        layer = self.layers[0]
        if not is_decode_step(x) or layer.training or self.router.allowed is not None or len(layer.active_adapters) > 1:
            return None
        return self.decode_call(x)

    def log_entries(self, log: RoutingLog | None, routing: Routing, training: bool) -> Sequence[LogEntry | None]:
        """What each layer hands to the log about a `routing (…, L, E)`."""
        return [None] * self.count if log is None else log.entries(self.layers[0].name, self.router, routing, training)

    def called_outputs(self, x: Tensor, log: RoutingLog | None) -> list[AdapterOutput]:
        """The outputs by calling the adapters' own linear layers, of `x (…, in)`."""
        first = self.layers[0]
        routing = called_routing(self.router, self.input_linears, x, self.count)
        hidden = called_hidden(self.downs, x, first.dropout[self.adapter], first.training)
        entries = self.log_entries(log, routing, first.training)
        gates = (routing.weights * self.scaling).unbind(-2)  # L of (…, E)
        return [
            AdapterOutput(h, g, up=up, log_entry=entry)
            for h, g, up, entry in zip(hidden, gates, self.ups, entries, strict=True)
        ]

    def fused_outputs(
        self, hidden: Sequence[Tensor], weights: Tensor, entries: Sequence[LogEntry | None]
    ) -> list[AdapterOutput]:
        """The outputs by the fused product, of x Aᵀ as from `project_and_route` and `weights (…, L, E)`."""
        if torch.is_grad_enabled():
            # x Aᵀ and the gates stay apart: `AddExperts` saves both and recomputes their product.
            gates = in_dtype(weights * self.scaling, hidden[0].dtype).unbind(-2)  # L of (…, E)
            return [AdapterOutput(h, g, log_entry=entry) for h, g, entry in zip(hidden, gates, entries, strict=True)]
        # Without gradients one multiplication gates all layers. The product with B scales by s at no cost.
        gated = self.gate_together(hidden, weights)  # L of (N, E·r)
        return [AdapterOutput(rows, log_entry=entry) for rows, entry in zip(gated, entries, strict=True)]

    def grouped_outputs(
        self, x: Tensor, downs: Sequence[Tensor], gates: Tensor, entries: Sequence[LogEntry | None]
    ) -> list[AdapterOutput]:
        """The outputs by grouped products, of `x (…, in)` and the gates s·w, `(…, L, E)`."""
        rows = x.reshape(-1, x.shape[-1])  # (N, in)
        outputs = []
        for down, own, entry in zip(downs, gates.unbind(-2), entries, strict=True):
            weights = in_dtype(own, down.dtype).reshape(-1, own.shape[-1])  # (N, E)
            groups = group_tokens(weights, self.router.max_active)
            outputs.append(AdapterOutput(grouped_down(rows, groups, down), groups=groups, log_entry=entry))
        return outputs

    def gate_together(self, hidden: Sequence[Tensor], weights: Tensor) -> Sequence[Tensor]:
        """`(x Aᵀ) ⊙ repeat(w, r)`, `(N, E·r)`, of each layer, by one multiplication.

        Args:
            hidden: x Aᵀ: L of `(…, E·r)`, or one `(…, L·E·r)`.
            weights: `(…, L, E)`.
        """
        weights = in_dtype(weights, hidden[0].dtype)
        together = hidden[0] if len(hidden) == 1 else torch.cat([*hidden], -1)  # (…, L·E·r)
        width = together.shape[-1] // self.count
        return (together.view(*weights.shape, -1) * weights.unsqueeze(-1)).view(-1, self.count, width).unbind(1)

    def project_and_route(
        self, x: Tensor, downs: Sequence[Tensor], separately: bool
    ) -> tuple[Sequence[Tensor], Routing]:
        """Route `x (…, in)`, and compute x Aᵀ if the same product gives both.

        Args:
            x: `(…, in)`, without dropout.
            downs: A of each layer, `(E·r, in)`.
            separately: compute the routing only.

        Returns:
            x Aᵀ, as L of `(…, E·r)` or without gradients one `(…, L·E·r)`, or nothing; and the routing `(…, L, E)`, in
            float32, or float64 for float64 inputs.
        """
        device = x.device.type
        hidden: Sequence[Tensor] = []
        autocast = torch.is_autocast_enabled(device)
        # Routers compute in float32 at least, so in half precision A and the gates are different products.
        one_product = not (separately or autocast) and x.dtype == downs[0].dtype and x.dtype.itemsize >= 4
        with torch.autocast(device, enabled=False) if autocast else nullcontext():
            if one_product and (torch.is_grad_enabled() or x.numel() > CONCATENATE_ABOVE * x.shape[-1]):
                *hidden, scores = self.hidden_and_scores(x, downs)
            else:
                scores = self.scores(x)
            if self.input_linears:
                split = split_scores(scores, self.input_linears)
                return hidden, self.router.routing_of(*split, defer_entropy=True)
            # Without a gate (lora) there are no scores to tell the number of tokens and layers.
            return hidden, self.router(x[..., None, :].expand(*x.shape[:-1], self.count, -1))

    def hidden(self, x: Tensor, downs: Sequence[Tensor], rate: float) -> Sequence[Tensor]:
        """x Aᵀ after dropout of `x (…, in)`, of each layer: L of `(…, E·r)`."""
        dtype = autocast_dtype(x.device.type, downs[0].dtype)
        if is_transformed() or not torch.is_grad_enabled():
            x = dropout(in_dtype(x, dtype), rate, training=True)
            return [F.linear(x, down) for down in downs]
        mask = dropout_mask(x, rate)
        product = cast(Tensor, ConcatenatedLinear.apply(x, mask, dtype, *downs))
        return product.split(len(downs[0]), -1)

    def hidden_and_scores(self, x: Tensor, downs: Sequence[Tensor]) -> Sequence[Tensor]:
        """One product of `x (…, in)` with every A and input linear: x Aᵀ as in `project_and_route`, then the scores."""
        weights = [*downs, *(linear.weight for linear in self.flat_input_linears)]
        product = concatenated_product(x, weights, x.dtype)
        width = len(downs[0])
        columns = [width] * self.count if torch.is_grad_enabled() else [width * self.count]
        return product.split([*columns, product.shape[-1] - sum(columns)], -1)

    def scores(self, x: Tensor) -> Tensor:
        """The outputs of all input linears, without biases, `(…, Σ n)`, in float32 or float64."""
        dtype, weights = torch.promote_types(x.dtype, torch.float32), [each.weight for each in self.flat_input_linears]
        if not weights:
            return in_dtype(x[..., :0], dtype)
        return concatenated_product(x, weights, dtype)


def concatenated_product(x: Tensor, weights: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """`x [W_1; W_2; …]ᵀ`, `(…, Σ n_i)`, of `x (…, in)` and weights `(n_i, in)`, by one product in `dtype`."""
    if is_transformed() or not torch.is_grad_enabled():  # a compiler decides itself what to keep for the backward pass
        return F.linear(in_dtype(x, dtype), concatenated(weights, dtype))
    return cast(Tensor, ConcatenatedLinear.apply(x, None, dtype, *weights))


class ConcatenatedLinear(torch.autograd.Function):
    """`dropout(x) [W_1; W_2; …]ᵀ`, `(…, Σ n_i)`, of `x (…, in)` and weights `(n_i, in)`, by one product in `dtype`.

    What is saved is x itself, in its own dtype, as the layers around it do, and one byte an element for the dropout.
    The backward pass converts, drops and concatenates again: the results would be most of what an adapter keeps, a
    copy of x in float32 for the routers of a 16-bit model first of all.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: DropoutMask | None, dtype: torch.dtype, *weights: Tensor) -> Tensor:
        ctx.scale, ctx.dtype = None if mask is None else mask.scale, dtype
        ctx.save_for_backward(x, None if mask is None else mask.kept, *weights)
        rows = in_dtype(x, dtype)
        return F.linear(rows if mask is None else mask.apply(rows), concatenated(weights, dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, kept, *weights = ctx.saved_tensors
        mask = None if kept is None else DropoutMask(kept, ctx.scale)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ concatenated(weights, ctx.dtype)
            grad_x = in_dtype(grad_x if mask is None else mask.apply(grad_x), x.dtype)
        if not any(ctx.needs_input_grad[3:]):
            return (grad_x, None, None, *[None] * len(weights))
        rows = in_dtype(x, ctx.dtype)
        rows = rows if mask is None else mask.apply(rows)
        grad_weights = grad.flatten(0, -2).t() @ rows.flatten(0, -2)  # (Σ n_i, in)
        parts = grad_weights.split([len(weight) for weight in weights])
        return grad_x, None, None, *(in_dtype(part, own.dtype) for part, own in zip(parts, weights, strict=True))


def autocast_dtype(device: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype of a product with a weight of `dtype` on a kind of device: autocast's, where that is on."""
    if not torch.is_autocast_enabled(device) or dtype == torch.float64:
        return dtype
    return torch.get_autocast_dtype(device)


def concatenated(weights: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Concatenate weights `(n_i, in)` → `(Σ n_i, in)`."""
    return in_dtype(torch.cat(list(weights)) if len(weights) > 1 else weights[0], dtype)


def one_if_shared(modules: Sequence[nn.Linear]) -> list[nn.Linear]:
    """The modules, or a single one if all of them are the same (LD-MoLE's networks are shared by layers)."""
    return [modules[0]] if all(module is modules[0] for module in modules) else list(modules)


def split_scores(scores: Tensor, linears: Sequence[Sequence[nn.Linear]]) -> list[Tensor]:
    """Split the products of a token with all input linears into their outputs, and add the biases.

    Args:
        scores: `(…, Σ n)`.
        linears: for each name in `Router.input_linears` its L modules, or the one that all layers share.

    Returns:
        For each name `(…, L, n)`, or `(…, 1, n)` if shared.
    """
    if len(linears) == 1 and linears[0][0].bias is None:  # most methods: a gate and nothing else
        return [scores.view(*scores.shape[:-1], len(linears[0]), -1)]
    widths = [sum(len(linear.weight) for linear in same) for same in linears]
    outputs = []
    for same, columns in zip(linears, scores.split(widths, -1), strict=True):
        output = columns.unflatten(-1, (len(same), -1))
        biases = [linear.bias.to(scores.dtype) for linear in same if linear.bias is not None]
        outputs.append(output + torch.stack(biases) if biases else output)
    return outputs
