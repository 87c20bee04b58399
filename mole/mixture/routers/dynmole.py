"""DynMoLE: routing that depends on the entropy of the router, and the two families of entropy."""

from __future__ import annotations

import math

from torch import Tensor

from mole.config.router_params import DynMoLEParams
from mole.mixture.routers.base import Choice, Router, Routing, shannon_entropy
from mole.mixture.routers.selection import nucleus

EPSILON = 1e-5
"""ε of the entropies, added to every probability."""

SHANNON_BAND = 1e-3
"""Closer to q = 1 than this, Shannon's limit is used: there ε outweighs the entropy itself in the formulas."""


class DynMoLERouter(Router[DynMoLEParams]):
    """All experts for a token whose router is unsure, the most probable ones otherwise (DynMoLE, arXiv 2504.00661).

    `w = p` if `H(p) > entropy_threshold`; else `w_i = p_i` for the `keep_top_k` most probable experts and those within
    a cumulative probability of `top_p`, 0 for the others. The kept probabilities are not renormalised, as in the paper.

    Shape: logits `(…, E)` → weights `(…, E)`, of which at least one is above 0.
    """

    def route(self, logits: Tensor, *others: Tensor) -> Choice:
        params = self.params
        entropy_family = renyi_entropy if params.entropy_type == "renyi" else tsallis_entropy
        probs = logits.softmax(-1)
        entropy = entropy_family(logits, probs, params.entropy_index)
        kept = nucleus(probs.detach(), params.top_p, params.keep_top_k, params.inclusive_top_p)
        if params.entropy_threshold < 1:  # at 1 or more soft routing is off, even where ε lifts H above 1
            kept = kept | (entropy.detach() > params.entropy_threshold)[..., None]
        return Choice(probs * kept, probs, entropy)

    def usage(self, routing: Routing) -> Tensor:
        return routing.weights


def tsallis_entropy(logits: Tensor, probs: Tensor, index: float) -> Tensor:
    """`[1 − Σ (p + ε)^q] / (1 − E^(1−q))` with q the `index`, normalised to 0…1 → `(…)`.

    Shannon's at q = 1; 0 when E = 1.

    Args:
        logits: `(…, E)`.
        probs: `(…, E)`, the softmax of `logits`.
        index: q.
    """
    experts = probs.shape[-1]
    if experts == 1 or abs(index - 1) < SHANNON_BAND:
        return shannon_entropy(logits)
    return (1 - (probs + EPSILON).pow(index).sum(-1)) / (1 - experts ** (1 - index))


def renyi_entropy(logits: Tensor, probs: Tensor, index: float) -> Tensor:
    """`ln(Σ (p + ε)^q) / (1 − q) / ln E` with q the `index`, normalised to 0…1 → `(…)`.

    Shannon's at q = 1; 0 when E = 1.

    Args:
        logits: `(…, E)`.
        probs: `(…, E)`, the softmax of `logits`.
        index: q.
    """
    experts = probs.shape[-1]
    if experts == 1 or abs(index - 1) < SHANNON_BAND:
        return shannon_entropy(logits)
    return (probs + EPSILON).pow(index).sum(-1).log() / ((1 - index) * math.log(experts))
