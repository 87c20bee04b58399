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
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mole import config
from mole.errors import ConfigError
from mole.fields import build

ENTROPY_EPS = 1e-5
"""ε of DynMoLE's entropies, added to every probability."""

SHANNON_BAND = 1e-3
"""Closer than this to q = 1, Shannon's limit is taken: there ε outweighs the entropy itself in the formulas."""


class Routing(NamedTuple):
    """What a router decided for every token.

    Attributes:
        weights: `(…, E)` factor of each expert's update; 0 for an expert that is not used.
        probs: `(…, E)` the router's softmax, before any selection.
        entropy: `(…)` normalised to 0…1: the method's own, Shannon's for a method without one; 0 when E = 1.
        logits: `(…, E)` the router's raw scores.
        threshold: `(…)` AdaMoLE's τ(x), None for other methods.
    """

    weights: Tensor
    probs: Tensor
    entropy: Tensor
    logits: Tensor
    threshold: Tensor | None = None


P = TypeVar("P", bound=config.RouterParams)


class Router(nn.Module, Generic[P]):
    """Base of all routers: a bias-free linear gate, and the rule `route` a subclass gives.

    Shape: `x (…, in_features)` → `Routing` of `(…, num_experts)`.
    """

    linears: ClassVar[tuple[str, ...]] = ("gate",)
    """Names of the linear children, so that the layer can hold their weights where PEFT looks for them."""

    def __init__(self, in_features: int, num_experts: int, params: P) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.params = params
        if "gate" in self.linears:
            self.gate = nn.Linear(in_features, num_experts, bias=False)

    def forward(self, x: Tensor) -> Routing:
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(torch.promote_types(x.dtype, torch.float32))
            logits = linear(self.gate, x)
            log_probs = logits.log_softmax(-1)
            return self.route(x, logits, log_probs)

    def route(self, x: Tensor, logits: Tensor, log_probs: Tensor) -> Routing:
        """The method's rule, on inputs `x (…, in)` and `logits`, `log_probs (…, E)` in at least float32."""
        raise NotImplementedError

    def usage(self, routing: Routing) -> Tensor:
        """`(…, E)` whose mean over tokens is the load balance loss's f: 1 where a token uses an expert."""
        return (routing.weights > 0).to(routing.probs.dtype)

    def balanced(self, routing: Routing) -> Tensor:
        """`(…, E)` whose mean over tokens is the load balance loss's P."""
        return routing.probs


def linear(module: nn.Linear, x: Tensor) -> Tensor:
    """`module(x)` in x's dtype, whatever dtype the weights were cast to."""
    bias = None if module.bias is None else module.bias.to(x.dtype)
    return F.linear(x, module.weight.to(x.dtype), bias)


def shannon_entropy(log_probs: Tensor) -> Tensor:
    """`−Σ p ln p / ln E` of `log_probs (…, E)` → `(…)`; 0 when E = 1."""
    experts = log_probs.shape[-1]
    if experts == 1:
        return torch.zeros_like(log_probs[..., 0])
    return -(log_probs.exp() * log_probs).sum(-1) / math.log(experts)


def tsallis_entropy(log_probs: Tensor, index: float) -> Tensor:
    """`[1 − Σ (p + ε)^q] / (1 − E^(1−q))` of `log_probs (…, E)` → `(…)`; Shannon's at q = 1, 0 when E = 1."""
    experts = log_probs.shape[-1]
    if experts == 1 or abs(index - 1) < SHANNON_BAND:
        return shannon_entropy(log_probs)
    powers = (log_probs.exp() + ENTROPY_EPS).pow(index).sum(-1)
    return (1 - powers) / (1 - experts ** (1 - index))


def renyi_entropy(log_probs: Tensor, index: float) -> Tensor:
    """`ln(Σ (p + ε)^q) / (1 − q) / ln E` of `log_probs (…, E)` → `(…)`; Shannon's at q = 1, 0 when E = 1."""
    experts = log_probs.shape[-1]
    if experts == 1 or abs(index - 1) < SHANNON_BAND:
        return shannon_entropy(log_probs)
    powers = (log_probs.exp() + ENTROPY_EPS).pow(index).sum(-1)
    return powers.log() / (1 - index) / math.log(experts)


