"""Settings with which the loss cannot reach a router are told before training; those with which it can are not."""

from __future__ import annotations

from typing import Any

import pytest

from mole.config import ROUTERS, AdapterConfig
from mole.mixture.routers.reach import unreached_notice

ROUTED = [name for name in ROUTERS if name != "lora"]


def notice(**settings: Any) -> str | None:
    return unreached_notice(AdapterConfig.from_flat(settings))


@pytest.mark.parametrize("router", ROUTED)
def test_the_loss_reaches_every_router_as_it_is_by_default_but_not_with_one_expert(router: str) -> None:
    assert notice(router=router, num_experts=4) is None
    assert notice(router=router, num_experts=[1, 4]) is None
    told = "adapter.num_experts is 1: there is nothing to route, so the router learns nothing."
    assert notice(router=router, num_experts=1) == told


def test_one_expert_whose_weight_is_always_one_is_told() -> None:
    assert notice(router="topk", num_experts=4, top_k=1) is None  # its weight is its probability, as in Switch
    told = notice(router="topk", num_experts=4, top_k=1, renormalize=True)
    assert told is not None and told.endswith("(topk), so the router learns nothing from the loss.")
    assert notice(router="threshold", num_experts=4, threshold=1.0) is not None  # no token uses an expert


def test_plain_lora_has_no_router() -> None:
    assert notice(router="lora", num_experts=1) is None
