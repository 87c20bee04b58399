"""The grouped product: compute only the experts that each token uses, with the tokens grouped by expert.

It replaces the fused product where E·r is so large that computing all experts takes longer.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mole.mixture.experts import in_dtype, is_transformed

HAS_GROUPED_MM = hasattr(F, "grouped_mm")
"""Older releases of torch have no grouped product; they compute all experts."""
ALIGNMENT = 16
"""The grouped product takes rows of a multiple of this many bytes."""
FIXED_COST, COST_PER_RANK = 150, 1
"""Cost of one active expert, in ranks of the fused product: `FIXED_COST` for gathering its tokens, `COST_PER_RANK` for
each of its own r. Measured with training steps on two CPU cores, at ranks 4 to 32 with one to four active experts; see
`benchmarks/growth.py`."""
FEW_TOKENS, LARGE_WIDTH = 64, 1024
"""With fewer tokens than `FEW_TOKENS` the number of operations decides, unless E·r is at least `LARGE_WIDTH`."""


class TokenGroups(NamedTuple):
    """The pairs of a token and an expert it uses, sorted by expert: N tokens, k pairs for each.

    Attributes:
        tokens: `(N·k)`, the index of each pair's token.
        ends: `(E)` int32, the end of each expert's pairs.
        weights: `(N·k, 1)`, the weight of each pair.
    """

    tokens: Tensor
    ends: Tensor
    weights: Tensor


def grouped_is_faster(x: Tensor, down: Tensor, experts: int, max_active: int, widths: tuple[int, ...]) -> bool:
    """Whether the grouped product is faster than the fused one. It was measured on CPUs; False on other devices.

    Args:
        x: `(…, in)`.
        down: A, `(E·r, in)`.
        experts: E.
        max_active: the largest number of experts that a token uses.
        widths: input and output widths of the projections.
    """
    rank = len(down) // experts
    if max_active >= experts or len(down) <= max_active * (FIXED_COST + COST_PER_RANK * rank) or not HAS_GROUPED_MM:
        return False
    if len(down) < LARGE_WIDTH and x.numel() < FEW_TOKENS * x.shape[-1]:
        return False
    aligned = all(width * down.dtype.itemsize % ALIGNMENT == 0 for width in (rank, *widths))
    fits = down.device.type == "cpu" and down.dtype in (torch.float32, torch.bfloat16, torch.float16)
    return aligned and fits and not torch.is_autocast_enabled("cpu") and not is_transformed()


def group_tokens(weights: Tensor, max_active: int) -> TokenGroups:
    """Group the tokens of `weights (N, E)` by expert; at most `max_active` weights of a token are above 0.

    Every token gets exactly k = `max_active` pairs, those beyond its active experts with weight 0: the sizes are then
    known without waiting for the device.
    """
    chosen = weights.detach().topk(max_active, -1).indices  # (N, k)
    experts, order = chosen.flatten().sort(stable=True)  # (N·k)
    bounds = torch.arange(weights.shape[-1], device=weights.device)
    ends = torch.searchsorted(experts, bounds, right=True).to(torch.int32)
    return TokenGroups(order // max_active, ends, weights.gather(-1, chosen).flatten()[order, None])


def grouped_down(x: Tensor, groups: TokenGroups, down: Tensor) -> Tensor:
    """`w · A_i x` of every pair: `x (N, in)` and A `(E·r, in)` → `(N·k, r)`."""
    per_expert = down.view(len(groups.ends), -1, down.shape[-1])  # (E, r, in)
    return F.grouped_mm(x[groups.tokens], per_expert.transpose(-2, -1), offs=groups.ends) * groups.weights


def add_grouped(base: Tensor, hidden: Tensor, groups: TokenGroups, up: Tensor, in_place: bool) -> Tensor:
    """Add every pair's update `B_i h` to its token's output.

    Args:
        base: `(…, out)`.
        hidden: `(N·k, r)`, from `grouped_down`.
        groups: the pairs.
        up: B, `(out, E·r)`.
        in_place: write into `base`; nothing else may refer to it.
    """
    per_expert = in_dtype(up, hidden.dtype).view(len(up), len(groups.ends), -1).permute(1, 2, 0)  # (E, r, out)
    updates = in_dtype(F.grouped_mm(hidden, per_expert, offs=groups.ends), base.dtype)
    rows = base.reshape(-1, base.shape[-1])
    added = rows.index_add_ if in_place else rows.index_add
    return added(0, groups.tokens, updates).view_as(base)
