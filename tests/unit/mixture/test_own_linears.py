"""The adapter's own linear layers (A, B and the routers') under hooks: offload moves their weights, people watch them.

The fast ways to compute an adapter read these weights without calling the layers; here they must be called.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from accelerate.hooks import attach_align_device_hook, remove_hook_from_submodules
from adapting import ROUTED, TOKENS, adapt, layers_of, logits
from torch import Tensor, nn
from torch.nn.utils import parametrize

from mole import record_routing
from mole.config import ROUTERS
from mole.mixture import aot_compile
from mole.mixture.decode_kernel import KERNELS
from mole.mixture.steering import Steering, steer

Make = Callable[..., Any]
CPU = torch.device("cpu")


def in_cpu_memory(model: Any, folder: Path) -> None:
    accelerate.cpu_offload(model, execution_device=CPU)


def on_disk(model: Any, folder: Path) -> None:
    accelerate.disk_offload(model, str(folder), execution_device=CPU)


def by_device_map(model: Any, folder: Path) -> None:
    """The first layer stays, the second one is offloaded."""
    base = model.base_model.model
    names = [name for name, _ in base.named_children() if name != "model"]
    parts = [name for name, _ in base.model.named_children() if name != "layers"]
    places = {f"base_model.model.{name}": "cpu" for name in (*names, *(f"model.{part}" for part in parts))}
    places |= {"base_model.model.model.layers.0": "cpu", "base_model.model.model.layers.1": "disk"}
    accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=str(folder), force_hooks=True)


def by_projection(model: Any, folder: Path) -> None:
    """A projection's weights, its adapter's among them, are there only during the call of the projection."""
    weights = {name: weight.detach().clone() for name, weight in model.state_dict().items()}
    preloaded = ["MoleLinear"]
    attach_align_device_hook(
        model, CPU, offload=True, weights_map=weights, offload_buffers=False, preload_module_classes=preloaded
    )


def prompt_and_token(model: Any) -> tuple[Tensor, Tensor]:
    """The logits of a prompt and of a token after it, and the routing of the prompt's first row and of the token."""
    with record_routing(model) as trace, torch.no_grad():
        prompt = model(input_ids=TOKENS[:, :6], use_cache=True)
        whole = prompt.logits
        first = model(input_ids=TOKENS[:1, :6], use_cache=True)
        token = model(input_ids=TOKENS[:1, 6:7], past_key_values=first.past_key_values).logits
    return torch.cat([whole.flatten(0, 1), token[0]]), trace.weights


def offloaded(model: Any) -> set[str]:
    """The names of the adapter's weights that are nowhere at the moment."""
    return {name for name, weight in model.named_parameters() if weight.is_meta and "mole_studio_" in name}


@pytest.mark.parametrize("offload", [in_cpu_memory, on_disk, by_device_map])
@pytest.mark.parametrize("router", ROUTERS)
def test_an_offloaded_model_computes_and_routes_the_same(
    router: str, offload: Callable[[Any, Path], None], tiny_model: Make, tmp_path: Path
) -> None:
    model = adapt(tiny_model(), router).double()
    expected, routing = prompt_and_token(model)
    offload(model, tmp_path)
    assert offloaded(model)
    found, found_routing = prompt_and_token(model)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(found_routing, routing, rtol=0, atol=1e-6)
    assert offloaded(model)


@pytest.mark.parametrize("router", ["dynmole", "adamole"])
def test_weights_that_are_there_only_during_the_call_of_their_projection(
    router: str, tiny_model: Make, tmp_path: Path
) -> None:
    """So a projection cannot compute the adapters of those that read the same input."""
    model = adapt(tiny_model(), router).double()
    expected, routing = prompt_and_token(model)
    by_projection(model, tmp_path)
    found, found_routing = prompt_and_token(model)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(found_routing, routing, rtol=0, atol=1e-6)


def test_routing_overrides_of_an_offloaded_model(tiny_model: Make, tmp_path: Path) -> None:
    model, steering = adapt(tiny_model(), "topk").double(), Steering(muted=frozenset({1}))
    with steer(model, steering):
        expected = prompt_and_token(model)[0]
    in_cpu_memory(model, tmp_path)
    with steer(model, steering):
        found, routing = prompt_and_token(model)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert not routing[..., 1].any()


def test_a_model_that_is_no_longer_offloaded_is_as_fast_as_before(tiny_model: Make, tmp_path: Path) -> None:
    """accelerate leaves the `forward` of their class on the modules."""
    model = adapt(tiny_model(), "dynmole")
    expected = logits(model)
    in_cpu_memory(model, tmp_path)
    logits(model)
    remove_hook_from_submodules(model)
    assert torch.equal(logits(model), expected)
    layer = layers_of(model)[0]
    assert not layer.group.fused([layer], "default").must_be_called


def own_linears(model: Any, router: str) -> dict[str, nn.Module]:
    """The adapter's own linear layers, each once, by the name of the first of its places."""
    found = {name: module for name, module in model.named_modules() if "mole_studio_" in name}
    return {name: module for name, module in found.items() if isinstance(module, nn.Linear)}


