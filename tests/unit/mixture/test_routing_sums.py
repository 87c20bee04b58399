"""What training keeps of the routing, sums over tokens: as good as the routings themselves, whatever comes between."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from adapting import TOKENS, adapt, layers_of, padded
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mole import auxiliary_loss, record_routing
from mole.config import ROUTERS
from mole.mixture.routing_log import find_log, layer_index, one_batch
from mole.mixture.routing_statistics import layer_statistics

Make = Callable[..., Any]
Batch = dict[str, Tensor]
ROUTED = [name for name in ROUTERS if name != "lora"]
LOSSES = {"balance_loss_coef": 0.3, "entropy_loss_coef": 0.5, "z_loss_coef": 0.2}
CLOSE = {"rtol": 0.0, "atol": 1e-10}


def batches() -> list[Batch]:
    """Parts of one batch of unlike widths, with padding on either side, and one without any."""
    return [padded("left", 1), {"input_ids": TOKENS[:2]}, padded("right", 4)]


def trained(model: Any, router: str, **values: Any) -> Any:
    """The adapted model in float64 and training, with all the losses its router has."""
    coefficients = LOSSES | ({"cv_loss_coef": 0.4} if router == "dense" else {})
    return adapt(model, router, **coefficients, **values).double().train()


def recomputing(model: Any) -> Any:
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def gradients(model: Any, loss: Tensor) -> Batch:
    """Those of the adapter; 0 for what does not touch the routing."""
    weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    model.zero_grad()
    loss.backward()
    return {name: torch.zeros_like(w) if w.grad is None else w.grad for name, w in weights.items()}


def hold_equal(ours: Batch, theirs: Batch) -> None:
    assert ours.keys() == theirs.keys() and ours
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], msg=lambda text, name=name: f"{name}: {text}", **CLOSE)


def routings(model: Any, parts: list[Batch]) -> dict[Any, list[Tensor]]:
    """For every projection weights, probs, entropy, logits and usage of all tokens without padding, with gradients."""
    found: dict[Any, list[list[Tensor]]] = defaultdict(list)
    keep = torch.ones(0)

    def look(layer: Any, args: Any) -> None:
        router = layer.routers["default"]
        routing = router(args[0])
        soft, by_limit = router.params.name == "dynmole", router.params.name == "adamole"
        chosen = routing.probs >= routing.threshold[..., None] if by_limit else routing.weights > 0
        used = routing.weights if soft else chosen.double()
        values = (routing.weights, routing.probs, routing.entropy[..., None], routing.logits, used)
        found[layer].append([value.flatten(0, -2)[keep] for value in values])

    hooks = [layer.register_forward_pre_hook(look) for layer in layers_of(model)]
    for part in parts:
        keep = part.get("attention_mask", torch.ones_like(part["input_ids"])).reshape(-1).bool()
        model(**part)
    for hook in hooks:
        hook.remove()
    return {layer: [torch.cat(column) for column in zip(*values, strict=True)] for layer, values in found.items()}


def slow_loss(model: Any, parts: list[Batch]) -> Tensor:
    """The auxiliary loss from the routings of all tokens, one projection after the other."""
    losses = []
    for layer, (weights, probs, entropy, logits, used) in routings(model, parts).items():
        router = layer.routers["default"]
        loss = 0.3 * router.num_experts * (used.mean(0) * probs.mean(0)).sum()
        loss = loss + 0.5 * entropy.mean() + 0.2 * logits.logsumexp(-1).square().mean()
        if router.params.name == "dense":
            loss = loss + 0.4 * weights.sum(0).var(unbiased=False) / weights.sum(0).mean().square()
        losses.append(loss)
    return torch.stack(losses).mean()


def loss_of(model: Any, parts: list[Batch]) -> Tensor:
    with one_batch(model):
        for part in parts:
            model(**part)
    return auxiliary_loss(model)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("router", ROUTED)
def test_loss_and_gradients_are_those_of_the_routings_of_all_tokens(
    router: str, checkpointing: bool, tiny_model: Make
) -> None:
    """The backward computes the layers of the first parts again when the log knows the last one's padding."""
    model = trained(tiny_model(), router)
    want = slow_loss(model, batches())
    expected = gradients(model, want)
    loss = loss_of(recomputing(model) if checkpointing else model, batches())
    torch.testing.assert_close(loss, want, **CLOSE)
    hold_equal(gradients(model, loss), expected)


