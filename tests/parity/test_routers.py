"""Every router against the slow per-token formulas of `reference.py`, in float64, at the edges too."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mole import config, routers
from mole.config import ROUTERS, RouterParams
from mole.errors import ConfigError, InputError
from mole.routers import Router, Routing, build_router

INPUTS = 16
COUNTS = [1, 2, 3, 8, 64]
CASES: list[tuple[str, dict[str, Any]]] = [
    ("lora", {}),
    ("dense", {}),
    *[("topk", {"top_k": k}) for k in (1, 2, 5)],
    *[("topp", {"top_p": p}) for p in (1e-6, 0.5, 0.8, 1.0)],
    *[("threshold", {"threshold": t}) for t in (0.0, 0.05, 0.125, 0.4, 1.0)],
    *[("adamole", {"max_threshold": t}) for t in (None, 0.02, 0.3, 1.0)],
    ("dynmole", {}),
    *[("dynmole", {"entropy_index": q}) for q in (0.3, 0.9, 1.0, 1.5, 2.0)],
    *[("dynmole", {"entropy_type": "renyi", "entropy_index": q}) for q in (0.3, 1.0, 1.1, 2.0)],
    *[("dynmole", {"entropy_threshold": t}) for t in (0.0, 0.5, 1.0, 3.0)],
    *[("dynmole", {"entropy_threshold": 0.5, "inclusive_top_p": i, "top_p": p}) for i in (0, 1) for p in (0.3, 0.75, 1.0)],
    *[("dynmole", {"entropy_threshold": 0.7, "keep_top_k": k}) for k in (1, 3, 99)],
    ("sparsegen", {}),
    ("sparsegen", {"lambda_hidden": 3}),
]
SUMS_TO_ONE = ("lora", "dense", "topk", "topp", "adamole", "sparsegen")
"""The methods whose weights sum to 1, where at least one expert is selected."""
ROUTED = [name for name in ROUTERS if name != "lora"]


def make(name: str, experts: int, *, gate: float = 2.0, seed: int = 0, inputs: int = INPUTS, **params: Any) -> Router[Any]:
    """A float64 router with random weights; `gate` is the spread of its logits for unit-variance inputs."""
    torch.manual_seed(seed)
    flags = {key: bool(value) if key == "inclusive_top_p" else value for key, value in params.items()}
    router = build_router(name, inputs, 1 if name == "lora" else experts, **flags).double()
    with torch.no_grad():
        for key, weight in router.named_parameters():
            weight.normal_(std=(gate if key.startswith("gate") else 1.0) * inputs**-0.5)
    return router


def random_inputs(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def own_settings(params: RouterParams) -> dict[str, Any]:
    """The settings that matter for the rule itself: not the losses' weights, not the width of a network."""
    values = dataclasses.asdict(params)
    return {k: v for k, v in values.items() if not k.endswith("_coef") and k not in ("balance_on_margin", "lambda_hidden")}


def expected(router: Router[Any], x: torch.Tensor) -> Routing:
    """What `reference.py` says for inputs `(…, in)`, token by token."""
    weights = {key: value.tolist() for key, value in router.state_dict().items()}
    rule = reference.ROUTERS[router.params.name]
    tokens = [rule(row, weights, **own_settings(router.params)) for row in x.reshape(-1, x.shape[-1]).tolist()]
    columns = [torch.tensor(column, dtype=torch.float64) for column in zip(*tokens, strict=True)]
    return Routing(*(column.reshape(*x.shape[:-1], *column.shape[1:]) for column in columns), logits=torch.empty(0))


def hold_against_reference(router: Router[Any], x: torch.Tensor) -> Routing:
    got, want = router(x), expected(router, x)
    for part in ("weights", "probs", "entropy"):
        actual, should = getattr(got, part), getattr(want, part)
        assert actual.shape == should.shape, part
        torch.testing.assert_close(actual, should, rtol=0, atol=1e-12, msg=lambda text, part=part: f"{part}: {text}")
    return got


def from_probs(name: str, probs: list[float], **params: Any) -> Routing:
    """The routing of a single token whose router probabilities are as given."""
    router = make(name, len(probs), inputs=len(probs), **params)
    with torch.no_grad():
        router.gate.weight.copy_(torch.diag(torch.tensor(probs, dtype=torch.float64).log()))
    return router(torch.ones(1, len(probs), dtype=torch.float64))


