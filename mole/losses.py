"""Auxiliary losses of the routers: balance, entropy, z-loss. Pure functions of routing tensors.

Shapes: a leading `L` (projections, any number of leading dimensions), `N` tokens, `E` experts. `mask (N,)` is
true for tokens that count; padding is excluded from every mean. A batch of padding alone gives 0.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mole.routers import Router, Routing, entropy_of


def masked_mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """Mean of `values (…, N, E)` over the tokens where `mask (N,)` is true → `(…, E)`; 0 if there are none."""
    if mask is None:
        return values.mean(-2)
    share = mask.to(values.dtype)
    return (values * share[:, None]).sum(-2) / share.sum().clamp(min=1)


def balance_loss(used: Tensor, probs: Tensor, mask: Tensor | None = None) -> Tensor:
    """`E · Σ_i f_i · P_i`, f the mean of `used` and P the mean of `probs`, both `(…, N, E)` → `(…)`."""
    return probs.shape[-1] * (masked_mean(used, mask) * masked_mean(probs, mask)).sum(-1)


def entropy_loss(entropy: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean over tokens of `entropy (…, N)` → `(…)` (DynMoLE, arXiv 2504.00661)."""
    return masked_mean(entropy[..., None], mask)[..., 0]


def z_loss(logits: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean over tokens of `(logsumexp of logits)²`, logits `(…, N, E)` → `(…)` (ST-MoE, arXiv 2202.08906)."""
    return masked_mean(logits.logsumexp(-1, keepdim=True).square(), mask)[..., 0]


def cv_loss(weights: Tensor, mask: Tensor | None = None) -> Tensor:
    """`CV² = variance / mean²` over experts of their summed weights `(…, N, E)` → `(…)` (LoRAMoE); 0 when E = 1."""
    importance = masked_mean(weights, mask)
    mean = importance.mean(-1)
    variance = importance.var(-1, unbiased=False)
    return variance / torch.where(mean > 0, mean, torch.ones_like(mean)).square()


def mixture_loss(routers: Sequence[Router[Any]], routings: Sequence[Routing], mask: Tensor | None) -> Tensor:
    """The weighted auxiliary losses of one forward pass, averaged over all projections → scalar.

    Args:
        routers: the router of each adapted projection, with its coefficients in `params`.
        routings: what each decided, tensors of `(batch, length, E)` or `(N, E)`.
        mask: `(batch, length)`, true for tokens that are not padding; None when all count.
    """
    groups: dict[Any, list[int]] = defaultdict(list)
    for place, (router, routing) in enumerate(zip(routers, routings, strict=True)):
        groups[type(router), repr(router.params), routing.weights.shape, routing.weights.device].append(place)
    device = routings[0].weights.device
    total = torch.zeros((), dtype=routings[0].weights.dtype, device=device)
    for places in groups.values():
        router = routers[places[0]]
        stacked = stack([routings[place] for place in places])
        tokens = stacked.weights.shape[1]
        fits = mask is not None and mask.numel() == tokens
        flat = mask.reshape(-1).to(stacked.weights.device) if mask is not None and fits else None
        total = total + projection_losses(router, stacked, flat).sum().to(device)
    return total / len(routings)


def stack(routings: Sequence[Routing]) -> Routing:
    """Routings of equal shape `(…, E)` as one with tensors of `(L, N, E)`; entropies left for later stay so."""
    weights, probs, entropies, logits, thresholds = zip(*routings, strict=True)
    later = all(entropy is None for entropy in entropies)
    return Routing(
        weights=torch.stack(weights).flatten(1, -2),
        probs=torch.stack(probs).flatten(1, -2),
        entropy=None if later else torch.stack([entropy_of(routing) for routing in routings]).flatten(1),
        logits=torch.stack(logits).flatten(1, -2),
        threshold=None if thresholds[0] is None else torch.stack(thresholds).flatten(1),
    )


def projection_losses(router: Router[Any], routing: Routing, mask: Tensor | None) -> Tensor:
    """The weighted sum of a router's losses for `routing` with tensors of `(L, N, E)` → `(L,)`."""
    params = router.params
    total = torch.zeros_like(routing.weights[:, 0, 0])
    if params.balance_loss_coef:
        balance = balance_loss(router.usage(routing), router.balanced(routing), mask)
        total = total + params.balance_loss_coef * balance
    if params.entropy_loss_coef:
        total = total + params.entropy_loss_coef * entropy_loss(entropy_of(routing), mask)
    if params.z_loss_coef:
        total = total + params.z_loss_coef * z_loss(routing.logits, mask)
    if getattr(params, "cv_loss_coef", 0.0):
        total = total + params.cv_loss_coef * cv_loss(routing.weights, mask)
    return total


def has_losses(router: Router[Any]) -> bool:
    """Whether a router has any auxiliary loss switched on."""
    params = router.params
    coefficients = (params.balance_loss_coef, params.entropy_loss_coef, params.z_loss_coef)
    return router.num_experts > 1 and any((*coefficients, getattr(params, "cv_loss_coef", 0.0)))
