"""What experts do together: how often each is used, which are used for the same token, and paths across layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mole.analysis.atlas.recorder import BatchRouting, Projection


class Activity:
    """Sums over tokens; the memory depends on projections and experts alone.

    Attributes:
        tokens: number of tokens.
        active: `(projections, E)`, how many tokens used each expert, that is, with a weight above 0.
        together: `(projections, E, E)`, how many used both.
        idle: `(projections,)`, how many used none.
        entropy, number, strongest: `(projections,)`, sums of the entropy, of the number of experts used, and of the
            share of its weights that a token gave to its strongest expert.
        steps: the pairs of projections of one kind in successive layers, as places among the projections.
        paths: `(pairs, E + 1, E + 1)`, how many tokens had strongest expert i in the first and j in the second; E is
            none.
    """

    def __init__(self, projections: Sequence[Projection], experts: int) -> None:
        size = len(projections)
        self.tokens = 0
        self.active = torch.zeros(size, experts, dtype=torch.float64)
        self.together = torch.zeros(size, experts, experts, dtype=torch.float64)
        self.idle = torch.zeros(size, dtype=torch.float64)
        self.entropy, self.number, self.strongest = (torch.zeros(size, dtype=torch.float64) for _ in range(3))
        self.steps = successive(projections)
        self.paths = torch.zeros(len(self.steps), experts + 1, experts + 1, dtype=torch.float64)

    def add(self, routing: BatchRouting, shares: Tensor) -> None:
        """Add tokens: their routing, and their `shares (n, projections, E + 1)`."""
        used = (routing.weights > 0).float()
        self.tokens += len(used)
        self.active += used.sum(0, dtype=torch.float64)
        self.together += torch.einsum("npi,npj->pij", used, used)  # float32 is exact up to 2²⁴ tokens in a batch
        self.number += used.sum((0, 2), dtype=torch.float64)
        self.idle += shares[..., -1].sum(0)
        self.entropy += routing.entropy.sum(0, dtype=torch.float64)
        self.strongest += shares[..., :-1].amax(-1).sum(0)
        if self.steps:
            self._add_paths(shares.argmax(-1))

    def _add_paths(self, best: Tensor) -> None:
        """Add the strongest experts `(n, projections)` of some tokens."""
        width = self.paths.shape[-1]
        first, second = (torch.tensor(places) for places in zip(*self.steps, strict=True))
        pair = torch.arange(len(self.steps)) * width * width
        index = pair + best[:, first] * width + best[:, second]
        self.paths += torch.bincount(index.flatten(), minlength=self.paths.numel()).view(self.paths.shape)


def successive(projections: Sequence[Projection]) -> list[tuple[int, int]]:
    """The places of projections of one kind in successive layers, of those that are adapted."""
    last: dict[str, int] = {}
    pairs = []
    for place, projection in enumerate(projections):
        if projection.kind in last:
            pairs.append((last[projection.kind], place))
        last[projection.kind] = place
    return pairs


def coactivation(together: Tensor) -> Tensor:
    """`(…, E, E)`: of the tokens that used expert i, the share that used j too, as in OLMoE; 0 where none used i.

    Muennighoff et al. 2024, "OLMoE", section 5: N(i, j) / N(i).
    """
    used = together.diagonal(dim1=-2, dim2=-1)[..., None]
    return torch.where(used > 0, together / used.clamp(min=1), torch.zeros_like(together))
