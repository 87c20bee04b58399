"""Padding encoded rows into tensors, and splitting a batch by length to save padding. No torch until it is called."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mole.data.encoding import IGNORE_INDEX

if TYPE_CHECKING:
    import torch


@dataclass
class Collator:
    """Pads rows on the right → tensors `input_ids`, `attention_mask` and `labels`, each (rows, longest)."""

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
    """Split a right-padded batch (rows, longest) into parts of similar length, each as wide as its longest row.

    The parts minimise the number of tokens with padding, plus `overhead` tokens for each part (the fixed cost of a
    forward pass, in tokens).
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
    """The ends of the parts of ascending `lengths` that minimise Σ (rows · longest + overhead) over the parts.

    Dynamic programming: `best[end]` is the cost of the first `end` rows. Parts have at most `MAX_PART_ROWS` rows,
    which bounds the work.
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
