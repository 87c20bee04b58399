"""What must hold whatever the code looks like: identities between methods, causality, padding, capacity."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from adapting import MAY_SUM_TO_LESS, ROUTED, TOKENS, adapt, layers_of, logits, padded
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from torch import Tensor, nn

from mole import MoleConfig, record_routing
from mole.config import ROUTERS

Make = Callable[..., Any]


def adapt64(model: Any, router: str = "dynmole", **values: Any) -> Any:
    """The adapted model in float64, so that what should be equal is equal to many digits."""
    return adapt(model, router, **values).double()


def routing_of(model: Any, tokens: Tensor, **inputs: Any) -> Tensor:
    """Routing weights `(tokens, projections, E)` of the first row."""
    with record_routing(model) as trace:
        logits(model, tokens, **inputs)
    return trace.weights


# ---------------------------------------------------------------------------------------------------------
# Identities between methods


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
@pytest.mark.parametrize("router", ROUTERS)
def test_with_one_expert_every_router_equals_pefts_own_lora(router: str, arch: str, tiny_model: Make) -> None:
    """One expert has p = 1: kept by every rule, and a / Σ a = 1."""
    ours = adapt64(tiny_model(arch), router, num_experts=1, r=4, lora_alpha=6)
    theirs = get_peft_model(tiny_model(arch), LoraConfig(r=4, lora_alpha=6, target_modules="all-linear"))
    theirs = theirs.double().eval()
    with torch.no_grad():
        for layer in layers_of(ours):
            lora = theirs.base_model.model.get_submodule(layer.name)
            lora.lora_A["default"].weight.copy_(layer.mole_studio_A["default"].weight)
            lora.lora_B["default"].weight.copy_(layer.mole_studio_B["default"].weight)
    assert (logits(ours) - logits(tiny_model(arch).double())).abs().max() > 1e-2
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=0, atol=1e-6)


@pytest.mark.parametrize("router", [name for name in ROUTED if name not in MAY_SUM_TO_LESS])
def test_identical_experts_make_every_router_that_sums_to_one_a_lora(router: str, tiny_model: Make) -> None:
    """Also with a threshold: by default it is below 1 / 4, so that at least one expert is selected."""
    model = adapt64(tiny_model(), router)
    single = adapt64(tiny_model(), "lora")
    with torch.no_grad():
        for layer, alone in zip(layers_of(model), layers_of(single), strict=True):
            down, up = alone.mole_studio_A["default"].weight, alone.mole_studio_B["default"].weight
            layer.mole_studio_A["default"].weight.copy_(down.repeat(4, 1))
            layer.mole_studio_B["default"].weight.copy_(up.repeat(1, 4))
    torch.testing.assert_close(logits(model), logits(single), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("router", "settings"),
    [
        ("dynmole", {"entropy_threshold": 0.0}),
        ("topk", {"top_k": 4}),
        ("topp", {"top_p": 1.0}),
        ("threshold", {"threshold": 0.0}),
        ("dynmole", {"entropy_threshold": 1.0, "keep_top_k": 4}),
    ],
    ids=["dynmole at threshold 0", "topk at k=E", "topp at 1", "threshold at 0", "dynmole keeping all"],
)
def test_a_router_that_leaves_nobody_out_equals_dense(router: str, settings: dict[str, Any], tiny_model: Make) -> None:
    torch.testing.assert_close(
        logits(adapt64(tiny_model(), router, **settings)), logits(adapt64(tiny_model(), "dense")), rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("router", ROUTED)
def test_the_order_of_the_experts_does_not_matter(router: str, tiny_model: Make) -> None:
    model, order = adapt64(tiny_model(), router), torch.tensor([2, 0, 3, 1])
    before = logits(model)
    with torch.no_grad():
        for layer in layers_of(model):
            down, up = layer.mole_studio_A["default"].weight, layer.mole_studio_B["default"].weight
            down.copy_(down.reshape(4, 2, -1)[order].flatten(0, 1).clone())
            up.copy_(up.reshape(-1, 4, 2)[:, order].flatten(1).clone())
            for gate in layer.mole_studio_gate["default"].parameters():
                gate.copy_(gate[order].clone())
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------
# Causality, batches, padding, cache


@pytest.mark.parametrize("router", ROUTED)
def test_appended_tokens_do_not_change_a_prompts_routing(router: str, tiny_model: Make) -> None:
    model = adapt64(tiny_model(), router)
    longer = torch.cat([TOKENS[:1], TOKENS[1:2]], dim=1)
    torch.testing.assert_close(routing_of(model, longer)[:8], routing_of(model, TOKENS[:1]), rtol=0, atol=1e-6)
    torch.testing.assert_close(logits(model, longer)[:, :8], logits(model, TOKENS[:1]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("router", ROUTED)
def test_the_order_and_company_of_rows_in_a_batch_change_nothing(router: str, tiny_model: Make) -> None:
    model = adapt64(tiny_model(), router)
    together, turned = logits(model), logits(model, TOKENS.flip(0)).flip(0)
    torch.testing.assert_close(turned, together, rtol=0, atol=1e-6)
    torch.testing.assert_close(logits(model, TOKENS[:1]), together[:1], rtol=0, atol=1e-6)


@pytest.mark.parametrize("router", ROUTED)
def test_the_side_of_the_padding_changes_nothing(router: str, tiny_model: Make) -> None:
    model, results = adapt64(tiny_model(), router), []
    for side in ("left", "right"):
        batch = padded(side)
        with torch.no_grad():
            results.append(model(**batch).logits[batch["attention_mask"].bool()])
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=1e-6)
    alone = torch.cat([logits(model, TOKENS[i : i + 1, :n])[0] for i, n in enumerate((8, 6, 3))])
    torch.testing.assert_close(results[0], alone, rtol=0, atol=1e-6)


@pytest.mark.parametrize("router", ROUTED)
def test_routing_is_the_same_with_and_without_a_cache(router: str, tiny_model: Make) -> None:
    model = adapt64(tiny_model(), router)
    at_once = routing_of(model, TOKENS[:1])
    with record_routing(model) as trace, torch.no_grad():
        past = model(input_ids=TOKENS[:1, :5], use_cache=True).past_key_values
        for place in range(5, 8):
            past = model(input_ids=TOKENS[:1, place : place + 1], past_key_values=past, use_cache=True).past_key_values
    assert len(trace) == 8
    torch.testing.assert_close(trace.weights, at_once, rtol=0, atol=1e-6)


@pytest.mark.parametrize("router", ["dynmole", "adamole"])
def test_recording_changes_nothing_of_what_the_model_computes(router: str, tiny_model: Make) -> None:
    model = adapt64(tiny_model(), router)
    before = logits(model)
    with record_routing(model):
        assert torch.equal(logits(model), before)


# ---------------------------------------------------------------------------------------------------------
# A mixture can do what one low-rank update cannot


@functools.cache
def fit(router: str, seed: int, **values: Any) -> tuple[float, int]:
    """Train an adapter on a teacher with another rank-1 update for each of 4 kinds of token.

    Returns the error it is left with, over tokens not trained on and relative to the teacher's update, and its size.
    """
    torch.manual_seed(seed)
    kinds, width = 4, 16
    centres = 3 * nn.functional.normalize(torch.randn(kinds, width), dim=-1)
    ups, downs = torch.randn(kinds, width, 1), torch.randn(kinds, 1, width) / width**0.5
    base = nn.Linear(width, width, bias=False)

    def tokens(count: int) -> tuple[Tensor, Tensor]:
        kind = torch.randint(kinds, (count,))
        x = centres[kind] + 0.5 * torch.randn(count, width)
        return x, (ups[kind] @ (downs[kind] @ x[..., None]))[..., 0]

    config = MoleConfig(router=router, target_modules=["0"], lora_dropout=0.0, **values)
    student = inject_adapter_in_model(config, nn.Sequential(base))
    layer = student[0]
    trainable = [weight for weight in student.parameters() if weight.requires_grad]
    optimizer = torch.optim.Adam(trainable, lr=2e-2)
    x, update = tokens(256)
    for _ in range(250):
        loss = (student(x) - layer.base_layer(x) - update).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    x, update = tokens(1024)
    with torch.no_grad():
        error = (student(x) - layer.base_layer(x) - update).square().mean() / update.square().mean()
    return error.item(), sum(weight.numel() for weight in trainable)


@pytest.mark.parametrize(
    ("router", "settings"), [("topk", {}), ("dynmole", {}), ("adamole", {}), ("sparsegen", {"lambda_hidden": 4})]
)
def test_an_input_dependent_teacher_is_fitted_by_a_mixture_and_not_by_a_lora_of_equal_size(
    router: str, settings: dict[str, Any]
) -> None:
    for seed in range(3):
        mixture, size = fit(router, seed, num_experts=4, r=1, lora_alpha=2, **settings)
        single, room = fit("lora", seed, r=9, lora_alpha=18)
        assert size <= room
        assert mixture < 0.1 and single > 0.4, (seed, mixture, single)
