"""What the adapted layer may not do: wait for the device, or do anything once an expert."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from mole import MoleConfig, record_routing
from mole.config import ROUTERS

ROUTED = [name for name in ROUTERS if name != "lora"]
WAITING = {"_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal", "masked_select", "unique", "bincount"}
"""Operations whose result, or its size, the host has to know before it can go on."""


class Watch(TorchDispatchMode):
    """The operations that run, the backward ones too."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def layer_of(router: str, experts: int) -> Any:
    """A transformer layer with experts on all projections."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=20,
    )  # fmt: skip
    given = {"num_experts": experts, "r": 2, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    return get_peft_model(LlamaForCausalLM(config), MoleConfig(router=router, **given))


def work_of(router: str, experts: int, training: bool, tokens: int = 5) -> list[str]:
    """The operations of a pass, with its losses and its backward in training."""
    model = layer_of(router, experts).train(training)
    ids = torch.arange(tokens)[None] % 20
    mask = torch.ones_like(ids)
    with Watch() as watch, torch.set_grad_enabled(training):
        out = model(input_ids=ids, attention_mask=mask, labels=ids if training else None)
        if training:
            out.loss.backward()
    return watch.names


def work_of_the_base(training: bool) -> list[str]:
    with torch.random.fork_rng():
        model = layer_of("dense", 2)
    with model.disable_adapter():
        ids = torch.arange(5)[None] % 20
        model.train(training)
        with Watch() as watch:
            model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids if training else None)
    return watch.names


def waits(names: list[str]) -> list[str]:
    """Those for which the host waits; transformers itself has one, for the mask."""
    return [name for name in names if name in WAITING]


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("router", ROUTED)
def test_nothing_waits_for_the_device(router: str, training: bool) -> None:
    assert waits(work_of(router, 4, training)) == waits(work_of_the_base(training))


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("router", ROUTED)
def test_sixteen_experts_take_as_many_operations_as_four(router: str, training: bool) -> None:
    assert work_of(router, 16, training) == work_of(router, 4, training)


@pytest.mark.parametrize("router", ROUTED)
def test_the_recorder_does_not_wait_either(router: str) -> None:
    model = layer_of(router, 4).eval()
    ids = torch.arange(5)[None]
    with record_routing(model), Watch() as watch, torch.no_grad():
        model(input_ids=ids, attention_mask=torch.ones_like(ids))
    assert waits(watch.names) == waits(work_of_the_base(False))


def test_the_watch_sees_what_it_forbids() -> None:
    with Watch() as watch:
        bool((torch.ones(3) > 0).any())
        torch.ones(3).nonzero()
    assert {*watch.names} >= {"_local_scalar_dense", "nonzero"}
