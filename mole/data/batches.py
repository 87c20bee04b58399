"""Encoded rows into padded tensors, and a batch into parts of similar length with less padding."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mole.data.encoding import IGNORE_INDEX

if TYPE_CHECKING:
    import torch


@dataclass
class Collator:
    """Rows of ids and labels → right-padded tensors `input_ids`, `attention_mask`, `labels` (batch, longest)."""

    pad_token_id: int

    def __call__(self, rows: Sequence[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        import torch

        longest = max(len(row["input_ids"]) for row in rows)

        def padded(values: Iterable[list[int]], filler: int) -> torch.Tensor:
            return torch.tensor([row + [filler] * (longest - len(row)) for row in values])

        return {
            "input_ids": padded((row["input_ids"] for row in rows), self.pad_token_id),
            "attention_mask": padded(([1] * len(row["input_ids"]) for row in rows), 0),
            "labels": padded((row["labels"] for row in rows), IGNORE_INDEX),
        }


MAX_PART_ROWS = 256


def split_by_length(batch: dict[str, torch.Tensor], overhead: int) -> list[dict[str, torch.Tensor]]:
    """A right-padded batch `(rows, longest)` in parts of like length, each as wide as its longest row.

    The parts have the same tokens and less padding. They are such that the tokens with padding, and `overhead` tokens'
    worth of work for every part, are fewest.
    """
    lengths = batch["attention_mask"].sum(-1)
    order = lengths.argsort(stable=True)
    ends = optimal_cuts(lengths[order].tolist(), overhead)
    if len(ends) == 1:
        return [batch]
    parts = zip([0, *ends], ends, strict=False)
    return [
        {name: values[order[start:end], : lengths[order[end - 1]]] for name, values in batch.items()}
        for start, end in parts
    ]


def optimal_cuts(lengths: Sequence[int], overhead: int) -> list[int]:
    """Where ascending lengths are best cut: the end of every part, the cheapest sum of `rows · longest + overhead`.

    No part has more than `LARGEST_PART` rows, so that finding them takes no time.
    """
    best, begins = [0], [0]
    for end, longest in enumerate(lengths, start=1):
        cost, start = min(
            (best[start] + (end - start) * longest + overhead, start)
            for start in range(max(0, end - MAX_PART_ROWS), end)
        )
        best.append(cost)
        begins.append(start)
    ends = [len(lengths)]
    while begins[ends[0]]:
        ends.insert(0, begins[ends[0]])
    return ends
