"""Routers: from a token's input to its weights over the experts, one class a method.

Every router is a small `nn.Module` that maps `x (…, in)` to a `Routing` of `(…, E)` weights, token by token:
what it gives one token depends on nothing but that token, so routing is causal and the same with and without
a KV cache, batched or not. All of it is computed in float32 (float64 for float64 inputs) whatever the model's
dtype, without a loop over experts and without waiting for the device.

The definitions, with `p = softmax(x Wᵀ)`, are those of the papers named in `mole.config`; the settings of a
router are the fields of its parameter dataclass there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mole.config import (
    AdaMoLEParams,
    DenseParams,
    DynMoLEParams,
    LoraParams,
    RouterParams,
    SparsegenParams,
    ThresholdParams,
    TopKParams,
    TopPParams,
    build_settings,
    params_class,
)
from mole.core.errors import ConfigError

ENTROPY_EPS = 1e-5
"""ε of DynMoLE's entropies, added to every probability."""

SHANNON_BAND = 1e-3
"""Closer than this to q = 1, Shannon's limit is taken: there ε outweighs the entropy itself in the formulas."""


class Routing(NamedTuple):
    """What a router decided for every token.

    Attributes:
        weights: `(…, E)` factor of each expert's update; 0 for an expert that is not used.
        probs: `(…, E)` the router's softmax, before any selection.
        entropy: `(…)` normalised to 0…1: the method's own, Shannon's for a method without one; 0 when E = 1. None
            where `entropy_of` is to compute it when asked.
        logits: `(…, E)` the router's raw scores.
        threshold: `(…)` AdaMoLE's τ(x), None for other methods.
    """

    weights: Tensor
    probs: Tensor
    entropy: Tensor | None
    logits: Tensor
    threshold: Tensor | None = None


class Choice(NamedTuple):
    """What a method's rule gives: a `Routing` without what is the same for all methods."""

    weights: Tensor
    probs: Tensor
    entropy: Tensor | None = None
    threshold: Tensor | None = None


P = TypeVar("P", bound=RouterParams)


class Router(nn.Module, Generic[P]):
    """Base of all routers: a bias-free linear gate, and the rule `route` a subclass gives.

    Shape: `x (…, in_features)` → `Routing` of `(…, num_experts)`.
    """

    linears: ClassVar[tuple[str, ...]] = ("gate",)
    """Names of the linear children, so that the layer can hold their weights where PEFT looks for them."""
    reads: ClassVar[tuple[str, ...]] = ("gate",)
    """Those of them that read the token itself, in the order `route` takes their outputs."""
    allowed: Tensor | None = None
    """Indices `(E',)` of the experts to choose among, the others treated as if they were not there; None for all.
    Set for a while by `mole.mixture.steering`."""

    def __init__(self, in_features: int, num_experts: int, params: P) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.params = params
        if "gate" in self.linears:
            self.gate = nn.Linear(in_features, num_experts, bias=False)

    def forward(self, x: Tensor) -> Routing:
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(torch.promote_types(x.dtype, torch.float32))
            return self.decide(*(linear(getattr(self, name), x) for name in self.reads))

    def decide(self, logits: Tensor, *others: Tensor, later: bool = False) -> Routing:
        """The routing of tokens with these outputs `(…, E)`, `(…, n)` of the linears in `reads`, in float32 or 64.

        With `later`, a method whose rule needs no entropy leaves it to `entropy_of`.
        """
        if self.allowed is not None and not len(self.allowed):
            return nobody(logits)
        some = logits if self.allowed is None else logits[..., self.allowed]
        choice = self.route(some, *others)
        entropy = choice.entropy
        if entropy is None and not (later and self.allowed is None):
            entropy = shannon_entropy(some)
        routing = Routing(choice.weights, choice.probs, entropy, logits, choice.threshold)
        return routing if self.allowed is None else spread(routing, self.allowed)

    def route(self, logits: Tensor, *others: Tensor) -> Choice:
        """The method's rule, from the outputs of the linears in `reads`; with `allowed`, E is how many are left.

        It looks at the last dimension alone, so that the tokens of several projections can be routed at once.
        """
        raise NotImplementedError

    @property
    def most(self) -> int:
        """Experts that a token uses at the most."""
        return self.num_experts

    def usage(self, routing: Routing) -> Tensor:
        """`(…, E)` whose mean over tokens is the load balance loss's f: 1 where a token uses an expert."""
        return (routing.weights > 0).to(routing.probs.dtype)

    def balanced(self, routing: Routing) -> Tensor:
        """`(…, E)` whose mean over tokens is the load balance loss's P."""
        return routing.probs


