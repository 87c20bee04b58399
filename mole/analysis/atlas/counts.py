"""Counts of experts against the values of variables, for the data and for its shufflings, in bounded memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mole.analysis.atlas.shuffles import SHUFFLES

SHUFFLED_CELLS = 12_000_000
"""Numbers in the tables of a variable's shufflings, at the most: 96 MB."""
FEW = 64
"""Values up to which shufflings are counted by one matrix product."""


@dataclass(frozen=True)
class Variable:
    """Something that tokens or rows have.

    Attributes:
        name: `token`, `position`, `part` or a column's name.
        kind: `token`, `position`, `part` or `column`.
        values: the names of its values.
        of_rows: whether all tokens of a row have the same one.
    """

    name: str
    kind: str
    values: list[str]
    of_rows: bool = False


def most_classes(cells: int, wanted: int, width: int, tables: int = SHUFFLES) -> int:
    """How many values, at most `wanted` and at least 2, so that `tables` tables of `(values, width)` fit in `cells`."""
    return max(2, min(wanted, cells // (width * tables)))


class ValueCounts:
    """How often each value of a variable met each expert, `(V, projections, E + 1)` in float64; and for K shufflings.

    The memory is `(1 + K) · V · projections · (E + 1)` numbers, whatever the number of tokens.
    """

    def __init__(self, values: int, projections: int, experts: int, shuffles: int = SHUFFLES) -> None:
        self.table = torch.zeros(values, projections, experts + 1, dtype=torch.float64)
        self.shuffled = torch.zeros(shuffles, *self.table.shape, dtype=torch.float64)

    def add(self, shares: Tensor, values: Tensor, shuffled: Tensor | None = None) -> None:
        """Count some tokens, or the sums of some rows.

        Args:
            shares: `(n, projections, E + 1)`, from `shares_of`, in float64.
            values: `(n,)`, the place of each one's value.
            shuffled: `(K, n)`, the same for each shuffling.
        """
        self.table.index_add_(0, values, shares)
        if shuffled is None:
            return
        count = self.table.shape[0]
        if count <= FEW:  # many values would be a large product of mostly zeros
            chosen = F.one_hot(shuffled, count).transpose(1, 2).flatten(0, 1).float()  # (K · V, n)
            sums = chosen @ shares.flatten(1).float()
            self.shuffled += sums.view(len(shuffled), count, *shares.shape[1:])
            return
        for table, places in zip(self.shuffled, shuffled, strict=True):
            table.index_add_(0, places, shares)


def row_sums(shares: Tensor, row: Tensor, rows: int) -> Tensor:
    """The sums of `shares (n, …)` over the tokens of each row → `(rows, …)`; `row (n,)` is each token's."""
    return shares.new_zeros(rows, *shares.shape[1:]).index_add_(0, row, shares)