# ---------------------------------------------------------------------------------------------------------
# The whole set


def test_every_registered_router_has_a_class_a_reference_and_a_case_here() -> None:
    assert set(routers.ROUTERS) == set(ROUTERS) == set(reference.ROUTERS) == {name for name, _ in CASES}


def test_the_fields_of_a_router_are_the_arguments_of_its_reference() -> None:
    for name, params in ROUTERS.items():
        arguments = reference.ROUTERS[name].__kwdefaults__ or reference.ROUTERS[name].__annotations__
        assert set(own_settings(params())) == set(arguments) - {"x", "weights", "return"}, name


@pytest.mark.parametrize("shape", [(24,), (2, 7)], ids=["tokens", "batch-seq"])
@pytest.mark.parametrize("experts", COUNTS)
@pytest.mark.parametrize(("name", "params"), CASES, ids=lambda v: v if isinstance(v, str) else "-".join(map(str, v.values())))
def test_routing_equals_the_reference(name: str, params: dict[str, Any], experts: int, shape: tuple[int, ...]) -> None:
    router = make(name, experts, seed=experts, **params)
    hold_against_reference(router, random_inputs(*shape, INPUTS))


@pytest.mark.parametrize(("name", "params"), CASES, ids=lambda v: v if isinstance(v, str) else "-".join(map(str, v.values())))
@pytest.mark.parametrize("gate", [1e-3, 30.0, 3000.0], ids=["near-uniform", "sharp", "one-hot"])
def test_nearly_uniform_and_nearly_one_hot_routers_equal_the_reference(
    name: str, params: dict[str, Any], gate: float
) -> None:
    hold_against_reference(make(name, 8, gate=gate, **params), random_inputs(24, INPUTS))


# ---------------------------------------------------------------------------------------------------------
# Edges of the probabilities


@pytest.mark.parametrize("experts", [2, 3, 8, 64])
@pytest.mark.parametrize("name", ROUTED)
def test_an_exactly_uniform_router_is_fully_unsure_and_treats_every_token_alike(name: str, experts: int) -> None:
    router = make(name, experts)
    with torch.no_grad():
        router.gate.weight.zero_()
    routing = hold_against_reference(router, random_inputs(5, INPUTS))
    assert torch.equal(routing.probs, torch.full_like(routing.probs, 1 / experts))
    torch.testing.assert_close(routing.entropy, torch.ones(5, dtype=torch.float64), rtol=0, atol=2e-2)
    if name not in ("adamole", "threshold"):
        torch.testing.assert_close(routing.weights.sum(-1), torch.ones(5, dtype=torch.float64))


@pytest.mark.parametrize("name", ROUTED)
def test_a_one_hot_router_uses_its_expert_alone_and_has_no_entropy(name: str) -> None:
    router = make(name, 8)
    with torch.no_grad():
        router.gate.weight.zero_()[5] = 1e3
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
        router.gate.weight[1:4] = router.gate.weight[0]
        router.gate.weight[5:] = router.gate.weight[4]
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
# Edges of the settings


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


@pytest.mark.parametrize(("name", "params"), CASES[1:], ids=lambda v: v if isinstance(v, str) else "-".join(map(str, v.values())))
def test_gradients_are_those_of_the_formula(name: str, params: dict[str, Any]) -> None:
    """Against finite differences; a selection's own jumps are not part of the derivative, and not hit here."""
    router = make(name, 4, inputs=5, seed=3, **params)
    names, values = zip(*router.named_parameters(), strict=True)

    def of(x: torch.Tensor, *parameters: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        routing = torch.func.functional_call(router, dict(zip(names, parameters, strict=True)), (x,))
        return routing.weights, routing.entropy

    x = random_inputs(3, 5, seed=2).requires_grad_()
    assert torch.autograd.gradcheck(of, (x, *values), eps=1e-7, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "learning"),
    [
        ("adamole", {"gate.weight", "threshold.weight", "threshold.bias"}),
        ("sparsegen", {"gate.weight", *(f"lambda_{end}.{kind}" for end in ("in", "out") for kind in ("weight", "bias"))}),
        *[(name, {"gate.weight"}) for name in ("dense", "topk", "topp", "threshold", "dynmole")],
        ("lora", set()),
    ],
)
def test_a_gradient_reaches_every_parameter_of_the_router(name: str, learning: set[str]) -> None:
    router = make(name, 8)
    assert {key for key, _ in router.named_parameters()} == learning
    weights = router(random_inputs(32, INPUTS)).weights
    if learning:
        (weights * random_inputs(*weights.shape, seed=9)).sum().backward()
    for key, weight in router.named_parameters():
        assert weight.grad is not None and weight.grad.abs().max() > 0, key


