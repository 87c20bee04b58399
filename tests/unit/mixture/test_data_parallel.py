"""`nn.DataParallel`, which Trainer uses on a machine with several GPUs: a thread and a copy of the model for each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from adapting import TOKENS, adapt, logits
from torch import Tensor
from torch.nn.parallel import replicate

from mole.config import ROUTERS
from mole.core.errors import MoleError

Make = Callable[..., Any]
DEVICES = 3


@pytest.fixture
def replicated(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], list[Any]]:
    """Copies of a model as for several GPUs. Only the copying of the weights is ours, since it needs GPUs."""

    def copied(weights: Sequence[Tensor], devices: Sequence[int], detach: bool = False) -> list[list[Tensor]]:
        return [[weight.clone() for weight in weights] for _ in devices]

    monkeypatch.setitem(replicate.__globals__, "_broadcast_coalesced_reshape", copied)
    return lambda model: list(replicate(model, range(DEVICES)))


@pytest.mark.parametrize("router", [name for name in ROUTERS if name != "sparsegen"])
def test_each_copy_computes_with_its_own_weights_and_gradients_add_up(
    router: str, tiny_model: Make, replicated: Callable[[Any], list[Any]]
) -> None:
    model = adapt(tiny_model(), router).double().train()
    for rank in range(DEVICES):
        model(input_ids=TOKENS[rank : rank + 1], labels=TOKENS[rank : rank + 1]).loss.backward()
    expected = {name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad}
    model.zero_grad()
    for _ in range(2):  # a step, and another one with new copies

        def loss_of(copy: Any, rank: int) -> Tensor:
            loss: Tensor = copy(input_ids=TOKENS[rank : rank + 1], labels=TOKENS[rank : rank + 1]).loss
            return loss

        copies = replicated(model)
        with ThreadPoolExecutor(DEVICES) as pool:
            losses = list(pool.map(loss_of, copies, range(DEVICES)))
        torch.stack(losses).sum().backward()
        for name, weight in model.named_parameters():
            if weight.requires_grad:
                torch.testing.assert_close(weight.grad, expected[name], rtol=1e-6, atol=1e-9)
        model.zero_grad()


def test_a_copy_does_not_change_the_model(tiny_model: Make, replicated: Callable[[Any], list[Any]]) -> None:
    model = adapt(tiny_model(), "dynmole")
    expected = logits(model)
    copies = replicated(model)
    for copy in copies:
        for name, module in copy.named_modules():
            if "mole_studio_" in name and "weight" in vars(module):  # a copy's weights are no parameters
                module.weight = module.weight * 1.5
    assert not torch.equal(logits(copies[0]), expected)
    assert torch.equal(logits(model), expected)


def test_a_network_that_layers_share_is_refused_in_one_line(
    tiny_model: Make, replicated: Callable[[Any], list[Any]]
) -> None:
    with pytest.raises(MoleError, match=r"^nn\.DataParallel is not supported with LD-MoLE.*DistributedDataParallel"):
        replicated(adapt(tiny_model(), "sparsegen"))
