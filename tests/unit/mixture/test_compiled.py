"""torch.compile: an adapted block is one graph, the same for every layer, and computes what it computes without."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from adapting import TOKENS, adapt, logits
from torch._dynamo.testing import CompileCounterWithBackend

from mole import record_routing
from mole.config import ROUTERS

SOME = ["q_proj", "v_proj", "down_proj"]
"""Two projections with the same input and one alone, which take half as long to trace as all."""
CASES = [
    pytest.param(router, targets, marks=[pytest.mark.soak] if targets == "all-linear" and router != "dynmole" else [])
    for router in ROUTERS
    for targets in (SOME, "all-linear")
    if router != "dynmole" or targets == "all-linear"
]


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def compiled(model: Any) -> CompileCounterWithBackend:
    """Compile the model's blocks, each by itself, into graphs that run as they are; a break is an error."""
    graphs = CompileCounterWithBackend("eager")
    for block in model.get_base_model().model.layers:
        block.compile(backend=graphs, fullgraph=True)
    return graphs


def gradients(model: Any) -> dict[str, torch.Tensor]:
    """Those of a training step with the routers' own losses."""
    model.train().zero_grad()
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


@pytest.mark.parametrize(("router", "targets"), CASES)
def test_all_layers_share_one_graph_and_answer_as_before(
    router: str, targets: Any, tiny_model: Callable[..., Any]
) -> None:
    model = adapt(tiny_model(), router, target_modules=targets)
    with record_routing(model) as before:
        expected = logits(model, use_cache=False)
    graphs = compiled(model)
    torch.testing.assert_close(logits(model, use_cache=False), expected, rtol=1e-5, atol=1e-5)
    assert graphs.frame_count == 1 < len(model.get_base_model().model.layers)
    with record_routing(model) as after:
        logits(model, use_cache=False)
    torch.testing.assert_close(after.weights, before.weights, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(after.entropy, before.entropy, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("router", "targets"), CASES)
def test_a_training_step_has_the_same_gradients(router: str, targets: Any, tiny_model: Callable[..., Any]) -> None:
    model = adapt(tiny_model(), router, target_modules=targets)
    expected = gradients(model)
    compiled(model)
    found = gradients(model)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5 * gradient.abs().max().item())
