"""Auxiliary losses of the routers: balance, entropy, z-loss. Pure functions of routing tensors.

Shapes: a leading `L` (projections, any number of leading dimensions), `N` tokens, `E` experts. `mask (N,)` is
true for tokens that count; padding is excluded from every mean. A batch of padding alone gives 0.

All of them, and the statistics of the event log, are functions of means over tokens. So a pass in training keeps
of each projection only sums over its tokens, `(k,)`, which add up over the parts of a batch; `layout` names their
columns.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mole.mixture.routers import Router, Routing, shannon_entropy


class MaskedSum(torch.autograd.Function):
    """Sum of `values (N, …)` over the tokens where `mask (N,)` is true, all of them without a mask → `(…)`.

    The mask is not saved as tensors for the backward are: checkpointing would replace it by that of the pass it takes
    the log to be in when it computes a layer again, which may be another part of the batch.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, mask: Tensor | None) -> Tensor:
        ctx.tokens, ctx.mask = len(values), None if mask is None else mask.view(-1, *[1] * (values.dim() - 1))
        return (values if ctx.mask is None else values * ctx.mask).sum(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return (grad.expand(ctx.tokens, *grad.shape) if ctx.mask is None else grad * ctx.mask), None


def masked_sum(values: Tensor, mask: Tensor | None) -> Tensor:
    """Sum of `values (N, …)` over the tokens where `mask (N,)` is true → `(…)`."""
    return cast(Tensor, MaskedSum.apply(values, mask))


def masked_mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """Mean of `values (…, N, E)` over the tokens where `mask (N,)` is true → `(…, E)`; 0 if there are none."""
    if mask is None:
        return values.mean(-2)
    return masked_sum(values.movedim(-2, 0), mask) / mask.sum().clamp(min=1)


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


def coefficients(router: Router[Any]) -> dict[str, float]:
    """The weights of a router's auxiliary losses that are switched on; with one expert there are none."""
    if router.num_experts == 1:
        return {}
    given = {name: getattr(router.params, f"{name}_loss_coef", 0.0) for name in ("balance", "entropy", "z", "cv")}
    return {name: value for name, value in given.items() if value}


def layout(router: Router[Any]) -> dict[str, int]:
    """What is summed over a router's tokens, and in how many columns."""
    experts, losses = router.num_experts, coefficients(router)
    found = {"tokens": 1, "active": 1, "entropy": 1, "weights": experts}
    if "balance" in losses:
        found |= {"used": experts, "balanced": experts}
    return found | {"z": 1} if "z" in losses else found


def columns(router: Router[Any], routing: Routing) -> Tensor:
    """The columns of `layout` for each token of a routing of `(…, E)` → `(…, k)`, with gradients for losses alone."""
    losses, weights, entropy = coefficients(router), routing.weights, routing.entropy
    if entropy is None:
        entropy = shannon_entropy(routing.logits if "entropy" in losses else routing.logits.detach())
    elif "entropy" not in losses:
        entropy = entropy.detach()
    numbers = [torch.ones_like(entropy), (weights > 0).sum(-1).to(entropy.dtype), entropy]
    found = [torch.stack(numbers, -1), weights if "cv" in losses else weights.detach()]
    if "balance" in losses:
        found += [router.usage(routing), router.balance_probs(routing)]
    if "z" in losses:
        found.append(z_loss(routing.logits[..., None, :])[..., None])
    return torch.cat(found, -1)


def means_of(router: Router[Any], sums: Tensor) -> dict[str, Tensor]:
    """The means over tokens of `sums (…, k)`, by the names of `layout`; 0 where no token counts."""
    widths = layout(router)
    parts = dict(zip(widths, sums.split(list(widths.values()), -1), strict=True))
    tokens = parts.pop("tokens").clamp(min=1)
    return {name: part / tokens for name, part in parts.items()}


def mixture_loss(routers: Sequence[Router[Any]], sums: Sequence[Tensor]) -> Tensor:
    """The weighted auxiliary losses of one batch, averaged over all projections → scalar.

    Args:
        routers: the router of each adapted projection, with its coefficients in `params`.
        sums: `(k,)` of each, the sums of its `columns` over the tokens that count.
    """
    groups: dict[Any, list[int]] = defaultdict(list)
    for place, (router, own) in enumerate(zip(routers, sums, strict=True)):
        groups[type(router), repr(router.params), router.num_experts, own.dtype, own.device].append(place)
    total = sums[0].new_zeros(())
    for places in groups.values():
        losses = projection_losses(routers[places[0]], torch.stack([sums[place] for place in places]))
        total = total + losses.sum().to(total.device)
    return total / len(sums)


def projection_losses(router: Router[Any], sums: Tensor) -> Tensor:
    """The weighted sum of a router's losses for projections with the sums `(L, k)` → `(L,)`."""
    batch = {name: mean[..., None, :] for name, mean in means_of(router, sums).items()}  # as one token: its mean
    total = torch.zeros_like(sums[..., 0])
    for name, weight in coefficients(router).items():
        if name == "balance":
            loss = balance_loss(batch["used"], batch["balanced"])
        elif name == "cv":
            loss = cv_loss(batch["weights"])
        else:
            loss = entropy_loss(batch[name][..., 0])  # a mean over tokens, as z is
        total = total + weight * loss
    return total


def has_losses(router: Router[Any]) -> bool:
    """Whether a router has any auxiliary loss switched on."""
    return bool(coefficients(router))
