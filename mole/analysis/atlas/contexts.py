"""The places in the text where each expert was strongest, and the tokens that are most characteristic of it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

BEFORE, AFTER = 12, 4
"""Tokens shown before and after the one for which the expert was strongest."""
KEPT, KEPT_CELLS = 3, 12_000
"""Places kept for each expert: this many, and one if the adapter has more experts in all its projections than that."""
LEAST_COUNT = 5
"""Tokens that occur less often than this are never characteristic: chance alone gives them a high lift."""


class Context(NamedTuple):
    """A place in the text: the row's place in the corpus, the expert's weight, and token ids before, at and after."""

    place: int
    weight: float
    before: list[int]
    token: int
    after: list[int]


class StrongestContexts:
    """For each expert the tokens that gave it the largest weights, at most one of a row; of equal ones the first seen.

    The memory is that of the places kept, whatever the number of tokens.

    Args:
        projections, experts: their numbers.
        prefix: tokens with which all rows begin, as with a system prompt: there is nothing to see in them.
    """

    def __init__(self, projections: int, experts: int, prefix: int = 0) -> None:
        self.prefix = prefix
        self.kept = KEPT if projections * experts <= KEPT_CELLS else 1
        shape = (projections, experts, self.kept)
        self.weights = torch.zeros(shape)
        self.places = torch.full(shape, -1)
        self.windows = torch.full((*shape, BEFORE + 1 + AFTER), -1, dtype=torch.int32)

    def add(self, weights: Tensor, rows: list[list[int]], places: list[int]) -> None:
        """Look at some rows.

        Args:
            weights: `(tokens, projections, E)`, of their tokens, one row after the other.
            rows: their token ids.
            places: their places in the corpus.
        """
        lengths = [len(row) for row in rows]
        by_row = pad_sequence(list(weights.split(lengths)), batch_first=True)  # (rows, longest, projections, E)
        by_row[:, : self.prefix] = 0
        best, position = by_row.max(1)  # the first of equal ones
        self._merge(best.permute(1, 2, 0), position.permute(1, 2, 0), rows, places)

    def _merge(self, best: Tensor, position: Tensor, rows: list[list[int]], places: list[int]) -> None:
        """Keep the largest of what is kept and of each row's `best (projections, E, rows)`, at `position`."""
        values, order = torch.cat([self.weights, best], -1).sort(dim=-1, descending=True, stable=True)
        order = order[..., : self.kept]
        fresh = order >= self.kept
        row = (order - self.kept).clamp(min=0)
        old = order.clamp(max=self.kept - 1)
        padded = [torch.tensor([-1] * BEFORE + ids + [-1] * AFTER, dtype=torch.int32) for ids in rows]
        table = pad_sequence(padded, batch_first=True, padding_value=-1)
        at = position.gather(-1, row)[..., None] + torch.arange(BEFORE + 1 + AFTER)
        windows = self.windows.gather(-2, old[..., None].expand(*old.shape, self.windows.shape[-1]))
        self.windows = torch.where(fresh[..., None], table[row[..., None], at], windows)
        self.places = torch.where(fresh, torch.tensor(places)[row], self.places.gather(-1, old))
        self.weights = values[..., : self.kept].clone()  # a view would keep the whole batch

    def of(self, projection: int, expert: int) -> list[Context]:
        """The places of an expert, the strongest first; none where it was never used."""
        found = []
        for kept in range(self.kept):
            weight = float(self.weights[projection, expert, kept])
            if weight <= 0:
                break
            window = self.windows[projection, expert, kept].tolist()
            before, after = (
                [token for token in part if token >= 0] for part in (window[:BEFORE], window[BEFORE + 1 :])
            )
            place = int(self.places[projection, expert, kept])
            found.append(Context(place, weight, before, window[BEFORE], after))
        return found


def characteristic(table: Tensor, listed: int, most: int, least: int = LEAST_COUNT) -> tuple[Tensor, Tensor, Tensor]:
    """The values most characteristic of each expert → their places, counts and lifts, each `(projections, E, m)`.

    Lift is p(expert | value) / p(expert): how much more often the expert is drawn for this value than for all. The
    count is the expert's share of the tokens that have the value. The order is that of the lift shrunk towards 1 by
    `least` tokens that are drawn as all are, (n(e, v) + least · p(e)) / ((n(v) + least) · p(e)), so that of values with
    the same lift the more frequent one is first. Only values with at least `least` tokens, a count of at least 1
    and a lift above 1 are characteristic; a count of 0 marks where there are no more.

    Args:
        table: `(V, projections, E + 1)`, from `ValueCounts`.
        listed: only the first so many values may be characteristic; all count for p(expert).
        most: the largest m.
        least: tokens that a value must have.
    """
    usual = (table.sum(0) / table.sum((0, 2))[:, None].clamp(min=1e-12))[..., :-1].clamp(min=1e-12)  # (projections, E)
    table = table[:listed]
    counts, of_value = table[..., :-1], table.sum(-1)[..., None]
    lift = counts / of_value.clamp(min=1e-12) / usual
    shrunk = (counts + least * usual) / ((of_value + least) * usual)
    shrunk = torch.where((of_value >= least) & (counts >= 1) & (lift > 1), shrunk, torch.zeros_like(shrunk))
    values, places = shrunk.sort(dim=0, descending=True, stable=True)
    places = places[:most]
    chosen = torch.where(values[:most] > 0, counts.gather(0, places), torch.zeros_like(values[:most]))
    first, second, third = (part.permute(1, 2, 0) for part in (places, chosen, lift.gather(0, places)))
    return first, second, third
