"""4-bit projections on a CPU with AVX512-BF16, for which bitsandbytes packs the weights in a format of its own."""

from __future__ import annotations

from typing import Any

from torch import nn

from mole.core.errors import MoleError

PACKING_ATTRIBUTE = "support_avx512bf16_for_cpu"
"""Attribute of a 4-bit linear of bitsandbytes: whether it may pack its weights; false on other CPUs."""
PACKED_ROWS = 32
"""Number of outputs that the kernel for packed weights computes at a time."""


def limit_packing(model: nn.Module, trains: bool = False) -> None:
    """Prevent bitsandbytes from packing the 4-bit linears that its kernel does not support; all, if the model `trains`.

    On a CPU with AVX512-BF16 a 4-bit linear packs its weights at its first call in evaluation mode, for a kernel that
    decodes 5 to 70 times as fast. The kernel raises an error unless `out_features` is a multiple of 32 and
    `in_features` of the quantisation block, 64. It has no backward pass: after an evaluation during training, the
    layers below would get no gradient, without an error. Unpacking is not exact.

    Raises:
        MoleError: the model is to train, but its weights have been packed already.
    """
    linear: Any
    for linear in model.modules():
        if not hasattr(linear, PACKING_ATTRIBUTE):
            continue
        weight: Any = linear.weight
        state = getattr(weight, "quant_state", None)
        if trains and getattr(state, "packing_format_for_cpu", False):
            raise MoleError(
                "The 4-bit base model was used in evaluation mode on this CPU, where bitsandbytes then packs its "
                "weights and gradients no longer pass. Load the model again and add the adapter before using it."
            )
        if trains or linear.out_features % PACKED_ROWS or linear.in_features % weight.blocksize:
            setattr(linear, PACKING_ATTRIBUTE, False)
