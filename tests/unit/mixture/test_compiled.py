"""torch.compile: an adapted block is one graph, the same for every layer, and computes what it computes without. A
whole model has the losses, the gradients and the routing that it has without, in every kind of loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from adapting import ROUTED, TOKENS, adapt, logits, padded
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from mole import auxiliary_loss, record_routing
from mole.config import ROUTERS
from mole.core.errors import MoleError
from mole.mixture.routing_log import one_batch
from mole.mixture.routing_statistics import layer_statistics

SOME = ["q_proj", "v_proj", "down_proj"]
"""Two projections with the same input and one alone, which take half as long to trace as all."""
IN_CI = (("dynmole", "all-linear"), ("adamole", SOME), ("sparsegen", SOME))
CASES = [
    pytest.param(router, targets, marks=[] if (router, targets) in IN_CI else [pytest.mark.soak])
    for router in ROUTERS
    for targets in (SOME, "all-linear")
    if router != "dynmole" or targets == "all-linear"
]
LOSSES = {"balance_loss_coef": 0.3, "entropy_loss_coef": 0.5, "z_loss_coef": 0.2}
WITHOUT_PADDING = {"input_ids": TOKENS}
QUICK = ("adamole",)
"""Routers unlike the others; dynmole and dense have tests of their own below."""
RECOMPUTE = {"use_reentrant": False}


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


# ---------------------------------------------------------------------------------------------------------
# A whole model, with the routing log in the graph


class Step(NamedTuple):
    """What a training step came to."""

    loss: Tensor
    auxiliary: Tensor
    statistics: Any
    gradients: dict[str, Tensor]


def with_losses(model: Any, router: str = "dynmole") -> Any:
    """The adapted model in float64 and training, with all the losses its router has."""
    coefficients = LOSSES | ({"cv_loss_coef": 0.4} if router == "dense" else {})
    return adapt(model, router, target_modules=SOME, **coefficients).double().train()


def step(model: Any, call: Callable[..., Any], *parts: dict[str, Tensor]) -> Step:
    """A step with the parts of one batch, as `Trainer` accumulates them: `call` is the model, compiled or not."""
    model.train().zero_grad()
    labels = sum(part["input_ids"][:, 1:].numel() for part in parts)
    loss = torch.stack(
        [call(**part, labels=part["input_ids"], num_items_in_batch=torch.tensor(labels)).loss for part in parts]
    ).sum()
    loss.backward()
    grads = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    return Step(loss.detach(), auxiliary_loss(model).detach(), layer_statistics(model), grads)


def evaluated(model: Any, call: Callable[..., Any], batch: dict[str, Tensor]) -> Tensor:
    model.eval()
    with torch.no_grad():
        return call(**batch).logits


def hold_equal(found: Step, expected: Step) -> None:
    torch.testing.assert_close(found[:2], expected[:2], rtol=1e-6, atol=0.0)
    assert found.statistics == expected.statistics and found.gradients.keys() == expected.gradients.keys()
    for name, gradient in expected.gradients.items():
        torch.testing.assert_close(
            found.gradients[name], gradient, rtol=1e-5, atol=1e-9, msg=lambda text, n=name: n + text
        )


@pytest.mark.parametrize(
    "router", [pytest.param(name, marks=[pytest.mark.soak] if name not in QUICK else []) for name in ROUTED]
)
def test_a_whole_model_has_the_same_losses_and_gradients(router: str, tiny_model: Callable[..., Any]) -> None:
    """Compiled after a first step without."""
    model = with_losses(tiny_model(layers=1), router)
    expected = step(model, model, padded("right"))
    hold_equal(step(model, torch.compile(model, backend="eager"), padded("right")), expected)


@pytest.mark.soak
@pytest.mark.parametrize("router", ROUTERS)
def test_a_whole_model_has_the_same_losses_and_gradients_by_inductor(
    router: str, tiny_model: Callable[..., Any]
) -> None:
    """In float32, and for another shape, without padding."""
    model = with_losses(tiny_model(), router).float()
    batches = [padded("left", 1), WITHOUT_PADDING]
    expected = [step(model, model, batch) for batch in batches]
    compiled_model = torch.compile(model)
    for batch, want in zip(batches, expected, strict=True):
        found = step(model, compiled_model, batch)
        torch.testing.assert_close(found[:2], want[:2], rtol=1e-5, atol=1e-5)
        for name, gradient in want.gradients.items():
            torch.testing.assert_close(
                found.gradients[name], gradient, rtol=1e-4, atol=1e-5 * gradient.abs().max().item()
            )


@pytest.mark.parametrize(("checkpointing", "backend"), [(False, "eager"), (True, "aot_eager")])
def test_a_whole_model_accumulates_parts_of_other_shapes(
    checkpointing: bool, backend: str, tiny_model: Callable[..., Any]
) -> None:
    """When the layers of the first part are computed again, the log knows the other's padding. Evaluation follows."""
    model, parts = with_losses(tiny_model(layers=1)), [padded("left", 1), WITHOUT_PADDING]
    expected, answer = step(model, model, *parts), evaluated(model, model, parts[0])
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=RECOMPUTE)
    compiled_model = torch.compile(model, backend=backend)
    hold_equal(step(model, compiled_model, *parts), expected)
    torch.testing.assert_close(evaluated(model, compiled_model, parts[0]), answer)


