"""The experts of a projection, stacked into one A and one B, and the fused product that adds their update."""

from __future__ import annotations

import math
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def stacked_experts(in_features: int, out_features: int, num_experts: int, r: int) -> tuple[nn.Linear, nn.Linear]:
    """Create `A (E·r, in)` and `B (out, E·r)` of `num_experts` LoRA pairs of rank `r`; expert i has rows i·r … of A.

    A is Kaiming-uniform (a = √5) and B zero, as in LoRA, so a fresh adapter does not change the model.
    """
    down = nn.Linear(in_features, num_experts * r, bias=False)
    up = nn.Linear(num_experts * r, out_features, bias=False)
    nn.init.kaiming_uniform_(down.weight, a=math.sqrt(5))
    nn.init.zeros_(up.weight)
    return down, up


def add_experts(base: Tensor, hidden: Tensor, gates: Tensor, up: Tensor, in_place: bool = False) -> Tensor:
    """Add the update of all experts to the base layer's output: `base + ((x Aᵀ) ⊙ repeat(s·w, r)) Bᵀ`.

    The gates are applied between A and B, so the output of a single expert is never formed.

    Args:
        base: `(…, out)`.
        hidden: x Aᵀ, `(…, E·r)`, expert i in columns i·r … (i+1)·r − 1.
        gates: s·w, `(…, E)`, s = alpha / r.
        up: B, `(out, E·r)`.
        in_place: write into `base`; nothing else may refer to it.

    Returns:
        `(…, out)` in the dtype of `base`.
    """
    gates, up = in_dtype(gates, hidden.dtype), in_dtype(up, hidden.dtype)
    if not torch.is_grad_enabled():
        return add_gated(base, gate_hidden(hidden, gates).flatten(0, -2), up, 1.0, in_place)
    if not in_place or base.dtype != hidden.dtype or is_transformed():
        return base + F.linear(gate_hidden(hidden, gates), up).to(base.dtype)
    return cast(Tensor, AddExperts.apply(base, hidden, gates, up))


def add_gated(base: Tensor, gated: Tensor, up: Tensor, scale: float, in_place: bool) -> Tensor:
    """`base (…, out) + scale · gated Bᵀ`, without gradients.

    Args:
        base: `(…, out)`.
        gated: `(x Aᵀ) ⊙ repeat(w, r)`, `(N, E·r)`, one row for each token.
        up: B, `(out, E·r)`.
        scale: s.
        in_place: write into `base`; nothing else may refer to it.
    """
    up, rows = in_dtype(up, gated.dtype), base.reshape(-1, base.shape[-1])
    if base.dtype != gated.dtype or is_transformed():
        return base + (F.linear(gated, up) * scale).to(base.dtype).view_as(base)
    added = rows.addmm_ if in_place else rows.addmm  # product and sum in one operation
    return added(gated, up.t(), alpha=scale).view_as(base)


class AddExperts(torch.autograd.Function):
    """`base += (hidden ⊙ repeat(gates, r)) Bᵀ` in place, without a tensor for the update.

    Autograd would keep the gated activations too. The backward pass recomputes them, so `hidden` is the only saved
    tensor of size E·r per token.
    """

    @staticmethod
    def forward(ctx: Any, base: Tensor, hidden: Tensor, gates: Tensor, up: Tensor) -> Tensor:
        """`base (…, out)`, `hidden (…, E·r)`, `gates (…, E)`, `up (out, E·r)`, all of one dtype → `base`."""
        ctx.mark_dirty(base)
        ctx.save_for_backward(hidden, gates, up)
        base.view(-1, base.shape[-1]).addmm_(gate_hidden(hidden, gates).flatten(0, -2), up.t())
        return base

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, gates, up = ctx.saved_tensors
        grad_rows = grad.flatten(0, -2)  # (N, out)
        grad_gated = (grad_rows @ up).view(*hidden.shape[:-1], gates.shape[-1], -1)  # (…, E, r)
        grad_up = grad_rows.t() @ gate_hidden(hidden, gates).flatten(0, -2) if ctx.needs_input_grad[3] else None
        grad_gates = (grad_gated * hidden.view_as(grad_gated)).sum(-1)
        grad_hidden = (grad_gated * gates[..., None]).flatten(-2)
        return grad, grad_hidden, grad_gates, grad_up


def is_transformed() -> bool:
    """Whether torch.compile or a transform of torch.func (`grad`, `vmap`, …) follows the operations: they cannot look
    into autograd functions that are written by hand, and nothing may be written in place."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


def gate_hidden(hidden: Tensor, gates: Tensor) -> Tensor:
    """`hidden ⊙ repeat(gates, r)`: the r columns of expert i in `hidden (…, E·r)` times `gates[…, i]`, `(…, E)`."""
    return (hidden.view(*gates.shape, -1) * gates.unsqueeze(-1)).view_as(hidden)


def in_dtype(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x.to(dtype)`. The call alone, with nothing to convert, takes a tenth of the time of decoding."""
    return x if x.dtype == dtype else x.to(dtype)


def dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """Dropout: in training, zero each element of `x` with probability `p` and divide the others by `1 − p`."""
    mask = dropout_mask(x, p) if training else None
    return x if mask is None else mask.apply(x)


class DropoutMask(NamedTuple):
    """Which elements of a tensor stay in dropout, as bytes 1 and 0 of its shape, and what these are multiplied by."""

    kept: Tensor
    scale: float

    def apply(self, x: Tensor) -> Tensor:
        """The tensor `x` after dropout, or its gradient before it."""
        # bytes, since torch converts booleans eight times as slowly; not in place, for torch.func
        return (x * self.scale) * self.kept.to(x.dtype)


def dropout_mask(x: Tensor, p: float) -> DropoutMask | None:
    """Draw the mask of a dropout of `x` with probability `p`; None if all stay.

    On a CPU torch draws a 64-bit number for each element, one after the other, which takes a sixth of a training step.
    Here one such number serves four elements, so `p` is met to the nearest 1/65536.
    """
    drop = round(p * 65536)
    if drop == 0:
        return None
    if x.device.type != "cpu":
        return DropoutMask(torch.empty_like(x, dtype=torch.uint8).bernoulli_(1 - p), 1 / (1 - p))
    draws = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    kept = draws.view(torch.int16)[: x.numel()].view(x.shape) >= drop - 32768  # int16 is uniform over −32768 … 32767
    return DropoutMask(kept.view(torch.uint8), 65536 / (65536 - drop))
