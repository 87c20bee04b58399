"""The adapted projection, one fused product, against a loop over tokens and experts in float64."""

from __future__ import annotations

from typing import Any

import pytest
import reference
import torch
from peft import inject_adapter_in_model
from routing_cases import expected
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from mole import MoleConfig
from mole.config import ROUTERS
from mole.mixture.experts import add_experts, dropout
from mole.mixture.routers.dense import DenseRouter

INPUTS, OUTPUTS, EXPERTS, RANK = 10, 7, 4, 3
ROUTED = [name for name in ROUTERS if name != "lora"]
BASES = {"linear": lambda: nn.Linear(INPUTS, OUTPUTS), "conv1d": lambda: Conv1D(OUTPUTS, INPUTS)}


class Net(nn.Module):
    """A model of a single projection."""

    def __init__(self, proj: nn.Module) -> None:
        super().__init__()
        self.proj = proj

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


def adapted(router: str, base: str = "linear", *, fresh: bool = False, **settings: Any) -> tuple[Net, nn.Module]:
    """A float64 model with an adapter that does something, and its adapted projection."""
    torch.manual_seed(0)
    values = {"num_experts": EXPERTS, "r": RANK, "lora_alpha": 5, "lora_dropout": 0.0, **settings}
    config = MoleConfig(router=router, target_modules=["proj"], **values)
    net = inject_adapter_in_model(config, Net(BASES[base]())).double()
    assert isinstance(net, Net)
    if not fresh:
        with torch.no_grad():
            for name, weight in net.named_parameters():
                if "mole_studio_" in name:
                    weight.normal_(std=0.7)
    return net, net.proj


def experts_of(layer: Any) -> tuple[Tensor, Tensor]:
    """The experts one by one: A `(E, r, in)` and B `(E, out, r)`."""
    down, up = layer.mole_studio_A["default"].weight, layer.mole_studio_B["default"].weight
    experts = layer.num_experts["default"]
    return down.reshape(experts, RANK, INPUTS), up.reshape(OUTPUTS, experts, RANK).transpose(0, 1)


def slow_forward(layer: Any, x: Tensor, weights: Tensor, experts: tuple[Tensor, Tensor]) -> Tensor:
    """base(x) + s · Σ_i w_i · B_i A_i x with a loop over experts, differentiable."""
    y = layer.base_layer(x)
    for i, (a, b) in enumerate(zip(*experts, strict=True)):
        y = y + 5 / RANK * weights[..., i : i + 1] * ((x @ a.T) @ b.T)
    return y


def test_a_gate_may_have_a_bias_which_starts_at_0(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DenseRouter, "gate_bias", True)
    assert not adapted("dense", fresh=True)[1].mole_studio_gate["default"].bias.any()
    net, layer = adapted("dense")
    x, gate = torch.randn(6, INPUTS, dtype=torch.float64), layer.mole_studio_gate["default"]
    weights = (x @ gate.weight.T + gate.bias).softmax(-1)
    torch.testing.assert_close(net(x), slow_forward(layer, x, weights, experts_of(layer)), rtol=0, atol=1e-10)
    torch.testing.assert_close(layer.routers["default"](x).weights, weights, rtol=0, atol=1e-12)
    assert gate.bias.abs().min() > 0 and "proj.mole_studio_gate.default.bias" in net.state_dict()


