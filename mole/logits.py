"""Logits only where they are needed: most tokens of a batch have no label, and the head is a fifth of a small model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn


@contextmanager
def only_positions(head: nn.Module, positions: Tensor) -> Iterator[None]:
    """Compute a language model's logits at some positions only: the output head gets `(1, n, hidden)`.

    Args:
        head: the model's output embeddings.
        positions: `(n,)` indices into the flattened `(batch · length)`.
    """

    def select(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (inputs[0].flatten(0, 1).index_select(0, positions)[None], *inputs[1:])

    handle = head.register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()
