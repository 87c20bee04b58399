"""How much the choice of experts tells of the data: mutual information, and what chance alone gives.

A token is one draw: of an expert, with the probability of that expert's share of the token's weights, and of the value
that a variable has for it. So a token counts as 1 in all however many experts it uses, and with weights that are 0 or 1
this is the usual count. A token that uses no expert draws *none*, a further outcome.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

DISTANCE = 6.0
"""Standard deviations of the shuffled values above their mean from which a specialisation is `clear`."""
LEAST_BITS = 1e-3
"""Less than this is never `clear`: it is no more than the rounding of soft weights."""


class Specialisation(NamedTuple):
    """How much the choice of experts tells of one variable; each `(projections,)`.

    Attributes:
        bits: the mutual information, in bits.
        share: the same as a share of the most it can be, `min(H(expert), H(value))`: 1 if one determines the other.
        chance: the mean over shuffled data, in bits.
        deviation: the standard deviation over shuffled data, in bits.
        excess: what `bits` has above `chance`, in bits; 0 if it has less.
        clear: whether `bits` is more than `DISTANCE` deviations above `chance`, and at least `LEAST_BITS`.
    """

    bits: Tensor
    share: Tensor
    chance: Tensor
    deviation: Tensor
    excess: Tensor
    clear: Tensor

    def to_dict(self) -> dict[str, list[Any]]:
        """Plain numbers, one for each projection."""
        return {name: rounded(value, 6) for name, value in self._asdict().items()}


def shares_of(weights: Tensor) -> Tensor:
    """The draw of each token, from its `weights (…, E)`: their shares of the sum, and *none* → `(…, E + 1)`."""
    total = weights.sum(-1, keepdim=True)
    shares = weights / torch.where(total > 0, total, torch.ones_like(total))
    return torch.cat([shares, (total <= 0).to(shares.dtype)], -1)


def mutual_information(counts: Tensor) -> tuple[Tensor, Tensor]:
    """Mutual information of values and experts, in bits and as a share → two tensors `(…)`.

    With p the counts divided by their sum, I = Σ p(v, e) log₂ (p(v, e) / (p(v) p(e))), which is at least 0 and at the
    most the smaller one of the two entropies H(v) and H(e); the share is I / min(H(v), H(e)), and 0 if that is 0.

    Args:
        counts: `(…, V, E)`, how often each value met each expert; in float64.
    """
    total = counts.sum((-2, -1), keepdim=True)
    joint = counts / torch.where(total > 0, total, torch.ones_like(total))
    value, expert = joint.sum(-1), joint.sum(-2)
    bits = (entropy(value) + entropy(expert) - entropy(joint.flatten(-2))).clamp(min=0)
    most = torch.minimum(entropy(value), entropy(expert))
    return bits, torch.where(most > 1e-12, bits / most.clamp(min=1e-12), torch.zeros_like(bits)).clamp(max=1)


def entropy(probabilities: Tensor) -> Tensor:
    """`−Σ p log₂ p` of `(…, n)` → `(…)`, in bits."""
    return -torch.xlogy(probabilities, probabilities).sum(-1) / torch.log(torch.tensor(2.0, dtype=torch.float64))


def specialisation(counts: Tensor, shuffled: Tensor) -> Specialisation:
    """The specialisation of each projection in one variable.

    An estimate of mutual information from finite data is biased upwards: independent variables have about
    (V − 1)(E − 1) / (2 N ln 2) bits (Miller 1955; Panzeri & Treves 1996). That holds for N independent draws. Tokens of
    a text are not: neighbours are routed alike, and a row has one skill in all of its tokens, so N is nearer to the
    number of rows than of tokens, by an unknown factor. The bias is therefore measured: by pairing each row's routing
    with another row's values (`mole.analysis.atlas.shuffles`), which keeps both sequences as they are and breaks what
    connects them, as surrogate data do for time series (Theiler et al. 1992).

    Args:
        counts: `(V, projections, E)`.
        shuffled: `(K, V, projections, E)`, the same for K shufflings of the data; K at least 2.
    """
    bits, share = mutual_information(counts.transpose(0, 1))
    by_chance, _ = mutual_information(shuffled.transpose(1, 2))  # (K, projections)
    chance, deviation = by_chance.mean(0), by_chance.std(0)
    excess = (bits - chance).clamp(min=0)
    return Specialisation(bits, share, chance, deviation, excess, excess > (DISTANCE * deviation).clamp(min=LEAST_BITS))


def rounded(values: Any, digits: int = 4) -> Any:
    """A tensor or nested list as lists, its numbers rounded."""
    values = values.tolist() if isinstance(values, Tensor) else values
    if isinstance(values, list):
        return [rounded(value, digits) for value in values]
    return round(values, digits) if isinstance(values, float) else values
