"""Hooks on base layers, as of debuggers, profilers and methods that look at activations: they see what they would see
without an adapter, and change nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from adapting import TOKENS, adapt, layers_of, logits
from torch import Tensor, nn
from torch.nn.modules import module as hooks_of_all
from torch.utils.checkpoint import create_selective_checkpoint_contexts

from mole.mixture import aot_compile
from mole.mixture.decode_kernel import KERNELS

Make = Callable[..., Any]
BACKWARD = ["register_full_backward_hook", "register_full_backward_pre_hook"]


def gradients(model: Any) -> dict[str, Tensor]:
    """Those of a training step."""
    model.train().zero_grad()
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


@contextmanager
def hooked(register: Callable[[Any], Any]) -> Iterator[list[Any]]:
    """What a hook was called with, each time for a linear layer of the base model."""
    seen: list[Any] = []
    handle = register(lambda module, *values: seen.append((module, *values)) if type(module) is nn.Linear else None)
    yield seen
    handle.remove()


@pytest.mark.parametrize("kind", BACKWARD)
@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_backward_hooks_on_a_base_layer(kind: str, arch: str, tiny_model: Make) -> None:
    model = adapt(tiny_model(arch), "dynmole")
    expected = gradients(model)
    base, seen = layers_of(model)[-1].base_layer, []
    getattr(base, kind)(lambda module, *grads: seen.append(grads))
    found = gradients(model)
    assert len(seen) == 1 and found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kind", BACKWARD)
def test_backward_hooks_of_all_modules(kind: str, tiny_model: Make) -> None:
    model = adapt(tiny_model(), "topk").double()
    model.enable_input_require_grads()  # or nothing of the first projections has a gradient
    expected = gradients(model)
    with hooked(getattr(hooks_of_all, kind.replace("register_", "register_module_"))) as seen:
        found = gradients(model)
    assert {id(layer.base_layer) for layer in layers_of(model)} <= {id(module) for module, *_ in seen}
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("grad", [True, False], ids=["gradients", ""])
@pytest.mark.parametrize("router", ["dynmole", "lora"])
def test_activations_that_a_hook_of_all_modules_keeps_stay_the_base_layers(
    router: str, grad: bool, tiny_model: Make
) -> None:
    model = adapt(tiny_model(), router)
    expected = logits(model)
    with torch.set_grad_enabled(grad), hooked(hooks_of_all.register_module_forward_hook) as seen:
        found = model(input_ids=TOKENS).logits
    torch.testing.assert_close(found.detach(), expected, rtol=1e-5, atol=1e-6)
    kept = {id(module): (x, y) for module, (x,), y in seen}
    for layer in layers_of(model):
        x, y = kept[id(layer.base_layer)]
        assert torch.equal(y, nn.functional.linear(x, layer.base_layer.weight, layer.base_layer.bias))


def test_activations_that_a_replaced_forward_keeps_stay_the_base_layers(tiny_model: Make) -> None:
    model = adapt(tiny_model(), "dynmole")
    layer, kept = layers_of(model)[0], []
    plain = layer.base_layer.forward

    def forward(x: Tensor) -> Tensor:
        kept.append((x, plain(x)))
        return kept[-1][1]

    layer.base_layer.forward = forward
    logits(model)
    assert torch.equal(kept[0][1], plain(kept[0][0]))


def test_a_hook_of_all_modules_sees_the_base_layers_of_a_decoded_token(tiny_model: Make) -> None:
    """A decode kernel computes the base layers without calling them; hooks are called, so it is not used."""
    model = adapt(tiny_model(), "dynmole")
    token = TOKENS[:1, :1]
    logits(model, token)
    try:
        for spec in aot_compile.kernel_specs(model):  # not compiled: its formulas run as they are
            KERNELS[spec.text] = aot_compile.KernelModule(aot_compile.example_adapters(spec))
        with hooked(hooks_of_all.register_module_forward_pre_hook) as seen:
            logits(model, token)
    finally:
        KERNELS.clear()
    assert {id(layer.base_layer) for layer in layers_of(model)} <= {id(module) for module, *_ in seen}


@pytest.mark.parametrize("router", ["dynmole", "lora"])
def test_selective_checkpointing_keeps_the_base_layers_products(router: str, tiny_model: Make) -> None:
    model = adapt(tiny_model(), router)
    model.enable_input_require_grads()
    expected = gradients(model)
    kept = [torch.ops.aten.mm.default, torch.ops.aten.addmm.default]
    model.gradient_checkpointing_enable(
        {"use_reentrant": False, "context_fn": partial(create_selective_checkpoint_contexts, kept)}
    )
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-7)
