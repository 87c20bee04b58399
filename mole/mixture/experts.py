"""The experts of one projection, stacked, and their one product."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def reset_experts(down: nn.Linear, up: nn.Linear) -> None:
    """LoRA's start: A Kaiming-uniform (a = √5), B zero, so that a fresh adapter changes nothing."""
    nn.init.kaiming_uniform_(down.weight, a=math.sqrt(5))
    nn.init.zeros_(up.weight)


def add_experts(base: Tensor, hidden: Tensor, gates: Tensor, up: Tensor, in_place: bool = False) -> Tensor:
    """The base's output plus the update of all experts: `base + ((x Aᵀ) ⊙ repeat(s·w, r)) Bᵀ`.

    The gates stand between A and B, so no expert's output is ever formed on its own.

    Args:
        base: `(…, out)`.
        hidden: x Aᵀ, `(…, E·r)`, expert i in columns i·r … (i+1)·r − 1.
        gates: s·w, `(…, E)`, s = alpha / r.
        up: B, `(out, E·r)`.
        in_place: write into `base`, where nobody else looks at it.

    Returns:
        `(…, out)` in base's dtype.
    """
    gates, up = in_dtype(gates, hidden.dtype), in_dtype(up, hidden.dtype)
    if not torch.is_grad_enabled():
        return add_update(base, gated(hidden, gates).flatten(0, -2), up, 1.0, in_place)
    if not in_place or base.dtype != hidden.dtype or torch.compiler.is_compiling():
        return base + F.linear(gated(hidden, gates), up).to(base.dtype)
    return cast(Tensor, AddExperts.apply(base, hidden, gates, up))


def add_update(base: Tensor, values: Tensor, up: Tensor, scale: float, in_place: bool) -> Tensor:
    """`base (…, out) + scale · values Bᵀ` of gated `values (N, E·r)`, a row a token, without gradients."""
    up, rows = in_dtype(up, values.dtype), base.reshape(-1, base.shape[-1])
    if base.dtype != values.dtype or torch.compiler.is_compiling():
        return base + (F.linear(values, up) * scale).to(base.dtype).view_as(base)
    added = rows.addmm_ if in_place else rows.addmm
    return added(values, up.t(), alpha=scale).view_as(base)


class AddExperts(torch.autograd.Function):
    """`base += ((hidden ⊙ repeat(gates, r)) Bᵀ)`, in place: the update of all experts without a tensor of its own.

    The gated activations are formed again in the backward pass, so nothing of size E·r is kept but `hidden`.
    """

    @staticmethod
    def forward(ctx: Any, base: Tensor, hidden: Tensor, gates: Tensor, up: Tensor) -> Tensor:
        """`base (…, out)`, `hidden (…, E·r)`, `gates (…, E)`, `up (out, E·r)`, all of one dtype → `base`."""
        ctx.mark_dirty(base)
        ctx.save_for_backward(hidden, gates, up)
        base.view(-1, base.shape[-1]).addmm_(gated(hidden, gates).flatten(0, -2), up.t())
        return base

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, gates, up = ctx.saved_tensors
        flat = grad.flatten(0, -2)
        back = (flat @ up).view(*hidden.shape[:-1], gates.shape[-1], -1)
        grad_up = flat.t() @ gated(hidden, gates).flatten(0, -2) if ctx.needs_input_grad[3] else None
        grad_gates = (back * hidden.view_as(back)).sum(-1)
        grad_hidden = (back * gates[..., None]).flatten(-2)
        return grad, grad_hidden, grad_gates, grad_up


def gated(hidden: Tensor, gates: Tensor) -> Tensor:
    """`hidden (…, E·r)` with expert i's r numbers multiplied by `gates (…, E)`."""
    return (hidden.view(*gates.shape, -1) * gates.unsqueeze(-1)).view_as(hidden)


def in_dtype(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x.to(dtype)`, which takes its time even where there is nothing to do: a tenth of decoding."""
    return x if x.dtype == dtype else x.to(dtype)


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
