"""A training step keeps no more than one of PEFT's LoRA with as many parameters, in 32 and in 16 bits."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig

from mole.config import AdapterConfig
from mole.preflight import memory_profile
from mole.preflight.memory_profile import BatchShape, build_meta_model, profile_step

SHAPE = BatchShape(rows=4, length=128, labelled=200)
BASE = LlamaConfig(
    vocab_size=8192, hidden_size=576, intermediate_size=1536, num_hidden_layers=2, num_attention_heads=9,
    num_key_value_heads=3,
)  # fmt: skip


def lora(dtype: torch.dtype, dropout: float) -> Any:
    config = LoraConfig(r=64, lora_dropout=dropout, target_modules="all-linear", task_type="CAUSAL_LM")
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(copy.deepcopy(BASE), dtype=dtype)
        return get_peft_model(base, config).train()


def kept(model: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, routed: bool) -> float:
    """Bytes at the peak of a step, without weights and logits."""
    monkeypatch.setattr(memory_profile, "has_router", lambda model: routed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return profile_step(model, dtype, SHAPE, checkpointing=False).activations


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_keeps_no_more_than_one_of_lora(
    dtype: torch.dtype, dropout: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The routers read float32; what is kept of a 16-bit model's inputs has 16 bits, and of dropout a byte."""
    adapter = AdapterConfig.from_flat({"num_experts": 8, "r": 8, "lora_dropout": dropout})
    ours = kept(build_meta_model(BASE, adapter, dtype), dtype, monkeypatch, routed=True)
    theirs = kept(lora(dtype, dropout), dtype, monkeypatch, routed=False)
    assert ours <= (1.03 if dtype == torch.float32 and not dropout else 0.9) * theirs