def entropy_of(routing: Routing) -> Tensor:
    """The entropy `(…)` of a routing, computed now if it was left for later."""
    return shannon_entropy(routing.logits) if routing.entropy is None else routing.entropy


def entropies_of(routings: Sequence[Routing]) -> Tensor:
    """The entropies `(…, Σ L)` of routings of `(…, L, E)`, in one operation where all of them were left for later."""
    if all(routing.entropy is None for routing in routings):
        return shannon_entropy(torch.cat([routing.logits for routing in routings], -2))
    return torch.cat([entropy_of(routing) for routing in routings], -1)


def linear(module: nn.Linear, x: Tensor) -> Tensor:
    """`module(x)` in x's dtype, whatever dtype the weights were cast to."""
    bias = None if module.bias is None else module.bias.to(x.dtype)
    return F.linear(x, module.weight.to(x.dtype), bias)


def spread(routing: Routing, allowed: Tensor) -> Routing:
    """A routing among the experts `allowed (E',)` as one among all of `routing.logits (…, E)`: 0 for the others."""
    weights, probs = (torch.zeros_like(routing.logits).index_copy(-1, allowed, part) for part in routing[:2])
    return routing._replace(weights=weights, probs=probs)


def nobody(logits: Tensor) -> Routing:
    """The routing when no expert is left: all weights 0, so no update."""
    zeros = torch.zeros_like(logits)
    return Routing(zeros, zeros, zeros[..., 0], logits)


def shannon_entropy(logits: Tensor) -> Tensor:
    """`−Σ p ln p / ln E` of p = softmax of `logits (…, E)` → `(…)`; 0 when E = 1."""
    experts = logits.shape[-1]
    if experts == 1:
        return torch.zeros_like(logits[..., 0])
    log_probs = logits.log_softmax(-1)
    return -(log_probs.exp() * log_probs).sum(-1) / math.log(experts)


def tsallis_entropy(logits: Tensor, probs: Tensor, index: float) -> Tensor:
    """`[1 − Σ (p + ε)^q] / (1 − E^(1−q))` of `probs (…, E)`, the softmax of `logits` → `(…)`.

    Shannon's at q = 1, 0 when E = 1.
    """
    experts = probs.shape[-1]
    if experts == 1 or abs(index - 1) < SHANNON_BAND:
        return shannon_entropy(logits)
    return (1 - (probs + ENTROPY_EPS).pow(index).sum(-1)) / (1 - experts ** (1 - index))


def renyi_entropy(logits: Tensor, probs: Tensor, index: float) -> Tensor:
    """`ln(Σ (p + ε)^q) / (1 − q) / ln E` of `probs (…, E)`, the softmax of `logits` → `(…)`.

    Shannon's at q = 1, 0 when E = 1.
    """
    experts = probs.shape[-1]
    if experts == 1 or abs(index - 1) < SHANNON_BAND:
        return shannon_entropy(logits)
    return (probs + ENTROPY_EPS).pow(index).sum(-1).log() / ((1 - index) * math.log(experts))


def ranked(scores: Tensor) -> tuple[Tensor, Tensor]:
    """`scores (…, E)` in descending order and the experts' places in it; equal scores keep the experts' order."""
    return torch.sort(scores, dim=-1, descending=True, stable=True)


def unranked(kept: Tensor, order: Tensor) -> Tensor:
    """A mask over ranks `(…, E)` as a mask over experts."""
    return kept.scatter(-1, order, kept)


def normalised(weights: Tensor) -> Tensor:
    """`weights (…, E)` divided by their sum; all zeros stay zeros."""
    total = weights.sum(-1, keepdim=True)
    return weights / torch.where(total > 0, total, torch.ones_like(total))


