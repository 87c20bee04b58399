"""Routing by a constant threshold."""

from __future__ import annotations

from torch import Tensor

from mole.config.router_params import ThresholdParams
from mole.mixture.routers.base import Choice, Router
from mole.mixture.routers.selection import renormalised


class ThresholdRouter(Router[ThresholdParams]):
    """Experts with `p_i ≥ τ`, renormalised: `w_i = p_i / Σ_{p_j ≥ τ} p_j` (the ablation in AdaMoLE, arXiv 2405.00361).

    Shape: logits `(…, E)` → weights `(…, E)`, all 0 if no probability reaches τ.
    """

    def route(self, logits: Tensor, *others: Tensor) -> Choice:
        probs = logits.softmax(-1)
        kept = probs.detach() >= self.params.threshold
        return Choice(renormalised(probs * kept), probs)
