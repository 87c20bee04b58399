"""4-bit projections on a CPU with AVX512-BF16, where bitsandbytes keeps weights in a form of its own."""

from __future__ import annotations

from typing import Any

from torch import nn

from mole.core.errors import MoleError

SWITCH = "support_avx512bf16_for_cpu"
"""bitsandbytes' attribute of a 4-bit linear: whether it may pack its weights; always false on other CPUs."""
ROWS = 32
"""Outputs that the packed kernel computes at a time."""


def limit_packing(model: nn.Module, trains: bool = False) -> None:
    """Keep the 4-bit linears of a model unpacked that bitsandbytes cannot pack; all of them, where the model `trains`.

    On a CPU with AVX512-BF16 a 4-bit linear packs its weights at its first call in evaluation mode, for a kernel that
    decodes 5 to 70 times as fast. That kernel takes `out_features` in rows of 32 and `in_features` in whole blocks
    (64), else it raises; it has no backward, so that after an evaluation in mid-training the layers below would get no
    gradient, without an error; and the way back is not exact.

    Raises `MoleError` when the model is to train and has been packed already.
    """
    linear: Any
    for linear in model.modules():
        if not hasattr(linear, SWITCH):
            continue
        weight: Any = linear.weight
        state = getattr(weight, "quant_state", None)
        if trains and getattr(state, "packing_format_for_cpu", False):
            raise MoleError(
                "The 4-bit base model was used in evaluation mode on this CPU, where bitsandbytes then packs its "
                "weights and gradients no longer pass. Load the model again and add the adapter before using it."
            )
        if trains or linear.out_features % ROWS or linear.in_features % weight.blocksize:
            setattr(linear, SWITCH, False)
