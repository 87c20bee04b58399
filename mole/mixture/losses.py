"""Auxiliary losses of the routers: balance, entropy, z, CV² and sparsity loss.

All of them, and the statistics of the event log, are functions of means over tokens. So a training pass keeps of each
projection only sums over its tokens: `token_columns` says what is summed, and `token_means` divides by the number of
tokens. Sums of micro-batches add up to those of the batch. Padding is left out of every sum; a batch of padding alone
has no loss.

Shapes: L projections, N tokens, E experts, k columns.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from mole.mixture.experts import is_transformed
from mole.mixture.routers import Router, Routing, shannon_entropy


class MaskedSum(torch.autograd.Function):
    """Sum of `values (N, …)` over the tokens where `mask (N,)` is true, or over all tokens without a mask → `(…)`.

    The mask is kept on `ctx` rather than saved for the backward pass: when checkpointing recomputes a layer, it would
    replace a saved mask by that of the pass the routing log is in by then, which may be another micro-batch.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, mask: Tensor | None) -> Tensor:
        ctx.tokens, ctx.mask = len(values), None if mask is None else mask.view(-1, *[1] * (values.dim() - 1))
        return (values if ctx.mask is None else values * ctx.mask).sum(0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return (grad.expand(ctx.tokens, *grad.shape) if ctx.mask is None else grad * ctx.mask), None


def masked_sum(values: Tensor, mask: Tensor | None) -> Tensor:
    """Sum of `values (N, …)` over the tokens where `mask (N,)` is true; over all tokens without a mask → `(…)`."""
    if is_transformed():
        return (values if mask is None else values * mask.view(-1, *[1] * (values.dim() - 1))).sum(0)
    return cast(Tensor, MaskedSum.apply(values, mask))


# ---------------------------------------------------------------------------------------------------------
# The losses


def balance_loss(usage: Tensor, probs: Tensor) -> Tensor:
    """`E · Σ_i f_i · P_i` with f = `usage` and P = `probs`, means over tokens `(…, E)` → `(…)`.

    See `Router.usage` and `Router.balance_probs` (Switch Transformers, arXiv 2101.03961, eq. 4).
    """
    return probs.shape[-1] * (usage * probs).sum(-1)


def cv_loss(weights: Tensor) -> Tensor:
    """`CV² = variance / mean²` over the experts' mean weights `(…, E)` → `(…)` (LoRAMoE, arXiv 2312.09979)."""
    mean = weights.mean(-1)
    variance = weights.var(-1, unbiased=False)
    return variance / torch.where(mean > 0, mean, torch.ones_like(mean)).square()


def z_values(logits: Tensor) -> Tensor:
    """`(logsumexp of logits)²` of each token, whose mean is the z-loss: `(…, E)` → `(…)` (ST-MoE, arXiv 2202.08906)."""
    return logits.logsumexp(-1).square()


def sparsity_values(logits: Tensor, sparsity: Tensor, k: int) -> Tensor:
    """`relu(λ_k − λ)`, `λ_k = 1 − (Σ_{i≤k} u_i − k·u_{k+1})`, whose mean is LD-MoLE's sparsity loss (arXiv 2509.25684).

    From λ_k on a token uses at most k experts.

    Args:
        logits: `(…, E)`; sorted, largest first, they are u. They get no gradient.
        sparsity: λ, `(…)`.
        k: number of experts to aim at.
    """
    if logits.shape[-1] <= k:
        return torch.zeros_like(sparsity)
    u = logits.detach().topk(k + 1, -1).values
    return (1 - (u[..., :k].sum(-1) - k * u[..., k]) - sparsity).relu()


def mixture_loss(routers: Sequence[Router[Any]], sums: Sequence[Tensor]) -> Tensor:
    """The weighted auxiliary losses of one batch, averaged over all projections → scalar.

    Args:
        routers: the router of each adapted projection, with its coefficients in `params`.
        sums: `(k,)` of each projection, its `token_columns` summed over the tokens.
    """
    groups: dict[Any, list[int]] = defaultdict(list)  # projections with equal settings are computed together
    for place, (router, own) in enumerate(zip(routers, sums, strict=True)):
        groups[type(router), repr(router.params), router.num_experts, own.dtype, own.device].append(place)
    total = sums[0].new_zeros(())
    for places in groups.values():
        losses = projection_losses(routers[places[0]], torch.stack([sums[place] for place in places]))
        total = total + losses.sum().to(total.device)
    return total / len(sums)


def projection_losses(router: Router[Any], sums: Tensor) -> Tensor:
    """The weighted sum of a router's losses for each of L projections, from their sums `(L, k)` → `(L,)`."""
    means = token_means(router, sums)
    total = torch.zeros_like(sums[..., 0])
    for name, weight in loss_coefficients(router).items():
        if name == "balance":
            loss = balance_loss(means["usage"], means["balance_probs"])
        elif name == "cv":
            loss = cv_loss(means["weights"])
        else:
            loss = means[name][..., 0]  # the entropy, z and sparsity losses are means over tokens
        total = total + weight * loss
    return total


LOSSES = ("balance", "entropy", "z", "cv", "sparsity")


def loss_coefficients(router: Router[Any]) -> dict[str, float]:
    """The coefficients of the auxiliary losses that a router has, by name; a single expert has none."""
    if router.num_experts == 1:
        return {}
    given = {name: getattr(router.params, f"{name}_loss_coef", 0.0) for name in LOSSES}
    return {name: value for name, value in given.items() if value}


def has_losses(router: Router[Any]) -> bool:
    """Whether a router has an auxiliary loss."""
    return bool(loss_coefficients(router))


# ---------------------------------------------------------------------------------------------------------
# What is summed over tokens


def column_widths(router: Router[Any]) -> dict[str, int]:
    """Names and widths of a router's `token_columns`, in their order."""
    experts, losses = router.num_experts, loss_coefficients(router)
    widths = {"tokens": 1, "active": 1, "entropy": 1, "weights": experts}
    if "balance" in losses:
        widths |= {"usage": experts, "balance_probs": experts}
    return widths | {name: 1 for name in ("z", "sparsity") if name in losses}


def token_columns(router: Router[Any], routing: Routing) -> Tensor:
    """What is summed over the tokens of a routing of `(…, E)` → `(…, k)`, the columns named by `column_widths`.

    Only what a loss needs has a gradient.
    """
    losses, weights, entropy = loss_coefficients(router), routing.weights, routing.entropy
    if entropy is None:
        entropy = shannon_entropy(routing.logits if "entropy" in losses else routing.logits.detach())
    elif "entropy" not in losses:
        entropy = entropy.detach()
    numbers = [torch.ones_like(entropy), (weights > 0).sum(-1).to(entropy.dtype), entropy]
    columns = [torch.stack(numbers, -1), weights if "cv" in losses else weights.detach()]
    if "balance" in losses:
        columns += [router.usage(routing), router.balance_probs(routing)]
    if "z" in losses:
        columns.append(z_values(routing.logits)[..., None])
    if "sparsity" in losses:
        assert routing.sparsity is not None  # of a router that has such a loss
        columns.append(sparsity_values(routing.logits, routing.sparsity, router.params.sparsity_k)[..., None])
    return torch.cat(columns, -1)


def token_means(router: Router[Any], sums: Tensor) -> dict[str, Tensor]:
    """The means over tokens of the columns, from their sums `(…, k)`; 0 if no token counts."""
    widths = column_widths(router)
    parts = dict(zip(widths, sums.split(list(widths.values()), -1), strict=True))
    tokens = parts.pop("tokens").clamp(min=1)
    return {name: part / tokens for name, part in parts.items()}
