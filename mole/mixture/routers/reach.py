"""Whether the loss reaches a router at all: whether the experts' weights depend on its parameters."""

from __future__ import annotations

import torch

from mole.config import AdapterConfig
from mole.mixture.routers import ROUTER_CLASSES

WIDTH, TOKENS = 16, 64


def unreached_notice(adapter: AdapterConfig) -> str | None:
    """What to tell of settings with which a router gets no gradient from the loss, in a sentence; None if it gets one.

    Its auxiliary losses may still move such a router, but not to where the experts help.
    """
    experts = max(adapter.expert_counts)
    if adapter.router == "lora" or reached(adapter, experts):
        return None
    if experts == 1:
        return "adapter.num_experts is 1: there is nothing to route, so the router learns nothing."
    return (
        f"The experts' weights do not depend on the gate with these settings ({adapter.router}), so the router learns "
        "nothing from the loss."
    )


def reached(adapter: AdapterConfig, num_experts: int) -> bool:
    """Whether the gradient of some function of a new router's weights, on random inputs, is not zero."""
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(0)
        router = ROUTER_CLASSES[adapter.router](WIDTH, num_experts, adapter.params).double()
        weights = router(torch.randn(TOKENS, WIDTH, dtype=torch.float64)).weights
        value = (weights * torch.randn_like(weights)).sum()
        if not value.requires_grad:
            return False
        gradients = torch.autograd.grad(value, list(router.parameters()), allow_unused=True)
    return any(gradient is not None and bool((gradient.abs() > 1e-9).any()) for gradient in gradients)
