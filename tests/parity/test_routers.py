"""Every router against the slow per-token formulas of `reference.py`, in float64, at the edges too."""

from __future__ import annotations

from typing import Any

import pytest
import reference
import torch
from adapting import MAY_SELECT_NONE, MAY_SUM_TO_LESS, ROUTED
from hypothesis import given, settings
from hypothesis import strategies as st
from routing_cases import (
    CASES,
    COUNTS,
    IDS,
    INPUTS,
    hold_against_reference,
    make,
    own_settings,
    random_inputs,
    settings_of,
    zero,
)

from mole.config import ROUTERS
from mole.mixture import routers

# ---------------------------------------------------------------------------------------------------------
# The whole set


def test_every_registered_router_has_a_class_a_reference_and_a_case_here() -> None:
    assert set(routers.ROUTER_CLASSES) == set(ROUTERS) == set(reference.ROUTERS) == {name for name, _ in CASES}


def test_the_fields_of_a_router_are_the_arguments_of_its_reference() -> None:
    for name, params in ROUTERS.items():
        arguments = reference.ROUTERS[name].__kwdefaults__ or reference.ROUTERS[name].__annotations__
        assert set(own_settings(params())) == set(arguments) - {"x", "weights", "return"}, name


@pytest.mark.parametrize("shape", [(8,), (2, 4)], ids=["tokens", "batch-seq"])
@pytest.mark.parametrize("experts", COUNTS)
@pytest.mark.parametrize(("name", "params"), CASES, **IDS)
def test_routing_equals_the_reference(name: str, params: dict[str, Any], experts: int, shape: tuple[int, ...]) -> None:
    router = make(name, experts, seed=experts, **params)
    hold_against_reference(router, random_inputs(*shape, INPUTS))


@pytest.mark.parametrize(("name", "params"), CASES, **IDS)
@pytest.mark.parametrize("gate", [1e-3, 30.0, 3000.0], ids=["near-uniform", "sharp", "one-hot"])
def test_nearly_uniform_and_nearly_one_hot_routers_equal_the_reference(
    name: str, params: dict[str, Any], gate: float
) -> None:
    hold_against_reference(make(name, 8, gate=gate, **params), random_inputs(12, INPUTS))


# ---------------------------------------------------------------------------------------------------------
# Edges of the probabilities


@pytest.mark.parametrize("experts", [2, 3, 8, 64])
@pytest.mark.parametrize("name", ROUTED)
def test_an_exactly_uniform_router_is_fully_unsure_and_treats_every_token_alike(name: str, experts: int) -> None:
    router = make(name, experts)
    with torch.no_grad():
        zero(router.gate)
    routing = hold_against_reference(router, random_inputs(5, INPUTS))
    assert torch.equal(routing.probs, torch.full_like(routing.probs, 1 / experts))
    torch.testing.assert_close(routing.entropy, torch.ones(5, dtype=torch.float64), rtol=0, atol=2e-2)
    if name not in MAY_SELECT_NONE:
        torch.testing.assert_close(routing.weights.sum(-1), torch.ones(5, dtype=torch.float64))


@pytest.mark.parametrize("name", ROUTED)
def test_a_one_hot_router_uses_its_expert_alone_and_has_no_entropy(name: str) -> None:
    router = make(name, 8)
    with torch.no_grad():
        zero(router.gate).weight[5] = 1e3
    routing = hold_against_reference(router, torch.ones(1, INPUTS, dtype=torch.float64))
    torch.testing.assert_close(routing.weights[0], torch.eye(8, dtype=torch.float64)[5])
    torch.testing.assert_close(routing.entropy, torch.zeros(1, dtype=torch.float64), rtol=0, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ROUTED)
def test_logits_of_ten_thousand_give_finite_weights_and_gradients(name: str, dtype: torch.dtype) -> None:
    router = make(name, 8, inputs=8).to(dtype)
    with torch.no_grad():
        router.gate.weight.copy_(torch.eye(8))
    signs = torch.tensor([[1.0, -1, 1, -1, -1, -1, -1, 1], [-1.0] * 8, [1.0] * 8, [1.0] + [-1] * 7], dtype=dtype)
    x = (1e4 * signs).requires_grad_()
    routing = router(x)
    (routing.weights.square().sum() + routing.entropy.sum()).backward()
    for tensor in (routing.weights, routing.probs, routing.entropy, x.grad, router.gate.weight.grad):
        assert torch.isfinite(tensor).all()
    assert (routing.weights >= 0).all() and (routing.weights <= 1 + 1e-6).all()


