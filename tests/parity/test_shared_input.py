"""Projections that share an input compute their adapters together: the same numbers as each on its own."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import inject_adapter_in_model
from torch import Tensor, nn

from mole import MoleConfig
from mole.config import ROUTERS
from mole.mixture.fused_adapters import ConcatenatedLinear
from mole.mixture.shared_input import InputGroup

INPUTS = 12


class Attention(nn.Module):
    """Three projections of one input, of different widths, as with grouped queries."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(INPUTS, 8), nn.Linear(INPUTS, 4), nn.Linear(INPUTS, 4)

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        return torch.cat([self.q_proj(x), self.k_proj(x if other is None else other), self.v_proj(x)], -1)


def pair(router: str, dtype: torch.dtype = torch.float64, **settings: Any) -> tuple[Attention, Attention]:
    """An adapted model whose projections compute together, and its copy, where each computes on its own."""
    torch.manual_seed(0)
    values = {"num_experts": 4, "r": 2, "lora_dropout": 0.0, **settings}
    config = MoleConfig(router=router, target_modules=["q_proj", "k_proj", "v_proj"], **values)
    together = inject_adapter_in_model(config, Attention()).to(dtype)
    with torch.no_grad():
        for name, weight in together.named_parameters():
            if "mole_studio_" in name:
                weight.normal_(std=0.7)
    alone = copy.deepcopy(together)
    for layer in (alone.q_proj, alone.k_proj, alone.v_proj):
        layer.group = InputGroup([layer])
    return together, alone


def kept(model: Attention) -> bool:
    kept = model.q_proj.group._kept
    return bool(kept.outputs) or kept.call is not None


@pytest.mark.parametrize("router", ROUTERS)
def test_together_as_alone_with_gradients(router: str) -> None:
    together, alone = pair(router)
    x = torch.randn(2, 5, INPUTS, dtype=torch.float64, requires_grad=True)
    target = torch.randn(2, 5, 16, dtype=torch.float64)
    results = []
    for model in (together, alone):
        y = model(x)
        trained = [weight for name, weight in model.named_parameters() if "mole_studio_" in name]
        results.append([y, *torch.autograd.grad((y * target).sum(), [x, *trained])])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)
    assert not kept(together)


@pytest.mark.parametrize("learns", [(True, True, True), (True, False, False), (False, True, False)])
def test_the_one_product_has_the_gradients_of_its_parts_and_keeps_nothing_but_what_it_was_given(
    learns: tuple[bool, ...],
) -> None:
    shapes = (2, 3, INPUTS), (4, INPUTS), (1, INPUTS)
    given = [
        torch.randn(shape, dtype=torch.float64, requires_grad=own) for shape, own in zip(shapes, learns, strict=True)
    ]
    kept: list[Tensor] = []

    def product(x: Tensor, *weights: Tensor) -> Tensor:
        made: Tensor = ConcatenatedLinear.apply(x, None, torch.float64, *weights)
        return made

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        made = product(*given)
    torch.testing.assert_close(made, torch.cat([nn.functional.linear(given[0], weight) for weight in given[1:]], -1))
    assert torch.autograd.gradcheck(product, given)
    assert {tensor.data_ptr() for tensor in kept} == {tensor.data_ptr() for tensor in given}


@pytest.mark.parametrize("router", ROUTERS)
def test_in_bfloat16_the_routing_is_that_of_float32(router: str) -> None:
    together, alone = pair(router, torch.float32)
    for model in (together, alone):
        for layer in (model.q_proj, model.k_proj, model.v_proj):
            layer.base_layer.to(torch.bfloat16)
    x = torch.randn(3, INPUTS).bfloat16()
    with torch.no_grad():
        torch.testing.assert_close(together(x), alone(x), rtol=1e-2, atol=1e-2)


def test_a_sibling_called_with_another_tensor_computes_for_itself() -> None:
    together, alone = pair("dynmole")
    x, other = torch.randn(2, 3, INPUTS, dtype=torch.float64)
    torch.testing.assert_close(together(x, other), alone(x, other), rtol=0, atol=1e-12)
    equal = x.clone()
    torch.testing.assert_close(together(x, equal), alone(x, equal), rtol=0, atol=1e-12)


def test_an_input_that_was_written_into_meanwhile_is_read_again() -> None:
    together, alone = pair("topk")
    x = torch.randn(3, INPUTS, dtype=torch.float64)
    with torch.no_grad():
        together.q_proj(x)
        x += 1
        torch.testing.assert_close(together.k_proj(x), alone.k_proj(x), rtol=0, atol=1e-12)


def test_nothing_without_gradients_is_handed_to_a_call_that_needs_them() -> None:
    together, _ = pair("dynmole")
    x = torch.randn(3, INPUTS, dtype=torch.float64)
    with torch.no_grad():
        together.q_proj(x)
    assert together.k_proj(x).requires_grad


def test_inference_mode_and_a_sibling_that_is_never_called() -> None:
    together, alone = pair("adamole")
    with torch.inference_mode():
        x = torch.randn(3, INPUTS, dtype=torch.float64)
        together.q_proj(x)
        torch.testing.assert_close(together(x + 1), alone(x + 1), rtol=0, atol=1e-12)
    assert not kept(together)


def test_each_draws_from_one_dropout_of_the_shared_input() -> None:
    together, alone = pair("dense", lora_dropout=0.5)
    x = torch.randn(64, INPUTS, dtype=torch.float64)
    torch.manual_seed(1)
    first = together.train()(x)
    torch.manual_seed(1)
    torch.testing.assert_close(first[:, :8], alone.train().q_proj(x), rtol=0, atol=1e-12)
    assert not torch.equal(first, together(x))


def test_a_copy_has_a_group_of_its_own() -> None:
    together, _ = pair("dynmole")
    x = torch.randn(3, INPUTS, dtype=torch.float64)
    twin = copy.deepcopy(together)
    assert twin.q_proj.group is twin.v_proj.group is not together.q_proj.group
    assert twin.q_proj.group.layers[1] is twin.k_proj
    with torch.no_grad():
        twin.k_proj.mole_studio_B["default"].weight.zero_()
        assert not torch.equal(together(x), twin(x))


def test_other_settings_part_the_company() -> None:
    together, alone = pair("dynmole")
    for model in (together, alone):
        params = model.k_proj.routers["default"].params
        model.k_proj.routers["default"].params = type(params)(entropy_threshold=0.1)
        model.v_proj.routers["default"].allowed = torch.tensor([0, 2])
    x = torch.randn(9, INPUTS, dtype=torch.float64)
    torch.testing.assert_close(together(x), alone(x), rtol=0, atol=1e-12)