def test_micro_batches_of_a_compiled_model_are_one_batch(tiny_model: Callable[..., Any]) -> None:
    model = with_losses(tiny_model(layers=1))
    losses = []
    for call in (model, torch.compile(model, backend="eager")):
        with one_batch(model):
            for part in (padded("left", 1), WITHOUT_PADDING):
                call(**part)
        losses.append(auxiliary_loss(model).detach())
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-6, atol=0.0)


def test_the_routing_of_a_compiled_model_is_recorded_and_changes_nothing(tiny_model: Callable[..., Any]) -> None:
    model = with_losses(tiny_model(layers=1))
    with record_routing(model) as before:
        expected = step(model, model, padded("right"))
    compiled_model = torch.compile(model, backend="eager")
    with record_routing(model) as after:
        hold_equal(step(model, compiled_model, padded("right")), expected)
    torch.testing.assert_close(after.weights, before.weights)
    torch.testing.assert_close(after.entropy, before.entropy)
    hold_equal(step(model, compiled_model, padded("right")), expected)


def test_a_compiled_model_too_refuses_reentrant_checkpointing(tiny_model: Callable[..., Any]) -> None:
    model = with_losses(tiny_model(layers=1))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    model.enable_input_require_grads()
    with pytest.raises(MoleError, match="reentrant"):
        step(model, torch.compile(model, backend="eager"), WITHOUT_PADDING)


def test_trainer_that_compiles_takes_the_same_steps(tiny_model: Callable[..., Any], tmp_path: Path) -> None:
    """`TrainingArguments(torch_compile=True)`, with accumulation and evaluation."""
    runs = []
    for settings in ({}, {"torch_compile": True, "torch_compile_backend": "aot_eager"}):
        model = with_losses(tiny_model(layers=1), "dense")
        losses = train(model, tmp_path, **settings)
        runs.append((losses, [weight.detach() for weight in model.parameters() if weight.requires_grad]))
    torch.testing.assert_close(runs[1], runs[0], rtol=1e-5, atol=1e-9)


def train(model: Any, folder: Path, **settings: Any) -> list[float]:
    """Two steps of four rows, two at a time, by `transformers.Trainer` → their losses and that of an evaluation."""
    from transformers import Trainer, TrainingArguments

    tokens = torch.randint(5, 300, (8, 8), generator=torch.Generator().manual_seed(1))
    rows: Any = [{"input_ids": row, "labels": row} for row in tokens]
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=2,
        per_device_train_batch_size=2,
        per_device_eval_batch_size=8,
        gradient_accumulation_steps=2,
        optim="sgd",
        learning_rate=0.1,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        **settings,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, eval_dataset=rows)
    trainer.train()
    evaluated = trainer.evaluate()["eval_loss"]
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry] + [evaluated]
