"""Shuffled data: each row's routing is paired with the values of another row.

In a chunk of rows a random cycle through all of them gives each row a partner, never itself; its tokens get the
partner's values in their order, from a random place on and around. So the values keep their number, their order and
what they have in common within a row, the routing keeps its own, and nothing connects the two: not which row, and not
which place in it. For a column, which is the same in all tokens of a row, this is a permutation of the rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

SHUFFLES = 20
"""Shufflings, K."""


def partners(rows: int, generator: torch.Generator, shuffles: int = SHUFFLES) -> Tensor:
    """For each shuffling a partner of each row → `(K, rows)`; nobody is its own, unless there is only one row."""
    order = torch.stack([torch.randperm(rows, generator=generator) for _ in range(shuffles)])
    return torch.empty_like(order).scatter_(1, order, order.roll(1, 1))


def shuffled_places(lengths: Tensor, generator: torch.Generator, shuffles: int = SHUFFLES) -> tuple[Tensor, Tensor]:
    """Where the values of each token and each row are taken from.

    Args:
        lengths: `(rows,)`, tokens of each; the tokens of all rows follow one another.

    Returns:
        `(K, tokens)`, places of tokens, and `(K, rows)`, places of rows.
    """
    other = partners(len(lengths), generator, shuffles)
    turn = torch.rand(other.shape, generator=generator, dtype=torch.float64)
    starts = lengths.cumsum(0) - lengths
    row = torch.arange(len(lengths)).repeat_interleave(lengths)
    position = torch.arange(int(lengths.sum())) - starts[row]
    length = lengths[other]  # (K, rows), the partner's
    turned = (turn * length).long()
    return starts[other][:, row] + (position + turned[:, row]) % length[:, row], other
