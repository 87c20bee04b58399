"""Top-k routing."""

from __future__ import annotations

import torch
from torch import Tensor

from mole.config.router_params import TopKParams
from mole.mixture.routers.base import Choice, Router
from mole.mixture.routers.selection import sort_experts


class TopKRouter(Router[TopKParams]):
    """The k largest probabilities, renormalised: `w_i = p_i / Σ_{j in top k} p_j` (MoLA, arXiv 2402.08562; MixLoRA).

    With k = 1 that weight would be 1 whatever the gate says, so it is `w_i = p_i` (Switch, arXiv 2101.03961).

    Shape: logits `(…, E)` → weights `(…, E)`, of which `min(top_k, E)` are above 0.
    """

    @property
    def max_active(self) -> int:
        return min(self.params.top_k, self.num_experts)

    def route(self, logits: Tensor, *others: Tensor) -> Choice:
        probs = logits.softmax(-1)
        experts = sort_experts(probs.detach())[1][..., : self.params.top_k]  # (…, k)
        # the softmax of these experts' logits equals their p divided by its sum
        weights = logits.gather(-1, experts).softmax(-1) if self.params.renormalized else probs.gather(-1, experts)
        return Choice(torch.zeros_like(probs).scatter(-1, experts, weights), probs)
