"""Operations that several methods use to select experts and weight them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def sort_experts(scores: Tensor) -> tuple[Tensor, Tensor]:
    """`scores (…, E)` in descending order, and the expert `(…, E)` at each rank; ties keep the experts' order."""
    return torch.sort(scores, dim=-1, descending=True, stable=True)


def nucleus(probs: Tensor, top_p: float, at_least: int = 1, inclusive: bool = True) -> Tensor:
    """Mask `(…, E)` of the most probable experts whose cumulative probability stays within `top_p`.

    Args:
        probs: `(…, E)`.
        top_p: the cumulative probability.
        at_least: number of experts that are kept in any case.
        inclusive: also keep the expert whose probability crosses `top_p`, as nucleus sampling does.
    """
    if top_p >= 1:  # rounding may lift or lower the sum of all probabilities
        return torch.ones_like(probs, dtype=torch.bool)
    descending, order = sort_experts(probs)
    cumulative = descending.cumsum(-1)
    # An expert crosses top_p if the sum before it is still below top_p.
    kept = F.pad(cumulative[..., :-1], (1, 0)) < top_p if inclusive else cumulative <= top_p
    kept[..., :at_least] = True
    return kept.scatter(-1, order, kept)  # from ranks back to experts


def renormalised(weights: Tensor) -> Tensor:
    """`weights (…, E)` divided by their sum; weights that are all 0 stay 0."""
    total = weights.sum(-1, keepdim=True)
    return weights / torch.where(total > 0, total, torch.ones_like(total))
