"""Soft routing over all experts."""

from __future__ import annotations

from torch import Tensor

from mole.config.router_params import DenseParams
from mole.mixture.routers.base import Choice, Router


class DenseRouter(Router[DenseParams]):
    """All experts, weighted by their probability: `w = p` (LoRAMoE, arXiv 2312.09979).

    Shape: logits `(…, E)` → weights `(…, E)`.
    """

    def route(self, logits: Tensor, *others: Tensor) -> Choice:
        probs = logits.softmax(-1)
        return Choice(probs, probs)
