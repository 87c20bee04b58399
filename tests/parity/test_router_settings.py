"""The edges of every router's settings, what they are by default, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from routing_cases import INPUTS, from_probs, hold_against_reference, make, random_inputs

from mole.config.router_params import AdaMoLEParams, DynMoLEParams, TopKParams, TopPParams
from mole.core.errors import ConfigError, InputError
from mole.mixture.routers import build_router


def test_more_than_all_experts_asked_for_means_all() -> None:
    x = random_inputs(9, INPUTS)
    everything = make("dense", 3)(x).weights
    torch.testing.assert_close(make("topk", 3, top_k=99)(x).weights, everything)
    torch.testing.assert_close(make("dynmole", 3, keep_top_k=99, entropy_threshold=2.0)(x).weights, everything)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("params", [{"inclusive_top_p": False}, {"inclusive_top_p": True}])
def test_dynmole_with_top_p_1_keeps_all_experts_whatever_rounding_does_to_their_sum(
    dtype: torch.dtype, params: dict[str, Any]
) -> None:
    router = make("dynmole", 64, gate=0.5, top_p=1.0, keep_top_k=1, entropy_threshold=2.0, **params).to(dtype)
    routing = router(random_inputs(500, INPUTS).to(dtype))
    assert torch.equal(routing.weights, routing.probs)


def test_the_expert_that_crosses_top_p_is_dropped_by_dynmole_unless_inclusive() -> None:
    rule = {"entropy_threshold": 2.0, "top_p": 0.75, "keep_top_k": 1}
    exclusive = from_probs("dynmole", [0.1, 0.5, 0.2, 0.2], **rule).weights[0]
    inclusive = from_probs("dynmole", [0.1, 0.5, 0.2, 0.2], **rule, inclusive_top_p=True).weights[0]
    torch.testing.assert_close(exclusive, torch.tensor([0, 0.5, 0.2, 0], dtype=torch.float64))
    torch.testing.assert_close(inclusive, torch.tensor([0, 0.5, 0.2, 0.2], dtype=torch.float64))


def test_topp_keeps_the_expert_that_crosses_top_p() -> None:
    weights = from_probs("topp", [0.1, 0.5, 0.2, 0.2], top_p=0.6).weights[0]
    torch.testing.assert_close(weights, torch.tensor([0, 0.5, 0.2, 0], dtype=torch.float64) / 0.7)


def test_dynmole_does_not_renormalise_what_it_keeps() -> None:
    weights = from_probs("dynmole", [0.7, 0.2, 0.1], entropy_threshold=2.0, keep_top_k=2, top_p=0.5).weights[0]
    torch.testing.assert_close(weights, torch.tensor([0.7, 0.2, 0.0], dtype=torch.float64))


@pytest.mark.parametrize("index", [0.1, 0.5, 1.0, 1.1, 2.0])
@pytest.mark.parametrize("entropy_type", ["tsallis", "renyi"])
@pytest.mark.parametrize("entropy_threshold", [1.0, 1.5])
def test_an_entropy_threshold_of_1_or_more_switches_soft_routing_off(
    index: float, entropy_type: str, entropy_threshold: float
) -> None:
    """Even for a uniform router, whose entropy ε can lift a hair above 1."""
    router = make(
        "dynmole", 8, entropy_index=index, entropy_type=entropy_type, entropy_threshold=entropy_threshold, keep_top_k=1
    )
    with torch.no_grad():
        router.gate.weight.zero_()
    assert (router(random_inputs(4, INPUTS)).weights > 0).sum(-1).max() < 8


@pytest.mark.parametrize("index", [0.3, 1.0, 1.1, 2.0])
def test_an_entropy_threshold_of_0_makes_dynmole_dense(index: float) -> None:
    x = random_inputs(50, INPUTS)
    dynmole, dense = make("dynmole", 8, entropy_threshold=0.0, entropy_index=index), make("dense", 8)
    assert torch.equal(dynmole(x).weights, dense(x).weights)


def test_topk_of_all_experts_equals_dense() -> None:
    x = random_inputs(50, INPUTS)
    torch.testing.assert_close(make("topk", 8, top_k=8)(x).weights, make("dense", 8)(x).weights, rtol=0, atol=1e-15)


@pytest.mark.parametrize("entropy_type", ["tsallis", "renyi"])
def test_the_entropy_is_continuous_where_its_index_meets_shannons(entropy_type: str) -> None:
    """Up to what ε = 1e-5 adds, E · ε / |1 − E^(1−q)|, which has no limit at q = 1: hence the band around it."""
    x = random_inputs(40, INPUTS)
    shannon = make("dynmole", 8, entropy_type=entropy_type, entropy_index=1.0)(x).entropy
    for q in (0.9, 0.98, 0.999, 1 - 1e-4, 1 - 1e-12, 1 + 1e-12, 1 + 1e-4, 1.001, 1.02, 1.1):
        entropy = make("dynmole", 8, entropy_type=entropy_type, entropy_index=q)(x).entropy
        bound = 0 if abs(q - 1) < 1e-3 else 1.1 * 8 * 1e-5 / abs(1 - 8 ** (1 - q)) + abs(q - 1)
        assert (entropy - shannon).abs().max() <= bound, q


def test_entropy_at_index_2_is_the_gini_index_normalised() -> None:
    entropy = from_probs("dynmole", [0.5, 0.3, 0.2], entropy_index=2.0).entropy
    torch.testing.assert_close(entropy, torch.tensor([(1 - 0.38) / (2 / 3)], dtype=torch.float64), rtol=0, atol=1e-4)


def test_renyi_entropy_at_index_2_is_minus_log_of_the_collision_probability() -> None:
    entropy = from_probs("dynmole", [0.5, 0.3, 0.2], entropy_index=2.0, entropy_type="renyi").entropy.item()
    assert entropy == pytest.approx(-torch.tensor(0.38).log().item() / torch.tensor(3.0).log().item(), abs=1e-4)


def test_an_expert_exactly_at_the_threshold_takes_part() -> None:
    router = make("threshold", 4, threshold=0.25)
    with torch.no_grad():
        router.gate.weight.zero_()
    assert torch.equal(router(random_inputs(1, INPUTS)).weights, torch.full((1, 4), 0.25, dtype=torch.float64))


def test_no_expert_at_the_static_threshold_means_zero_weights_and_finite_gradients() -> None:
    router = make("threshold", 8, threshold=1.0)
    x = random_inputs(6, INPUTS).requires_grad_()
    weights = router(x).weights
    weights.sum().backward()
    assert torch.equal(weights, torch.zeros_like(weights))
    assert x.grad is not None and torch.isfinite(x.grad).all()


def test_adamole_with_nothing_selected_gives_zero_weights_and_finite_gradients() -> None:
    router = make("adamole", 8, max_threshold=1.0)
    with torch.no_grad():
        router.threshold.weight.zero_()
        router.threshold.bias.fill_(50.0)
    weights = router(random_inputs(6, INPUTS)).weights
    weights.square().sum().backward()
    assert torch.equal(weights, torch.zeros_like(weights))
    assert all(torch.isfinite(weight.grad).all() for weight in router.parameters())


def test_adamole_at_the_default_threshold_always_finds_an_expert() -> None:
    """τ < 1/E, and the largest probability is at least 1/E."""
    weights = make("adamole", 8, gate=0.1)(random_inputs(200, INPUTS)).weights
    torch.testing.assert_close(weights.sum(-1), torch.ones(200, dtype=torch.float64))


@pytest.mark.parametrize("bias", [-60.0, -2.5, 0.0, 60.0], ids=lambda b: f"bias{b:g}")
def test_sparsegen_from_dense_to_one_expert_as_lambda_goes_from_far_below_to_its_upper_bound(bias: float) -> None:
    router = make("sparsegen", 8)
    with torch.no_grad():
        router.lambda_in.weight.zero_()
        router.lambda_out.bias.fill_(bias)
    weights = hold_against_reference(router, random_inputs(64, INPUTS)).weights
    torch.testing.assert_close(weights.sum(-1), torch.ones(64, dtype=torch.float64))
    active = (weights > 0).sum(-1).double().mean().item()
    assert active > 7.9 if bias == -60 else active < 1.2 if bias == 60 else 1 < active < 8


def test_sparsegen_starts_with_the_papers_biases() -> None:
    router = build_router("sparsegen", INPUTS, 8)
    assert torch.equal(router.lambda_in.bias, torch.full_like(router.lambda_in.bias, -2.5))
    assert torch.equal(router.lambda_out.bias, torch.full_like(router.lambda_out.bias, -2.5))


# ---------------------------------------------------------------------------------------------------------
# What is refused


@pytest.mark.parametrize("experts", [0, -1, 2.5, True])
def test_an_impossible_number_of_experts_is_refused(experts: Any) -> None:
    with pytest.raises(ConfigError, match="num_experts"):
        build_router("topk", INPUTS, experts)


def test_an_unknown_router_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"nosuch.*dynmole"):
        build_router("nosuch", INPUTS, 4)


@pytest.mark.parametrize(
    ("name", "params"), [("topk", {"top_p": 0.5}), ("dense", {"threshold": 0.1}), ("topp", {"p": 1})]
)
def test_a_setting_the_router_does_not_have_is_refused_by_name(name: str, params: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(params))):
        build_router(name, INPUTS, 4, **params)


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("topp", {"top_p": 1.5}),
        ("topp", {"top_p": 0.0}),
        ("topk", {"top_k": 0}),
        ("threshold", {"threshold": -0.1}),
        ("adamole", {"max_threshold": 0.0}),
        ("dynmole", {"entropy_index": 0.0}),
        ("dynmole", {"entropy_index": 2.5}),
        ("dynmole", {"entropy_type": "max"}),
        ("dynmole", {"top_p": float("nan")}),
        ("sparsegen", {"lambda_hidden": 0}),
    ],
)
def test_a_setting_outside_its_bounds_is_refused_by_name(name: str, params: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(params))):
        build_router(name, INPUTS, 4, **params)


def test_the_defaults_are_the_papers() -> None:
    assert TopKParams().top_k == 2 and TopKParams().balance_loss_coef == 1e-3
    assert TopPParams().top_p == 0.8
    adamole = AdaMoLEParams()
    assert (adamole.max_threshold, adamole.balance_loss_coef, adamole.balance_on_margin) == (None, 1e-3, False)
    dynmole = DynMoLEParams()
    assert (dynmole.entropy_index, dynmole.entropy_threshold, dynmole.top_p, dynmole.keep_top_k) == (1.1, 0.9, 0.75, 2)
    assert (dynmole.entropy_loss_coef, dynmole.balance_loss_coef, dynmole.inclusive_top_p) == (1e-2, 1e-3, False)
