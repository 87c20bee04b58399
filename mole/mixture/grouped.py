"""Where E·r is so large that computing all experts loses: only the chosen ones, tokens grouped by expert."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mole.mixture.experts import in_dtype

HAS_PRODUCT = hasattr(F, "grouped_mm")
"""Older releases of torch have no grouped product; all experts are computed there."""
ALIGNMENT = 16
"""Bytes that every row given to the grouped product must be a multiple of."""
FIXED, PER_RANK = 150, 1
"""What a chosen expert costs, in ranks of computing all: bringing tokens together, and its own r. Measured on two CPU
cores at ranks 4 to 32 with one to four experts a token, whole training steps; see `benchmarks/growth.py`."""
FEW, LARGE = 64, 1024
"""For fewer tokens than `FEW` it is the number of operations that counts, until E·r is `LARGE`."""


class Slots(NamedTuple):
    """The pairs of a token and an expert that it uses, sorted by expert.

    Attributes:
        tokens: `(N·k)` the token of each.
        ends: `(E)` int32, where each expert's pairs end.
        weights: `(N·k, 1)` the weight of each.
    """

    tokens: Tensor
    ends: Tensor
    weights: Tensor


def pays(x: Tensor, weight: Tensor, experts: int, used: int, sizes: tuple[int, ...]) -> bool:
    """Whether computing the `used` experts of each token of `x (…, in)` alone is quicker than computing all of them.

    `weight` is A `(E·r, in)`, `sizes` are the widths of the projections. It was measured on CPUs and is never so on
    another device.
    """
    rank = len(weight) // experts
    if used >= experts or len(weight) <= used * (FIXED + PER_RANK * rank) or not HAS_PRODUCT:
        return False
    if len(weight) < LARGE and x.numel() < FEW * x.shape[-1]:
        return False
    aligned = all(size * weight.dtype.itemsize % ALIGNMENT == 0 for size in (rank, *sizes))
    fits = weight.device.type == "cpu" and weight.dtype in (torch.float32, torch.bfloat16, torch.float16)
    return aligned and fits and not torch.is_autocast_enabled("cpu") and not torch.compiler.is_compiling()


def slots_of(weights: Tensor, used: int) -> Slots:
    """The slots of `weights (N, E)`, of which at most `used` in a row are above 0."""
    chosen = weights.detach().topk(used, -1).indices
    experts, order = chosen.flatten().sort(stable=True)
    bounds = torch.arange(weights.shape[-1], device=weights.device)
    ends = torch.searchsorted(experts, bounds, right=True).to(torch.int32)
    return Slots(order // used, ends, weights.gather(-1, chosen).flatten()[order, None])


def down(x: Tensor, slots: Slots, weight: Tensor) -> Tensor:
    """`w · A_i x` of every slot: `x (N, in)` and A `(E·r, in)` → `(N·k, r)`."""
    stacked = weight.view(len(slots.ends), -1, weight.shape[-1])
    return F.grouped_mm(x[slots.tokens], stacked.transpose(-2, -1), offs=slots.ends) * slots.weights


def add_up(base: Tensor, hidden: Tensor, slots: Slots, up: Tensor, in_place: bool) -> Tensor:
    """`base (…, out)` and every slot's update `B_i h`, of `hidden (N·k, r)` and B `(out, E·r)`."""
    stacked = in_dtype(up, hidden.dtype).view(len(up), len(slots.ends), -1).permute(1, 2, 0)
    updates = in_dtype(F.grouped_mm(hidden, stacked, offs=slots.ends), base.dtype)
    rows = base.reshape(-1, base.shape[-1])
    added = rows.index_add_ if in_place else rows.index_add
    return added(0, slots.tokens, updates).view_as(base)