def ranked(scores: Tensor) -> tuple[Tensor, Tensor]:
    """`scores (…, E)` in descending order and the experts' places in it; equal scores keep the experts' order."""
    return torch.sort(scores, dim=-1, descending=True, stable=True)


def unranked(kept: Tensor, order: Tensor) -> Tensor:
    """A mask over ranks `(…, E)` as a mask over experts."""
    return torch.zeros_like(kept).scatter(-1, order, kept)


def normalised(weights: Tensor) -> Tensor:
    """`weights (…, E)` divided by their sum; all zeros stay zeros."""
    total = weights.sum(-1, keepdim=True)
    return weights / torch.where(total > 0, total, torch.ones_like(total))


class LoraRouter(Router[config.LoraParams]):
    """One expert, always on, and no parameters: plain LoRA."""

    linears = ()

    def __init__(self, in_features: int, num_experts: int, params: config.LoraParams) -> None:
        if num_experts != 1:
            raise ConfigError("adapter.num_experts", num_experts, "1 for the router 'lora'")
        super().__init__(in_features, num_experts, params)

    def forward(self, x: Tensor) -> Routing:
        ones = torch.ones(*x.shape[:-1], 1, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
        zeros = torch.zeros_like(ones)
        return Routing(ones, ones, zeros[..., 0], zeros)


class TopKRouter(Router[config.TopKParams]):
    """The k largest of p, renormalised to sum 1 (MoLA, MixLoRA; arXiv 2402.08562)."""

    def route(self, x: Tensor, logits: Tensor, log_probs: Tensor) -> Routing:
        probs = logits.softmax(-1)
        order = ranked(probs.detach())[1][..., : self.params.top_k]
        kept = torch.zeros_like(probs).scatter(-1, order, 1.0)
        return Routing(normalised(probs * kept), probs, shannon_entropy(log_probs), logits)


class TopPRouter(Router[config.TopPParams]):
    """The smallest set of the most probable experts whose sum reaches top_p, renormalised to sum 1."""

    def route(self, x: Tensor, logits: Tensor, log_probs: Tensor) -> Routing:
        probs = logits.softmax(-1)
        kept = nucleus(probs.detach(), self.params.top_p)
        return Routing(normalised(probs * kept), probs, shannon_entropy(log_probs), logits)


def nucleus(probs: Tensor, top_p: float, at_least: int = 1, inclusive: bool = True) -> Tensor:
    """Mask `(…, E)` of the most probable experts, in the order of probability, up to the sum `top_p`.

    Args:
        probs: `(…, E)`.
        at_least: experts kept in any case.
        inclusive: keep the expert with which the sum crosses `top_p` (the usual nucleus); otherwise only those
            whose cumulative sum is at most `top_p`.
    """
    ordered, order = ranked(probs)
    reached = ordered.cumsum(-1)
    kept = F.pad(reached[..., :-1], (1, 0)) < top_p if inclusive else reached <= top_p
    if top_p >= 1:
        kept = torch.ones_like(kept)
    kept[..., :at_least] = True
    return unranked(kept, order)


class ThresholdRouter(Router[config.ThresholdParams]):
    """Experts with p ≥ τ, renormalised to sum 1; none reaches τ → all zero (AdaMoLE's ablation)."""

    def route(self, x: Tensor, logits: Tensor, log_probs: Tensor) -> Routing:
        probs = logits.softmax(-1)
        kept = probs.detach() >= self.params.threshold
        return Routing(normalised(probs * kept), probs, shannon_entropy(log_probs), logits)


class DenseRouter(Router[config.DenseParams]):
    """All experts, w = p (LoRAMoE; arXiv 2312.09979)."""

    def route(self, x: Tensor, logits: Tensor, log_probs: Tensor) -> Routing:
        probs = logits.softmax(-1)
        return Routing(probs, probs, shannon_entropy(log_probs), logits)


class AdaMoLERouter(Router[config.AdaMoLEParams]):
    """`τ(x) = τ_max · sigmoid(x vᵀ + b)`, `a = p − τ(x)`, `w = a / Σ a` over a ≥ 0 (arXiv 2405.00361, eq. 4–6)."""

    linears = ("gate", "threshold")

    def __init__(self, in_features: int, num_experts: int, params: config.AdaMoLEParams) -> None:
        super().__init__(in_features, num_experts, params)
        self.threshold = nn.Linear(in_features, 1)

    def route(self, x: Tensor, logits: Tensor, log_probs: Tensor) -> Routing:
        limit = 1 / self.num_experts if self.params.max_threshold is None else self.params.max_threshold
        probs = logits.softmax(-1)
        threshold = limit * linear(self.threshold, x).sigmoid()
        weights = normalised((probs - threshold).relu())
        return Routing(weights, probs, shannon_entropy(log_probs), logits, threshold[..., 0])

    def usage(self, routing: Routing) -> Tensor:
        assert routing.threshold is not None
        return (routing.probs >= routing.threshold[..., None]).to(routing.probs.dtype)

    def balanced(self, routing: Routing) -> Tensor:
        assert routing.threshold is not None
        return routing.probs - routing.threshold[..., None] if self.params.balance_on_margin else routing.probs


class DynMoLERouter(Router[config.DynMoLEParams]):
    """Entropy above the threshold: all experts, w = p; else p on the top-p experts only (arXiv 2504.00661).

    The kept probabilities are not renormalised, as in the paper.
    """

    def route(self, x: Tensor, logits: Tensor, log_probs: Tensor) -> Routing:
        params = self.params
        entropy_of = renyi_entropy if params.entropy_type == "renyi" else tsallis_entropy
        entropy = entropy_of(log_probs, params.entropy_index)
        probs = logits.softmax(-1)
        kept = nucleus(probs.detach(), params.top_p, params.keep_top_k, params.inclusive_top_p)
        unsure = (entropy.detach() > params.entropy_threshold) & (params.entropy_threshold < 1)
        weights = probs * (kept | unsure[..., None])
        return Routing(weights, probs, entropy, logits)

    def usage(self, routing: Routing) -> Tensor:
        return routing.weights


class SparsegenRouter(Router[config.SparsegenParams]):
    """`w = relu(z − τ) / (1 − λ(x))` with Σ w = 1 and a learnt sparsity λ(x) < 1 (LD-MoLE; arXiv 2509.25684).

    `λ(x) = logsigmoid(MLP(x)) + 1 − 0.01`; the MLP's biases start at −2.5. In an adapted model, layers of one
    width share the MLP.
    """

    linears = ("gate", "lambda_in", "lambda_out")

    def __init__(self, in_features: int, num_experts: int, params: config.SparsegenParams) -> None:
        super().__init__(in_features, num_experts, params)
        self.lambda_in = nn.Linear(in_features, params.lambda_hidden)
        self.lambda_out = nn.Linear(params.lambda_hidden, 1)
        nn.init.constant_(self.lambda_in.bias, -2.5)
        nn.init.constant_(self.lambda_out.bias, -2.5)

    def sparsity(self, x: Tensor) -> Tensor:
        """`λ(x)` below 0.99 of inputs `(…, in)` → `(…, 1)`; the larger, the fewer experts."""
        hidden = F.gelu(linear(self.lambda_in, x))
        return F.logsigmoid(linear(self.lambda_out, hidden)) + 1 - 0.01

    def route(self, x: Tensor, logits: Tensor, log_probs: Tensor) -> Routing:
        scale = 1 - self.sparsity(x)
        z = logits - logits.detach().amax(-1, keepdim=True)
        ordered = ranked(z)[0]
        sums = ordered.cumsum(-1)
        ranks = torch.arange(1, self.num_experts + 1, device=logits.device, dtype=logits.dtype)
        support = (scale + ranks * ordered > sums).sum(-1, keepdim=True).clamp(min=1)
        tau = (sums.gather(-1, support - 1) - scale) / support
        weights = (z - tau).relu() / scale
        return Routing(weights, logits.softmax(-1), shannon_entropy(log_probs), logits)


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
    settings = build(config.router_params(name), params, "adapter")
    return ROUTERS[name](in_features, num_experts, settings)