@pytest.mark.parametrize("shape", [(6,), (2, 5)], ids=["tokens", "batch-seq"])
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("router", ROUTERS)
def test_the_layer_equals_a_loop_over_tokens_and_experts(router: str, base: str, shape: tuple[int, ...]) -> None:
    net, layer = adapted(router, base)
    x = torch.randn(*shape, INPUTS, dtype=torch.float64)
    rows, base_rows = x.reshape(-1, INPUTS).tolist(), layer.base_layer(x).reshape(-1, OUTPUTS).tolist()
    weights = expected(layer.routers["default"], x).weights.reshape(len(rows), -1).tolist()
    a, b = (stack.tolist() for stack in experts_of(layer))
    want = [reference.adapted(y, row, w, a, b, 5 / RANK) for y, row, w in zip(base_rows, rows, weights, strict=True)]
    got = net(x).reshape(-1, OUTPUTS)
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64), rtol=0, atol=1e-10)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("router", ROUTERS)
def test_gradients_of_inputs_experts_and_router_equal_those_of_the_loop(router: str, base: str) -> None:
    net, layer = adapted(router, base)
    inputs = torch.randn(2, 6, INPUTS, dtype=torch.float64, requires_grad=True)
    wanted = {name: weight for name, weight in net.named_parameters() if "mole_studio_" in name}
    target = torch.randn(2, 6, OUTPUTS, dtype=torch.float64)
    tensors = [inputs, *wanted.values()]
    got = torch.autograd.grad((net(inputs) * target).sum(), tensors)
    routing = layer.routers["default"](inputs)
    slow = slow_forward(layer, inputs, routing.weights, experts_of(layer))
    want = torch.autograd.grad((slow * target).sum(), tensors)
    for name, actual, should in zip(["x", *wanted], got, want, strict=True):
        assert actual.abs().max() > 0, name
        torch.testing.assert_close(actual, should, rtol=0, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}")


def test_the_frozen_base_gets_no_gradient() -> None:
    net, layer = adapted("dynmole")
    assert not any(weight.requires_grad for weight in layer.base_layer.parameters())
    net(torch.randn(3, INPUTS, dtype=torch.float64)).sum().backward()
    assert all(weight.grad is None for weight in layer.base_layer.parameters())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("router", ROUTERS)
def test_a_fresh_adapter_changes_nothing_bit_for_bit(
    router: str, base: str, training: bool, dtype: torch.dtype
) -> None:
    net, layer = adapted(router, base, fresh=True, lora_dropout=0.3)
    layer.base_layer.to(dtype)
    net.train(training)
    x = torch.randn(5, INPUTS).to(dtype)
    assert torch.equal(net(x), layer.base_layer(x))
    assert net(x).dtype == dtype


def test_the_start_is_loras_kaiming_uniform_a_and_zero_b() -> None:
    _, layer = adapted("topk", fresh=True, num_experts=64)
    down, up = layer.mole_studio_A["default"].weight, layer.mole_studio_B["default"].weight
    bound = INPUTS**-0.5  # Kaiming-uniform with a = √5 is U(−1/√in, 1/√in)
    assert down.abs().max() <= bound and down.abs().max() > 0.99 * bound
    assert down.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)
    assert not up.any()


def test_dropout_acts_on_the_experts_input_in_training_only_and_never_on_the_router() -> None:
    net, layer = adapted("dense", lora_dropout=0.5)
    x = torch.randn(4, INPUTS, dtype=torch.float64)
    torch.manual_seed(3)
    noisy = net.train()(x)
    torch.manual_seed(3)
    kept = dropout(x, 0.5, training=True)
    weights = layer.routers["default"](x).weights
    update = slow_forward(layer, kept, weights, experts_of(layer)) - layer.base_layer(kept)
    torch.testing.assert_close(noisy, layer.base_layer(x) + update)
    assert torch.equal(net.eval()(x), net.eval()(x))
    assert not torch.equal(noisy, net.eval()(x))


def test_nothing_selected_leaves_the_base_output() -> None:
    net, layer = adapted("threshold", threshold=1.0)
    x = torch.randn(4, INPUTS, dtype=torch.float64)
    assert torch.equal(net(x), layer.base_layer(x))


@pytest.mark.parametrize("in_place", [False, True], ids=["formula", "in-place"])
def test_the_fused_product_has_the_gradients_of_its_formula(in_place: bool) -> None:
    torch.manual_seed(0)
    shapes = [(2, 3, OUTPUTS), (2, 3, EXPERTS * RANK), (2, 3, EXPERTS), (OUTPUTS, EXPERTS * RANK)]
    tensors = [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    # a leaf cannot be written into: the base's output is the result of something
    assert torch.autograd.gradcheck(lambda base, *t: add_experts(1 * base, *t, in_place=in_place), tensors)


def test_a_half_precision_base_keeps_its_output_dtype_and_the_router_its_float32() -> None:
    net, layer = adapted("dynmole", fresh=True)
    net.float()
    layer.base_layer.to(torch.bfloat16)
    x = torch.randn(3, INPUTS, dtype=torch.bfloat16)
    assert net(x).dtype == torch.bfloat16
    assert layer.routers["default"](x).weights.dtype == torch.float32
