"""AdaMoLE: routing by a threshold that a network computes for each token."""

from __future__ import annotations

from torch import Tensor

from mole.config.router_params import AdaMoLEParams
from mole.mixture.routers.base import Choice, Router, Routing, ScoreLinear
from mole.mixture.routers.selection import renormalised


class AdaMoLERouter(Router[AdaMoLEParams]):
    """Experts whose probability reaches the token's own threshold (AdaMoLE, arXiv 2405.00361, eq. 4–6).

    `τ(x) = τ_max · sigmoid(x vᵀ + b)`, `a_i = p_i − τ(x)`, `w_i = a_i / Σ_{a_j ≥ 0} a_j` where `a_i ≥ 0`, else 0.

    Shape: logits `(…, E)` and the threshold network's output `(…, 1)` → weights `(…, E)`, all 0 if no probability
    exceeds τ(x).
    """

    linears = input_linears = ("gate", "threshold")

    def __init__(self, in_features: int, num_experts: int, params: AdaMoLEParams) -> None:
        super().__init__(in_features, num_experts, params)
        self.threshold = ScoreLinear(in_features, 1)

    def route(self, logits: Tensor, *others: Tensor) -> Choice:
        # 1 / E is the default of the paper, with E the experts trained: steering does not change it.
        max_threshold = 1 / self.num_experts if self.params.max_threshold is None else self.params.max_threshold
        probs = logits.softmax(-1)
        threshold = max_threshold * others[0].sigmoid()  # (…, 1)
        weights = renormalised((probs - threshold).relu())
        return Choice(weights, probs, threshold=threshold[..., 0])

    def usage(self, routing: Routing) -> Tensor:
        assert routing.threshold is not None
        return (routing.probs >= routing.threshold[..., None]).to(routing.probs.dtype)

    def balance_probs(self, routing: Routing) -> Tensor:
        assert routing.threshold is not None
        # The paper uses p; the authors' code uses the margin a = p − τ(x).
        return routing.probs - routing.threshold[..., None] if self.params.balance_on_margin else routing.probs
