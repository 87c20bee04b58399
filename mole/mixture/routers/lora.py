"""Plain LoRA as a mixture of one expert."""

from __future__ import annotations

import torch
from torch import Tensor

from mole.config.router_params import LoraParams
from mole.core.errors import ConfigError
from mole.mixture.routers.base import Router, Routing, no_experts


class LoraRouter(Router[LoraParams]):
    """One expert with `w = 1` for every token, and no parameters (LoRA, arXiv 2106.09685).

    Shape: `x (…, in)` → `Routing` of `(…, 1)`.
    """

    linears = input_linears = ()

    def __init__(self, in_features: int, num_experts: int, params: LoraParams) -> None:
        if num_experts != 1:
            raise ConfigError("adapter.num_experts", num_experts, "1 for the router 'lora'")
        super().__init__(in_features, num_experts, params)

    def forward(self, x: Tensor) -> Routing:
        ones = torch.ones(*x.shape[:-1], 1, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
        zeros = torch.zeros_like(ones)
        if self.allowed is not None and not len(self.allowed):
            return no_experts(zeros)
        return Routing(ones, ones, zeros[..., 0], zeros)
