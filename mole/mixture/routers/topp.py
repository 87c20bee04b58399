"""Top-p (nucleus) routing."""

from __future__ import annotations

import math

from torch import Tensor

from mole.config.router_params import TopPParams
from mole.mixture.routers.base import Choice, Router
from mole.mixture.routers.selection import nucleus


class TopPRouter(Router[TopPParams]):
    """The fewest most probable experts S with `Σ_S p ≥ top_p`, renormalised: `w_i = p_i / Σ_S p` (MixLoRA-dynamic).

    Shape: logits `(…, E)` → weights `(…, E)`, of which at least one is above 0.
    """

    def route(self, logits: Tensor, *others: Tensor) -> Choice:
        probs = logits.softmax(-1)
        kept = nucleus(probs.detach(), self.params.top_p)
        return Choice(logits.masked_fill(~kept, -math.inf).softmax(-1), probs)
