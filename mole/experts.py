"""The experts of one projection, stacked, and their one product."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def reset_experts(down: nn.Linear, up: nn.Linear) -> None:
    """LoRA's start: A Kaiming-uniform (a = √5), B zero, so that a fresh adapter changes nothing."""
    nn.init.kaiming_uniform_(down.weight, a=math.sqrt(5))
    nn.init.zeros_(up.weight)


def mix_experts(x: Tensor, down: Tensor, up: Tensor, weights: Tensor, scale: float) -> Tensor:
    """The update of all experts at once: `s · Σ_i w_i · B_i A_i x = ((x Aᵀ) ⊙ repeat(s·w, r)) Bᵀ`.

    The gates stand between A and B, so no expert's output is ever formed on its own.

    Args:
        x: `(…, in)`.
        down: A, `(E·r, in)`, expert i in rows i·r … (i+1)·r − 1.
        up: B, `(out, E·r)`.
        weights: w, `(…, E)`.
        scale: s = alpha / r.

    Returns:
        `(…, out)`.
    """
    hidden = F.linear(x, down)
    gates = (weights * scale).to(hidden.dtype)
    gated = hidden.unflatten(-1, (gates.shape[-1], -1)) * gates[..., None]
    return F.linear(gated.flatten(-2), up)


def dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """`x` with each element zero with probability `p` and the others divided by `1 − p`, in training only.

    On a CPU torch draws a 64-bit number an element, one after the other: a sixth of a training step. Here every such
    number serves four elements, so `p` is met to the nearest 1/65536.
    """
    drop = round(p * 65536)
    if not training or drop == 0:
        return x
    if x.device.type != "cpu":
        return F.dropout(x, p, training=True)
    draws = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    kept = draws.view(torch.int16)[: x.numel()].view(x.shape) >= drop - 32768
    return x * kept.to(x.dtype).mul_(65536 / (65536 - drop))


def stacked(in_features: int, out_features: int, num_experts: int, r: int) -> tuple[nn.Linear, nn.Linear]:
    """The pair `A (E·r, in)`, `B (out, E·r)` of `num_experts` experts of rank `r`, at LoRA's start."""
    down = nn.Linear(in_features, num_experts * r, bias=False)
    up = nn.Linear(num_experts * r, out_features, bias=False)
    with torch.no_grad():
        reset_experts(down, up)
    return down, up