class LoraRouter(Router[LoraParams]):
    """One expert, always on, and no parameters: plain LoRA."""

    linears = reads = ()

    def __init__(self, in_features: int, num_experts: int, params: LoraParams) -> None:
        if num_experts != 1:
            raise ConfigError("adapter.num_experts", num_experts, "1 for the router 'lora'")
        super().__init__(in_features, num_experts, params)

    def forward(self, x: Tensor) -> Routing:
        ones = torch.ones(*x.shape[:-1], 1, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
        zeros = torch.zeros_like(ones)
        if self.allowed is not None and not len(self.allowed):
            return nobody(zeros)
        return Routing(ones, ones, zeros[..., 0], zeros)


class TopKRouter(Router[TopKParams]):
    """The k largest of p, renormalised to sum 1 (MoLA, MixLoRA; arXiv 2402.08562)."""

    @property
    def most(self) -> int:
        return min(self.params.top_k, self.num_experts)

    def route(self, logits: Tensor, *others: Tensor) -> Choice:
        probs = logits.softmax(-1)
        chosen = ranked(probs.detach())[1][..., : self.params.top_k]
        weights = logits.gather(-1, chosen).softmax(-1)  # p of the chosen, divided by its sum
        return Choice(torch.zeros_like(probs).scatter(-1, chosen, weights), probs)


class TopPRouter(Router[TopPParams]):
    """The smallest set of the most probable experts whose sum reaches top_p, renormalised to sum 1."""

    def route(self, logits: Tensor, *others: Tensor) -> Choice:
        probs = logits.softmax(-1)
        kept = nucleus(probs.detach(), self.params.top_p)
        return Choice(logits.masked_fill(~kept, -math.inf).softmax(-1), probs)


def nucleus(probs: Tensor, top_p: float, at_least: int = 1, inclusive: bool = True) -> Tensor:
    """Mask `(…, E)` of the most probable experts, in the order of probability, up to the sum `top_p`.

    Args:
        probs: `(…, E)`.
        at_least: experts kept in any case.
        inclusive: keep the expert with which the sum crosses `top_p` (the usual nucleus); otherwise only those
            whose cumulative sum is at most `top_p`.
    """
    if top_p >= 1:
        return torch.ones_like(probs, dtype=torch.bool)
    ordered, order = ranked(probs)
    reached = ordered.cumsum(-1)
    kept = F.pad(reached[..., :-1], (1, 0)) < top_p if inclusive else reached <= top_p
    kept[..., :at_least] = True
    return unranked(kept, order)


class ThresholdRouter(Router[ThresholdParams]):
    """Experts with p ≥ τ, renormalised to sum 1; none reaches τ → all zero (AdaMoLE's ablation)."""

    def route(self, logits: Tensor, *others: Tensor) -> Choice:
        probs = logits.softmax(-1)
        kept = probs.detach() >= self.params.threshold
        return Choice(normalised(probs * kept), probs)


class DenseRouter(Router[DenseParams]):
    """All experts, w = p (LoRAMoE; arXiv 2312.09979)."""

    def route(self, logits: Tensor, *others: Tensor) -> Choice:
        probs = logits.softmax(-1)
        return Choice(probs, probs)


class AdaMoLERouter(Router[AdaMoLEParams]):
    """`τ(x) = τ_max · sigmoid(x vᵀ + b)`, `a = p − τ(x)`, `w = a / Σ a` over a ≥ 0 (arXiv 2405.00361, eq. 4–6)."""

    linears = reads = ("gate", "threshold")

    def __init__(self, in_features: int, num_experts: int, params: AdaMoLEParams) -> None:
        super().__init__(in_features, num_experts, params)
        self.threshold = nn.Linear(in_features, 1)

    def route(self, logits: Tensor, *others: Tensor) -> Choice:
        limit = 1 / self.num_experts if self.params.max_threshold is None else self.params.max_threshold
        probs = logits.softmax(-1)
        threshold = limit * others[0].sigmoid()
        weights = normalised((probs - threshold).relu())
        return Choice(weights, probs, threshold=threshold[..., 0])

    def usage(self, routing: Routing) -> Tensor:
        assert routing.threshold is not None
        return (routing.probs >= routing.threshold[..., None]).to(routing.probs.dtype)

    def balanced(self, routing: Routing) -> Tensor:
        assert routing.threshold is not None
        return routing.probs - routing.threshold[..., None] if self.params.balance_on_margin else routing.probs


class DynMoLERouter(Router[DynMoLEParams]):
    """Entropy above the threshold: all experts, w = p; else p on the top-p experts only (arXiv 2504.00661).

    The kept probabilities are not renormalised, as in the paper.
    """

    def route(self, logits: Tensor, *others: Tensor) -> Choice:
        params = self.params
        entropy_of = renyi_entropy if params.entropy_type == "renyi" else tsallis_entropy
        probs = logits.softmax(-1)
        entropy = entropy_of(logits, probs, params.entropy_index)
        kept = nucleus(probs.detach(), params.top_p, params.keep_top_k, params.inclusive_top_p)
        if params.entropy_threshold < 1:
            kept = kept | (entropy.detach() > params.entropy_threshold)[..., None]
        weights = probs * kept
        return Choice(weights, probs, entropy)

    def usage(self, routing: Routing) -> Tensor:
        return routing.weights


class SparsegenRouter(Router[SparsegenParams]):
    """`w = relu(z − τ) / (1 − λ(x))` with Σ w = 1 and a learnt sparsity λ(x) < 1 (LD-MoLE; arXiv 2509.25684).

    `λ(x) = logsigmoid(MLP(x)) + 1 − 0.01`; the MLP's biases start at −2.5. In an adapted model, layers of one
    width share the MLP.
    """

    linears = ("gate", "lambda_in", "lambda_out")
    reads = ("gate", "lambda_in")

    def __init__(self, in_features: int, num_experts: int, params: SparsegenParams) -> None:
        super().__init__(in_features, num_experts, params)
        self.lambda_in = nn.Linear(in_features, params.lambda_hidden)
        self.lambda_out = nn.Linear(params.lambda_hidden, 1)
        nn.init.constant_(self.lambda_in.bias, -2.5)
        nn.init.constant_(self.lambda_out.bias, -2.5)

    def sparsity(self, hidden: Tensor) -> Tensor:
        """`λ(x)` below 0.99 of the MLP's first outputs `(…, hidden)` → `(…, 1)`; the larger, the fewer experts."""
        return F.logsigmoid(linear(self.lambda_out, F.gelu(hidden))) + 1 - 0.01

    def route(self, logits: Tensor, *others: Tensor) -> Choice:
        scale = 1 - self.sparsity(others[0])
        z = logits - logits.detach().amax(-1, keepdim=True)
        used = support(z.detach(), scale.detach())
        tau = ((z * used).sum(-1, keepdim=True) - scale) / used.sum(-1, keepdim=True)
        weights = (z - tau).relu() / scale
        return Choice(weights, logits.softmax(-1))


def support(z: Tensor, scale: Tensor) -> Tensor:
    """Mask `(…, E)` of the experts that sparsegen gives a weight, of `z (…, E)` and `scale = 1 − λ (…, 1)`."""
    ordered = ranked(z)[0]
    sums = ordered.cumsum(-1)
    ranks = torch.arange(1, z.shape[-1] + 1, device=z.device, dtype=z.dtype)
    last = (scale + ranks * ordered > sums).sum(-1, keepdim=True).clamp(min=1) - 1
    return z >= ordered.gather(-1, last)


ROUTERS: dict[str, type[Router[Any]]] = {
    "dynmole": DynMoLERouter,
    "adamole": AdaMoLERouter,
    "topk": TopKRouter,
    "topp": TopPRouter,
    "threshold": ThresholdRouter,
    "dense": DenseRouter,
    "sparsegen": SparsegenRouter,
    "lora": LoraRouter,
}

LINEARS = tuple(sorted({name for router in ROUTERS.values() for name in router.linears}))
"""Names of all routers' linear children."""


def build_router(name: str, in_features: int, num_experts: int, **params: Any) -> Router[Any]:
    """The router `name` for inputs of `in_features` and `num_experts` experts; `params` are its settings.

    Raises:
        ConfigError: an unknown name, a count below 1, a value outside its bounds.
        InputError: a setting that the router does not have.
    """
    if isinstance(num_experts, bool) or not isinstance(num_experts, int) or num_experts < 1:
        raise ConfigError("adapter.num_experts", num_experts, "a whole number of at least 1")
    settings = build_settings(params_class(name), params, "adapter")
    return ROUTERS[name](in_features, num_experts, settings)