@pytest.mark.parametrize("router", ROUTERS)
def test_hooks_on_the_adapters_own_layers_see_their_calls(router: str, tiny_model: Make) -> None:
    model = adapt(tiny_model(), router).double()
    expected, own = logits(model), own_linears(model, router)
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in own}
    for name, module in own.items():
        module.register_forward_hook(lambda module, args, output, name=name: seen[name].append((args[0], output)))
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-6)
    for name, module in own.items():
        places = {"lambda_in", "lambda_out"}.intersection(name.replace("mole_studio_", "").split("."))
        assert len(seen[name]) >= 1 if places else len(seen[name]) == 1, name
        for x, output in seen[name]:
            bias = None if module.bias is None else module.bias
            assert torch.equal(output, nn.functional.linear(x, module.weight, bias))


@pytest.mark.parametrize("name", ["mole_studio_A", "mole_studio_B", "mole_studio_gate"])
def test_a_hook_or_another_forward_changes_what_is_computed(name: str, tiny_model: Make) -> None:
    """Also while the others of its group have none: q, k and v are computed together."""
    model = adapt(tiny_model(), "dense").double()
    expected = logits(model)
    module = getattr(layers_of(model)[1], name)["default"]
    handle = module.register_forward_hook(lambda module, args, output: output * 2)
    hooked = logits(model)
    handle.remove()
    assert torch.equal(logits(model), expected)
    plain = module.forward
    module.forward = lambda x: plain(x) * 2
    replaced = logits(model)
    del module.forward
    parametrize.register_parametrization(module, "weight", Twice())
    parametrized = logits(model)
    parametrize.remove_parametrizations(module, "weight", leave_parametrized=False)
    assert torch.equal(logits(model), expected)
    assert (hooked - expected).abs().max() > 1e-3
    assert torch.equal(replaced, hooked)
    torch.testing.assert_close(parametrized, hooked, rtol=0, atol=1e-9)


class Twice(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * 2


@pytest.mark.parametrize("setting", ["plain", "dropout", "checkpointing"])
@pytest.mark.parametrize("router", ["dynmole", "sparsegen", "lora"])
def test_training_with_hooks_on_the_adapters_own_layers(router: str, setting: str, tiny_model: Make) -> None:
    model = adapt(tiny_model(), router, lora_dropout=0.25 if setting == "dropout" else 0.0).double()
    if setting == "checkpointing":
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    results = []
    for hooked in (False, True):
        for module in own_linears(model, router).values() if hooked else ():
            module.register_forward_pre_hook(lambda module, args: None)
        torch.manual_seed(0)
        model.train().zero_grad()
        loss = model(input_ids=TOKENS, labels=TOKENS).loss
        loss.backward()
        results.append(torch.cat([loss.view(1)] + [p.grad.flatten() for p in model.parameters() if p.requires_grad]))
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("setting", ["autocast", "bfloat16 base", "bfloat16"])
@pytest.mark.parametrize("router", ROUTERS)
def test_half_precision_with_hooks_on_the_adapters_own_layers(router: str, setting: str, tiny_model: Make) -> None:
    """One projection: over several, a difference in the last digit changes which experts are selected."""
    layer = layers_of(adapt(tiny_model(), router))[-1]
    if setting != "autocast":
        (layer if setting == "bfloat16" else layer.base_layer).to(torch.bfloat16)
    x = torch.randn(2, 5, layer.in_features, generator=torch.Generator().manual_seed(0))
    outputs, gradients = [], []
    for hooked in (False, True):
        for module in own_linears(layer, router).values() if hooked else ():
            module.register_forward_pre_hook(lambda module, args: None)
        layer.zero_grad()
        with torch.autocast("cpu", enabled=setting == "autocast"):
            outputs.append(layer(x if setting == "autocast" else x.to(torch.bfloat16)))
        outputs[-1].float().square().sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in layer.parameters() if p.requires_grad]))
    assert outputs[1].dtype == outputs[0].dtype == torch.bfloat16
    for plain, called in (outputs, gradients):
        assert (called - plain).norm() <= 0.02 * plain.norm()


def test_a_hook_sees_a_token_that_a_decode_kernel_could_compute(tiny_model: Make) -> None:
    model, token, seen = adapt(tiny_model(), "adamole"), TOKENS[:1, :1], []
    expected = logits(model, token)
    layers_of(model)[0].mole_studio_threshold["default"].register_forward_hook(lambda *call: seen.append(call))
    try:
        for spec in aot_compile.kernel_specs(model):  # not compiled: its formulas run as they are
            KERNELS[spec.text] = aot_compile.KernelModule(aot_compile.example_adapters(spec))
        assert KERNELS
        torch.testing.assert_close(logits(model, token), expected, rtol=1e-5, atol=1e-6)
    finally:
        KERNELS.clear()
    assert len(seen) == 1


@pytest.mark.parametrize("router", ROUTED[:1])
def test_a_compiled_model_with_hooks_on_the_adapters_own_layers(router: str, tiny_model: Make) -> None:
    model = adapt(tiny_model(), router)
    module = layers_of(model)[1].mole_studio_A["default"]
    module.register_forward_hook(lambda module, args, output: output * 2)
    expected = logits(model)
    torch._dynamo.reset()
    torch.testing.assert_close(logits(torch.compile(model, backend="aot_eager")), expected, rtol=1e-5, atol=1e-5)
