"""What is trained beside the experts, as under PEFT's LoRA: whole modules."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapting import TOKENS, layers_of, logits, settings
from peft import LoraConfig, PeftModel, get_peft_model

Make = Callable[..., Any]

CHOICES: dict[str, dict[str, Any]] = {
    "the head": {"modules_to_save": ["lm_head"]},
    "all norms, by the end of their names": {"modules_to_save": ["norm"]},
    "whole blocks of projections": {"modules_to_save": ["mlp", "embed_tokens"]},
    "some of the targets": {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["layers.1.self_attn.v_proj"]},
}


def trained_beside(model: Any, prefix: str) -> set[str]:
    """The names of the weights that are trained and not an adapter's."""
    return {name for name, weight in model.named_parameters() if weight.requires_grad and prefix not in name}


@pytest.mark.parametrize("what", CHOICES)
def test_the_same_weights_are_trained_saved_and_loaded_as_by_lora(what: str, tiny_model: Make, tmp_path: Path) -> None:
    chosen = {"target_modules": "all-linear", **CHOICES[what]}
    model = get_peft_model(tiny_model(), settings(**chosen)).train()
    lora = get_peft_model(tiny_model(), LoraConfig(task_type="CAUSAL_LM", **chosen))
    beside = trained_beside(model, "mole_studio_")
    assert beside == trained_beside(lora, "lora_") != set()
    assert {f"base_model.model.{layer.name}" for layer in layers_of(model)} == {
        name for name, module in lora.named_modules() if hasattr(module, "lora_A")
    }
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimiser = torch.optim.SGD((weight for weight in model.parameters() if weight.requires_grad), lr=1.0)
    for _ in range(2):  # the experts' B is zero in the first
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
        optimiser.step()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert beside <= changed and all(name in beside or "mole_studio_" in name for name in changed)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model(), tmp_path)
    assert torch.equal(logits(loaded.eval()), logits(model.eval()))
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(tiny_model()))
