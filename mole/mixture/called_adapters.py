"""The adapters of layers that read the same input, computed by calling their own linear layers.

It replaces the fast ways where something takes part in these calls; see `own_linears`. Nothing here reads a weight:
under offload and FSDP a weight is there only during the call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mole.mixture.experts import dropout, gate_hidden, in_dtype
from mole.mixture.routers import Router, Routing


def called_hidden(downs: Sequence[nn.Linear], x: Tensor, rate: float, training: bool) -> list[Tensor]:
    """x Aᵀ of each layer, L of `(…, E·r)`.

    Args:
        downs: the L layers with A, all of one dtype.
        x: `(…, in)`, without dropout.
        rate, training: those of the dropout.
    """
    x = dropout(in_dtype(x, downs[0].weight.dtype), rate, training)  # a weight that is not there has a dtype
    return [down(x) for down in downs]


def called_routing(router: Router[Any], linears: Sequence[Sequence[nn.Module]], x: Tensor, layers: int) -> Routing:
    """The routing `(…, L, E)` of `x (…, in)`, in float32 or float64.

    Args:
        router: its rule routes all layers.
        linears: for each name in `Router.input_linears` its L modules, or the one that all layers share.
        x: without dropout.
        layers: L.
    """
    with torch.autocast(x.device.type, enabled=False):
        x = in_dtype(x, torch.promote_types(x.dtype, torch.float32))
        if not linears:
            return router(x[..., None, :].expand(*x.shape[:-1], layers, -1))
        # A wrapper may compute in another dtype (FSDP's mixed precision) or on another device (offload).
        scores = [torch.stack([linear(x).to(x) for linear in same], -2) for same in linears]
        return router.routing_of(*scores, defer_entropy=True)


def add_called(base: Tensor, hidden: Tensor, gates: Tensor, up: nn.Linear) -> Tensor:
    """`base + B(hidden ⊙ repeat(s·w, r))`.

    Args:
        base: the base layer's output, `(…, out)`.
        hidden: x Aᵀ, `(…, E·r)`.
        gates: s·w, `(…, E)`.
        up: the layer with B.
    """
    gated = gate_hidden(hidden, gates.to(hidden))
    if not torch.is_autocast_enabled(gated.device.type):
        gated = in_dtype(gated, up.weight.dtype)
    return base + up(gated).to(base)
