"""Second derivatives, and the transforms of torch.func, are those of the formulas; nothing is silently left out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from adapting import ROUTED, TOKENS, adapt, shake
from peft import get_peft_model
from torch import Tensor, nn
from torch.func import functional_call

from mole import MoleConfig
from mole.mixture import experts, fused_adapters, losses

Make = Callable[..., Any]


def adapted(model: Any, router: str) -> Any:
    """The model in training mode and float64, with an attention that can be differentiated twice."""
    model.set_attn_implementation("eager")
    return adapt(model, router).double().train()


def trained(model: Any) -> dict[str, Tensor]:
    """The adapter's weights by name."""
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def plain_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on without the functions whose backward passes are written by hand."""
    for module in (experts, fused_adapters, losses):
        monkeypatch.setattr(module, "is_transformed", lambda: True)


def loss_of(model: Any) -> Tensor:
    """A loss of the logits in float64; the model's own is in float32."""
    scores = model(input_ids=TOKENS).logits[:, :-1].flatten(0, 1)
    return nn.functional.cross_entropy(scores, TOKENS[:, 1:].flatten())


def second_derivatives(model: Any, vector: list[Tensor], allow_unused: bool) -> list[Tensor]:
    """The Hessian of the model's loss times a vector, by differentiating twice."""
    weights = list(trained(model).values())
    first = torch.autograd.grad(loss_of(model), weights, create_graph=True)
    along = sum((grad * direction).sum() for grad, direction in zip(first, vector, strict=True))
    second = torch.autograd.grad(along, weights, allow_unused=allow_unused)
    return [torch.zeros_like(weight) if grad is None else grad for grad, weight in zip(second, weights, strict=True)]


@pytest.mark.parametrize("allow_unused", [False, True])
@pytest.mark.parametrize("router", [*ROUTED, "lora"])
def test_hessian_vector_products_are_those_of_plain_operations(
    router: str, allow_unused: bool, tiny_model: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapted(tiny_model(), router)
    generator = torch.Generator().manual_seed(0)
    vector = [torch.randn(weight.shape, generator=generator, dtype=torch.double) for weight in trained(model).values()]
    ours = second_derivatives(model, vector, allow_unused)
    plain_operations(monkeypatch)
    for name, one, other in zip(trained(model), ours, second_derivatives(model, vector, allow_unused), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}")
    assert max(grad.abs().max() for grad in ours) > 1e-3


def test_a_hessian_vector_product_is_the_change_of_the_gradient(tiny_model: Make) -> None:
    """By finite differences, which share nothing with autograd: `dense` is smooth, and GPT-2 computes in float64
    throughout."""
    model = adapted(tiny_model("gpt2"), "dense")
    generator = torch.Generator().manual_seed(0)
    weights = list(trained(model).values())
    vector = [torch.randn(weight.shape, generator=generator, dtype=torch.double) for weight in weights]
    ours, grads, step = second_derivatives(model, vector, allow_unused=True), [], 1e-5
    for sign in (1, -2):
        with torch.no_grad():
            for weight, direction in zip(weights, vector, strict=True):
                weight += sign * step * direction
        grads.append(torch.autograd.grad(loss_of(model), weights))
    for one, after, before in zip(ours, *grads, strict=True):
        torch.testing.assert_close(one, (after - before) / (2 * step), rtol=1e-4, atol=1e-5)


def test_a_gradient_penalty_trains_the_adapter(tiny_model: Make) -> None:
    model = adapted(tiny_model(), "dense")
    embedded = model.get_input_embeddings()(TOKENS).detach().requires_grad_()
    loss = model(inputs_embeds=embedded, labels=TOKENS).loss
    (grad,) = torch.autograd.grad(loss, embedded, create_graph=True)
    grad.square().sum().backward()
    for name, weight in trained(model).items():
        assert weight.grad is not None and weight.grad.abs().max() > 0, name


@pytest.mark.parametrize("router", [*ROUTED, "lora"])
def test_func_grad_is_the_gradient(router: str, tiny_model: Make) -> None:
    model = adapted(tiny_model(), router)
    weights = trained(model)

    def loss(values: dict[str, Tensor]) -> Tensor:
        return functional_call(model, values, (), {"input_ids": TOKENS, "labels": TOKENS}).loss

    found = torch.func.grad(loss)({name: weight.detach() for name, weight in weights.items()})
    loss(weights).backward()
    for name, weight in weights.items():
        torch.testing.assert_close(found[name], weight.grad, rtol=1e-8, atol=1e-10)


def test_vmap_gives_the_gradient_of_each_example(tiny_model: Make) -> None:
    """As differential privacy takes them, with adapters of a network that `vmap` can follow."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8))
    model = get_peft_model(
        network, MoleConfig(router="dynmole", num_experts=4, r=2, lora_dropout=0.0, target_modules=["0", "2"])
    )
    shake(model)
    model = model.double().train()
    x = torch.randn(5, 8, dtype=torch.double)
    weights = {name: weight.detach() for name, weight in trained(model).items()}

    def loss(values: dict[str, Tensor], row: Tensor) -> Tensor:
        return functional_call(model, values, (row[None],)).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(weights, x)
    for place, row in enumerate(x):
        model.zero_grad()
        model(row[None]).square().sum().backward()
        for name, weight in trained(model).items():
            torch.testing.assert_close(each[name][place], weight.grad, rtol=1e-8, atol=1e-10)