@pytest.mark.parametrize("router", ["dynmole", "topk"])
def test_what_runs_between_forward_and_backward_does_not_disturb_checkpointing(router: str, tiny_model: Make) -> None:
    model = trained(tiny_model(), router)
    expected = gradients(model, loss_of(model, batches()))
    with record_routing(recomputing(model)):
        loss = loss_of(model, batches())
    with torch.no_grad():
        model.eval()(input_ids=TOKENS[:1])
    hold_equal(gradients(model.train(), loss), expected)


@pytest.mark.parametrize("router", ROUTED)
def test_statistics_are_means_over_all_tokens(router: str, tiny_model: Make) -> None:
    model = trained(tiny_model(), router, num_experts=[2, 4])
    rows: dict[int, list[list[Tensor]]] = defaultdict(list)
    for layer, (weights, _, entropy, _, _) in routings(model, batches()).items():
        active = (weights > 0).double().sum(-1).mean()
        load = torch.cat([weights.mean(0), weights.new_zeros(4 - weights.shape[-1])])
        rows[layer_index(layer.name)].append([load, entropy.mean(), active])
    loss_of(model, batches())
    found = layer_statistics(model)
    assert found is not None and found["layers"] == len(rows) == 2
    for place, row in rows.items():
        load, entropy, active = (torch.stack(column).mean(0) for column in zip(*row, strict=True))
        assert found["load"][place] == pytest.approx((load / load.sum()).tolist(), abs=1e-4)
        assert found["entropy"][place] == pytest.approx(entropy.item(), abs=1e-4)
        assert found["active"][place] == pytest.approx(active.item(), abs=1e-4)


def test_the_statistics_of_many_layers_take_no_more_operations_than_those_of_two(tiny_model: Make) -> None:
    """On a GPU each operation is a launch: thousands of small ones took as long as a step of a small model."""

    class Counter(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.calls += 1
            return func(*args, **(kwargs or {}))

    counts = []
    for layers in (2, 7):
        model = trained(tiny_model(layers=layers), "dynmole")
        loss_of(model, batches())
        with Counter() as counter:
            layer_statistics(model)
        counts.append(counter.calls)
    assert counts[0] == counts[1] <= 50


@pytest.mark.parametrize(("settings", "certain"), [({"renormalize": True}, [1]), ({}, [])])
def test_layers_whose_weights_do_not_depend_on_the_gate_are_told(
    settings: dict[str, Any], certain: list[int], tiny_model: Make
) -> None:
    """Of two layers the first has one expert only, which is no router's fault."""
    given = {"num_experts": [1, 4], "top_k": 1, "balance_loss_coef": 0.0, **settings}
    model = adapt(tiny_model(), "topk", **given).train()
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    found = layer_statistics(model)
    assert found is not None and found["certain"] == certain
    gates = [p.grad for name, p in model.named_parameters() if "mole_studio_gate" in name and ".layers.1." in name]
    assert gates and all((grad is not None and bool(grad.any())) != bool(certain) for grad in gates)


def test_recording_a_training_pass_changes_nothing_of_its_loss(tiny_model: Make) -> None:
    model = trained(tiny_model(), "sparsegen")
    plain = loss_of(model, batches())
    with record_routing(model) as trace:
        assert torch.equal(loss_of(model, batches()), plain)
    assert len(trace) == sum(part["input_ids"].shape[1] for part in batches())


def test_a_projection_that_is_not_called_is_not_counted(tiny_model: Make) -> None:
    """Its sibling has computed for it too, but nobody took the answer."""
    model = trained(tiny_model(), "dynmole")
    attention = model.get_base_model().model.layers[0].self_attn
    adapted, attention.v_proj = attention.v_proj, attention.v_proj.base_layer
    model(input_ids=TOKENS)
    names = [name for name, _, _ in find_log(model).sums]
    assert adapted.name not in names and len(names) == len(set(names)) == len(layers_of(model))


def test_in_a_pass_without_a_trace_no_tensor_has_a_row_for_each_token(tiny_model: Make) -> None:
    model = trained(tiny_model(), "adamole")
    model(input_ids=TOKENS)
    log = find_log(model)
    assert not log.records and {values.dim() for _, _, values in log.sums} == {1}


@pytest.mark.parametrize("router", ["dynmole", pytest.param("sparsegen", marks=pytest.mark.soak)])
def test_compiled_blocks_leave_out_padding_too(router: str, tiny_model: Make) -> None:
    torch.compiler.reset()
    model = trained(tiny_model(), router, target_modules=["q_proj", "v_proj", "down_proj"])
    model.enable_input_require_grads()  # then all layers share one graph
    expected = gradients(model, loss_of(model, batches()))
    for block in model.get_base_model().model.layers:
        block.compile(backend="eager", fullgraph=True)
    hold_equal(gradients(model, loss_of(model, batches())), expected)
    torch.compiler.reset()
