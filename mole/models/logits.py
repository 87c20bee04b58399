"""Computes logits only at labelled positions: most tokens have no label, and the head is a fifth of a small model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn


def base_model(model: Any) -> Any:
    """The model inside a `PeftModel`; other models are returned unchanged."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@contextmanager
def only_positions(head: nn.Module, positions: Tensor) -> Iterator[None]:
    """Compute a language model's logits at some positions only: the output head receives `(1, n, hidden)`.

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


def summed_loss_at(model: nn.Module, head: nn.Module, positions: Tensor, targets: Tensor, **inputs: Tensor) -> Tensor:
    """Sum of the cross-entropy of `targets (n,)`, logits computed at `positions (n,)` alone → scalar.

    Args:
        model: the language model; `inputs` are its keyword arguments.
        head: its output embeddings.
        positions: indices into the flattened `(batch · length)`, of the tokens before the targets.
        targets: token ids.
    """
    with only_positions(head, positions):
        logits = model(**inputs).logits[0]
    return F.cross_entropy(logits.float(), targets, reduction="sum")
