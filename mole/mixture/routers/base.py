"""What all routers share: the gate, the `Routing` they return, and its entropy.

A router is a small `nn.Module` that maps a token's input `x (…, in)` to its weights over the experts, `(…, E)`. It
reads nothing but that token, so routing is causal and the same with and without a KV cache, batched or not. Everything
is computed in float32 (float64 for float64 inputs) whatever the model's dtype, without a loop over experts and without
synchronising with the device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, Generic, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mole.config.router_params import RouterParams


class Routing(NamedTuple):
    """What a router decided for every token.

    Attributes:
        weights: `(…, E)`, the factor of each expert's update; 0 for an expert that is not used.
        probs: `(…, E)`, the router's softmax before any selection.
        entropy: `(…)`, the method's own or else Shannon's, normalised to 0…1; 0 when E = 1. None if deferred:
            `entropy_of` computes it.
        logits: `(…, E)`, the router's raw scores.
        threshold: `(…)`, AdaMoLE's τ(x); None for other methods.
        sparsity: `(…)`, LD-MoLE's λ(x), for its sparsity loss; None for other methods, and from a decode kernel.
    """

    weights: Tensor
    probs: Tensor
    entropy: Tensor | None
    logits: Tensor
    threshold: Tensor | None = None
    sparsity: Tensor | None = None


class Choice(NamedTuple):
    """What a method's rule returns, for the E' experts it was given.

    Attributes:
        weights: `(…, E')`, the factor of each expert's update; 0 for an expert that is not used.
        probs: `(…, E')`, `logits.softmax(-1)`, also of a method whose rule works on the logits: P of the balance loss,
            and what is recorded and shown.
        entropy: `(…)` in 0…1, only if the method defines an entropy of its own or its rule computes it; else None, and
            Shannon's entropy of `probs` is computed where it is needed.
        threshold: `(…)`, a threshold that the method computes for each token; else None.
        sparsity: `(…)`, a sparsity that the method computes for each token; else None.
    """

    weights: Tensor
    probs: Tensor
    entropy: Tensor | None = None
    threshold: Tensor | None = None
    sparsity: Tensor | None = None


ParamsT = TypeVar("ParamsT", bound=RouterParams)


class ScoreLinear(nn.Linear):
    """A linear layer of a router: it computes in the dtype of its input, whatever the dtype of its weights."""

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


class Router(nn.Module, Generic[ParamsT]):
    """Base class of the routers: a linear gate and the method's rule, `route`.

    Shape: `x (…, in_features)` → `Routing` of `(…, num_experts)`.

    A subclass implements `route`. If the paper's gate has a bias, it sets `gate_bias`. If its rule needs more than the
    gate's logits, it creates further linear layers (`ScoreLinear`) in `__init__` and lists them in `linears` and
    `input_linears`.

    Args:
        in_features: width of the input.
        num_experts: number of experts, E.
        params: the method's settings, one of the dataclasses in `mole.config.router_params`.
    """

    linears: ClassVar[tuple[str, ...]] = ("gate",)
    """Names of the linear layers. The adapted layer holds their weights where PEFT looks for them."""
    input_linears: ClassVar[tuple[str, ...]] = ("gate",)
    """Those of `linears` that are applied to the input itself, in the order in which `route` takes their outputs."""
    gate_bias: ClassVar[bool] = False
    """Whether the gate has a bias `(E,)`, which starts at 0: the logits are `x Wᵀ + b` then, else `x Wᵀ`."""
    allowed: Tensor | None = None
    """Indices `(E',)` of the experts to route among, as if the others did not exist; None for all.
    Set temporarily by `mole.mixture.steering`."""

    def __init__(self, in_features: int, num_experts: int, params: ParamsT) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.params = params
        if "gate" in self.linears:
            self.gate = ScoreLinear(in_features, num_experts, bias=self.gate_bias)
            if self.gate_bias:
                nn.init.zeros_(self.gate.bias)

    def forward(self, x: Tensor) -> Routing:
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(torch.promote_types(x.dtype, torch.float32))
            return self.routing_of(*(getattr(self, name)(x) for name in self.input_linears))

    def routing_of(self, logits: Tensor, *others: Tensor, defer_entropy: bool = False) -> Routing:
        """The routing of tokens, from the outputs of `input_linears`.

        Args:
            logits: the gate's output `(…, E)`, in float32 or float64.
            others: outputs `(…, n)` of the other `input_linears`.
            defer_entropy: leave the entropy to `entropy_of` if the method's rule does not need it.
        """
        if self.allowed is not None and not len(self.allowed):
            return no_experts(logits)
        allowed = None if self.allowed is None else self.allowed.to(logits.device)
        considered = logits if allowed is None else logits[..., allowed]  # (…, E')
        choice = self.route(considered, *others)
        entropy = choice.entropy
        if entropy is None and not (defer_entropy and allowed is None):
            entropy = shannon_entropy(considered)
        routing = Routing(choice.weights, choice.probs, entropy, logits, choice.threshold, choice.sparsity)
        return routing if allowed is None else over_all_experts(routing, allowed)

    def route(self, logits: Tensor, *others: Tensor) -> Choice:
        """The method's rule: from the outputs of `input_linears` to the weights of the experts.

        `logits (…, E)` is the gate's output `x Wᵀ` (with `gate_bias` `x Wᵀ + b`), before any softmax. The rule works
        along the last dimension only, so that the tokens of several projections can be routed at once. While `allowed`
        is set, that dimension has E' < E entries.
        """
        raise NotImplementedError

    @property
    def max_active(self) -> int:
        """The largest number of experts that a token can use."""
        return self.num_experts

    def usage(self, routing: Routing) -> Tensor:
        """`(…, E)`, whose mean over tokens is f in the balance loss `E · Σ f_i · P_i`: 1 for an expert that is used."""
        return (routing.weights > 0).to(routing.probs.dtype)

    def balance_probs(self, routing: Routing) -> Tensor:
        """`(…, E)`, whose mean over tokens is P in the balance loss `E · Σ f_i · P_i`."""
        return routing.probs


def over_all_experts(routing: Routing, allowed: Tensor) -> Routing:
    """Expand a routing among the experts `allowed (E',)` to all E experts of its logits; the others get 0."""
    weights, probs = (torch.zeros_like(routing.logits).index_copy(-1, allowed, part) for part in routing[:2])
    return routing._replace(weights=weights, probs=probs)


def no_experts(logits: Tensor) -> Routing:
    """The routing `(…, E)` of tokens for which no expert is allowed: all weights are 0, so there is no update."""
    zeros = torch.zeros_like(logits)
    return Routing(zeros, zeros, zeros[..., 0], logits)


def shannon_entropy(logits: Tensor) -> Tensor:
    """`−Σ p ln p / ln E` with p the softmax of `logits (…, E)` → `(…)`; 0 when E = 1."""
    experts = logits.shape[-1]
    if experts == 1:
        return torch.zeros_like(logits[..., 0])
    log_probs = logits.log_softmax(-1)
    return -(log_probs.exp() * log_probs).sum(-1) / math.log(experts)


def entropy_of(routing: Routing) -> Tensor:
    """The entropy `(…)` of a routing, computed now if it was deferred."""
    return shannon_entropy(routing.logits) if routing.entropy is None else routing.entropy


def entropies_of(routings: Sequence[Routing]) -> Tensor:
    """The entropies `(…, Σ L)` of routings of `(…, L, E)`, computed in one operation if all of them were deferred."""
    if all(routing.entropy is None for routing in routings):
        return shannon_entropy(torch.cat([routing.logits for routing in routings], -2))
    return torch.cat([entropy_of(routing) for routing in routings], -1)