@pytest.mark.parametrize("logit", [1e2, 1e4, 1e6])
def test_sparsegen_sums_to_one_in_float32_however_large_the_logits(logit: float) -> None:
    """Its projection knows only differences of logits; a common offset must not eat the digits."""
    router = make("sparsegen", 8, inputs=8).float()
    with torch.no_grad():
        router.gate.weight.copy_(torch.eye(8))
        router.lambda_in.weight.zero_()
    x = logit + torch.arange(8) * torch.tensor([[0.125], [1.0]])
    torch.testing.assert_close(router(x).weights.sum(-1), torch.ones(2), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ROUTED)
def test_exact_ties_are_broken_the_same_way_every_time(name: str) -> None:
    router = make(name, 8)
    with torch.no_grad():
        for weight in router.gate.parameters():
            weight[1:4], weight[5:] = weight[0].clone(), weight[4].clone()
    x = random_inputs(16, INPUTS)
    first = hold_against_reference(router, x)
    for rows in (slice(0, 1), slice(3, 9), slice(0, 16)):
        torch.testing.assert_close(router(x[rows]).weights, first.weights[rows], rtol=0, atol=1e-14)


@pytest.mark.parametrize(("name", "params", "kept"), [("topk", {"top_k": 3}, 3), ("topp", {"top_p": 0.5}, 4)])
def test_among_equal_experts_as_many_are_kept_as_the_rule_says(name: str, params: dict[str, Any], kept: int) -> None:
    router = make(name, 8, **params)
    with torch.no_grad():
        router.gate.weight.zero_()
    weights = router(random_inputs(3, INPUTS)).weights
    assert (weights > 0).sum(-1).tolist() == [kept] * 3
    torch.testing.assert_close(weights.sum(-1), torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize("name", ROUTERS)
def test_one_expert_is_always_on_and_has_no_entropy(name: str) -> None:
    routing = make(name, 1)(random_inputs(2, 5, INPUTS))
    assert torch.equal(routing.weights, torch.ones(2, 5, 1, dtype=torch.float64))
    assert torch.equal(routing.probs, torch.ones(2, 5, 1, dtype=torch.float64))
    assert torch.equal(routing.entropy, torch.zeros(2, 5, dtype=torch.float64))


@pytest.mark.parametrize("name", ROUTERS)
def test_no_tokens_at_all_is_no_error(name: str) -> None:
    routing = make(name, 4)(torch.zeros(0, INPUTS, dtype=torch.float64))
    assert routing.weights.shape[0] == routing.entropy.shape[0] == 0


# ---------------------------------------------------------------------------------------------------------
# Numbers: dtype and gradients


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", ROUTERS)
def test_low_precision_inputs_are_routed_in_float32(name: str, dtype: torch.dtype) -> None:
    router = make(name, 8).float()
    x = random_inputs(40, INPUTS).to(dtype)
    routing = router(x)
    assert {routing.weights.dtype, routing.probs.dtype, routing.entropy.dtype, routing.logits.dtype} == {torch.float32}
    assert torch.equal(routing.weights, router(x.float()).weights)


@pytest.mark.parametrize("name", ROUTERS)
def test_autocast_does_not_lower_the_routers_precision(name: str) -> None:
    router, x = make(name, 8).float(), random_inputs(40, INPUTS).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = router(x).weights
    assert torch.equal(inside, router(x).weights)


@pytest.mark.parametrize(("name", "params"), CASES[1:], **IDS)
def test_gradients_are_those_of_the_formula(name: str, params: dict[str, Any]) -> None:
    """Against finite differences; a selection's own jumps are not part of the derivative, and not hit here."""
    router = make(name, 4, inputs=5, seed=3, **params)
    names, values = zip(*router.named_parameters(), strict=True)

    def of(x: torch.Tensor, *parameters: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        routing = torch.func.functional_call(router, dict(zip(names, parameters, strict=True)), (x,))
        return routing.weights, routing.entropy

    x = random_inputs(3, 5, seed=2).requires_grad_()
    assert torch.autograd.gradcheck(of, (x, *values), eps=1e-7, atol=1e-6)


@pytest.mark.parametrize("name", ROUTERS)
def test_the_parameters_of_a_router_are_those_of_its_linears(name: str) -> None:
    router = make(name, 8)
    assert {key.split(".")[0] for key, _ in router.named_parameters()} == set(router.linears)
    assert ("gate.weight" in router.state_dict()) == (name != "lora")


@pytest.mark.parametrize("name", ROUTED)
def test_a_gradient_reaches_every_parameter_of_the_router(name: str) -> None:
    router = make(name, 8)
    weights = router(random_inputs(32, INPUTS)).weights
    (weights * random_inputs(*weights.shape, seed=9)).sum().backward()
    for key, weight in router.named_parameters():
        assert weight.grad is not None and weight.grad.abs().max() > 0, key


# ---------------------------------------------------------------------------------------------------------
# Properties, for inputs that hypothesis chooses

every_router = pytest.mark.parametrize("name", ROUTED)  # a router among the drawn values would be left to chance
some = settings(max_examples=10, deadline=None, derandomize=True)


@every_router
@some
@given(st.data(), st.integers(2, 12), st.floats(0, 200), st.integers(0, 2**16))
def test_weights_are_never_negative_and_sum_to_one_or_less(
    name: str, data: st.DataObject, experts: int, gate: float, seed: int
) -> None:
    router = make(name, experts, gate=gate, seed=seed, **data.draw(settings_of(name)))
    routing = router(random_inputs(8, INPUTS, seed=seed))
    sums = routing.weights.sum(-1)
    assert (routing.weights >= 0).all() and (sums <= 1 + 1e-9).all()
    torch.testing.assert_close(routing.probs.sum(-1), torch.ones(8, dtype=torch.float64))
    assert (routing.entropy > -2e-3).all() and (routing.entropy < 1 + 2e-3).all()
    if name not in MAY_SUM_TO_LESS and getattr(router.params, "renormalized", True):
        selected = sums > 0 if name in MAY_SELECT_NONE else torch.ones(8, dtype=torch.bool)
        torch.testing.assert_close(sums[selected], torch.ones_like(sums[selected]))


@every_router
@some
@given(st.data(), st.integers(2, 12), st.integers(0, 2**16))
def test_renaming_the_experts_renames_the_weights(name: str, data: st.DataObject, experts: int, seed: int) -> None:
    router = make(name, experts, seed=seed, **data.draw(settings_of(name)))
    x = random_inputs(8, INPUTS, seed=seed)
    before = router(x)
    order = torch.randperm(experts)
    with torch.no_grad():
        for weight in router.gate.parameters():
            weight.copy_(weight[order].clone())
    after = router(x)
    torch.testing.assert_close(after.weights, before.weights[..., order], rtol=0, atol=1e-12)
    torch.testing.assert_close(after.entropy, before.entropy, rtol=0, atol=1e-12)


@every_router
@some
@given(st.data(), st.integers(1, 6), st.integers(0, 2**16))
def test_a_tokens_routing_depends_on_that_token_alone(name: str, data: st.DataObject, place: int, seed: int) -> None:
    router = make(name, 6, seed=seed, **data.draw(settings_of(name)))
    x = random_inputs(2, 8, INPUTS, seed=seed)
    others = random_inputs(2, 8, INPUTS, seed=seed + 1)
    others[:, place] = x[:, place]
    alone = router(x[1, place])
    for routing in (router(x), router(others)):
        torch.testing.assert_close(routing.weights[1, place], alone.weights, rtol=0, atol=1e-14)
        torch.testing.assert_close(routing.entropy[1, place], alone.entropy, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ROUTED)
def test_a_deferred_entropy_equals_the_one_computed_at_once(name: str) -> None:
    router, x = make(name, 6), random_inputs(2, 4, INPUTS)
    outputs = [getattr(router, part)(x) for part in router.input_linears]
    now, deferred = router.routing_of(*outputs), router.routing_of(*outputs, defer_entropy=True)
    assert (deferred.entropy is None) == (name != "dynmole")
    for several in ([deferred, deferred], [now, deferred], [now, now]):
        found = routers.entropies_of(several)
        assert torch.equal(found, torch.cat([now.entropy] * 2, -1))
