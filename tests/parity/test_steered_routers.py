"""A steered router is the method's formula over the experts that are left, and nothing is left behind."""

from __future__ import annotations

from typing import Any

import pytest
import reference
import torch
from adapting import ROUTED
from hypothesis import given, settings
from hypothesis import strategies as st
from routing_cases import CASES, IDS, INPUTS, make, own_settings, random_inputs, settings_of

from mole.config import ROUTERS
from mole.mixture.routers import Router
from mole.mixture.steering import Steering, steerable

MIXTURES = [case for case in CASES if case[0] != "lora"]


def restricted(router: Router[Any], x: torch.Tensor, left: list[int]) -> tuple[list[Any], list[Any], list[float]]:
    """The slow formula for a router that has never had any but the experts `left`; zeros put in for the others."""
    weights = {key: value.tolist() for key, value in router.state_dict().items()}
    for name, _ in router.gate.named_parameters(prefix="gate"):
        weights[name] = [weights[name][expert] for expert in left]
    values = own_settings(router.params)
    if "max_threshold" in values and values["max_threshold"] is None:
        values["max_threshold"] = 1 / router.num_experts  # what it was trained with
    tokens = [reference.ROUTERS[router.params.name](row, weights, **values) for row in x.tolist()]

    def among_all(part: list[float]) -> list[float]:
        whole = [0.0] * router.num_experts
        for expert, value in zip(left, part, strict=True):
            whole[expert] = value
        return whole

    return [among_all(t.weights) for t in tokens], [among_all(t.probs) for t in tokens], [t.entropy for t in tokens]


def hold_against_restricted(router: Router[Any], x: torch.Tensor, left: list[int]) -> None:
    router.allowed = torch.tensor(left)
    got = router(x)
    for actual, should in zip((got.weights, got.probs, got.entropy), restricted(router, x, left), strict=True):
        expected = torch.tensor(should, dtype=torch.float64)
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("left", [[0], [5], [1, 4, 7], [0, 1, 2, 4, 5, 6, 7]], ids=str)
@pytest.mark.parametrize(("name", "params"), MIXTURES, **IDS)
def test_a_muted_expert_is_as_if_it_were_not_there(name: str, params: dict[str, Any], left: list[int]) -> None:
    hold_against_restricted(make(name, 8, **params), random_inputs(12, INPUTS), left)


@pytest.mark.parametrize("name", ROUTED)
@settings(max_examples=10, deadline=None, derandomize=True)
@given(st.data(), st.sets(st.integers(0, 11)), st.sets(st.integers(0, 11)), st.integers(2, 9), st.integers(0, 2**16))
def test_any_choice_of_muted_and_pinned_experts(
    name: str, data: st.DataObject, muted: set[int], pinned: set[int], experts: int, seed: int
) -> None:
    steering = Steering(muted=frozenset(muted - pinned), pinned=frozenset(pinned))
    left = steering.allowed_experts(experts)
    assert set(left) == (({*pinned} & {*range(experts)}) or {*range(experts)}) - (muted - pinned)
    router = make(name, experts, seed=seed, **data.draw(settings_of(name)))
    if left:
        hold_against_restricted(router, random_inputs(6, INPUTS, seed=seed), left)


@pytest.mark.parametrize("name", ROUTERS)
def test_with_no_expert_left_nothing_is_added_and_nothing_breaks(name: str) -> None:
    router = make(name, 1 if name == "lora" else 4)
    router.allowed = torch.tensor([], dtype=torch.long)
    routing = router(random_inputs(2, 5, INPUTS))
    assert routing.weights.shape == routing.probs.shape == (2, 5, router.num_experts)
    assert not routing.weights.any() and not routing.entropy.any()


@pytest.mark.parametrize("name", ROUTERS)
def test_all_experts_allowed_is_no_restriction(name: str) -> None:
    router, x = make(name, 1 if name == "lora" else 8), random_inputs(20, INPUTS)
    trained = router(x)
    router.allowed = torch.arange(router.num_experts)
    for part, same in zip(trained, router(x), strict=True):
        assert part is same is None or torch.equal(part, same)


def test_every_setting_that_can_be_steered_matters_to_its_formula() -> None:
    for name, params in ROUTERS.items():
        assert set(steerable(name)) <= set(own_settings(params())), name