# ---------------------------------------------------------------------------------------------------------
# Properties, for inputs that hypothesis chooses

a_case = st.sampled_from([case for case in CASES if case[0] != "lora"])
many = settings(max_examples=60, deadline=None, derandomize=True)


@many
@given(a_case, st.integers(2, 12), st.floats(0, 200), st.integers(0, 2**16))
def test_weights_are_never_negative_and_sum_to_one_or_less(
    case: tuple[str, dict[str, Any]], experts: int, gate: float, seed: int
) -> None:
    name, params = case
    routing = make(name, experts, gate=gate, seed=seed, **params)(random_inputs(8, INPUTS, seed=seed))
    sums = routing.weights.sum(-1)
    assert (routing.weights >= 0).all() and (sums <= 1 + 1e-9).all()
    torch.testing.assert_close(routing.probs.sum(-1), torch.ones(8, dtype=torch.float64))
    assert (routing.entropy > -2e-3).all() and (routing.entropy < 1 + 2e-3).all()
    if name in SUMS_TO_ONE or name == "threshold":
        selected = sums > 0 if name in ("adamole", "threshold") else torch.ones(8, dtype=torch.bool)
        torch.testing.assert_close(sums[selected], torch.ones_like(sums[selected]))


@many
@given(a_case, st.integers(2, 12), st.integers(0, 2**16))
def test_renaming_the_experts_renames_the_weights(case: tuple[str, dict[str, Any]], experts: int, seed: int) -> None:
    name, params = case
    router, x = make(name, experts, seed=seed, **params), random_inputs(8, INPUTS, seed=seed)
    before = router(x)
    order = torch.randperm(experts)
    with torch.no_grad():
        router.gate.weight.copy_(router.gate.weight[order].clone())
    after = router(x)
    torch.testing.assert_close(after.weights, before.weights[..., order], rtol=0, atol=1e-12)
    torch.testing.assert_close(after.entropy, before.entropy, rtol=0, atol=1e-12)


@many
@given(a_case, st.integers(1, 6), st.integers(0, 2**16))
def test_a_tokens_routing_depends_on_that_token_alone(case: tuple[str, dict[str, Any]], place: int, seed: int) -> None:
    name, params = case
    router, x = make(name, 6, seed=seed, **params), random_inputs(2, 8, INPUTS, seed=seed)
    others = random_inputs(2, 8, INPUTS, seed=seed + 1)
    others[:, place] = x[:, place]
    alone = router(x[1, place])
    for routing in (router(x), router(others)):
        torch.testing.assert_close(routing.weights[1, place], alone.weights, rtol=0, atol=1e-14)
        torch.testing.assert_close(routing.entropy[1, place], alone.entropy, rtol=0, atol=1e-12)


# ---------------------------------------------------------------------------------------------------------
# What is refused


@pytest.mark.parametrize("experts", [0, -1, 2.5, True])
def test_an_impossible_number_of_experts_is_refused(experts: Any) -> None:
    with pytest.raises(ConfigError, match="num_experts"):
        build_router("topk", INPUTS, experts)


def test_an_unknown_router_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"nosuch.*dynmole"):
        build_router("nosuch", INPUTS, 4)


@pytest.mark.parametrize(("name", "params"), [("topk", {"top_p": 0.5}), ("dense", {"threshold": 0.1}), ("topp", {"p": 1})])
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
    assert config.TopKParams().top_k == 2 and config.TopKParams().balance_loss_coef == 1e-3
    assert config.TopPParams().top_p == 0.8
    adamole = config.AdaMoLEParams()
    assert (adamole.max_threshold, adamole.balance_loss_coef, adamole.balance_on_margin) == (None, 1e-3, False)
    dynmole = config.DynMoLEParams()
    assert (dynmole.entropy_index, dynmole.entropy_threshold, dynmole.top_p, dynmole.keep_top_k) == (1.1, 0.9, 0.75, 2)
    assert (dynmole.entropy_loss_coef, dynmole.balance_loss_coef, dynmole.inclusive_top_p) == (1e-2, 1e-3, False)
