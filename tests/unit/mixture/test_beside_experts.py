"""What is trained beside the experts, as under PEFT's LoRA: whole modules, biases, embeddings of tokens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapting import TOKENS, layers_of, logits, refused, settings
from peft import LoraConfig, PeftModel, get_peft_model

from mole.core.errors import ConfigError, MoleError

Make = Callable[..., Any]

READ = sorted(set(TOKENS[0].tolist()))[:3]
"""Tokens of the first row."""
CHOICES: dict[str, tuple[str, dict[str, Any]]] = {
    "the head": ("llama", {"modules_to_save": ["lm_head"]}),
    "all norms, by the end of their names": ("llama", {"modules_to_save": ["norm"]}),
    "whole blocks of projections": ("llama", {"modules_to_save": ["mlp", "embed_tokens"]}),
    "one of the targets": (
        "llama",
        {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["1.self_attn.v_proj"]},
    ),
    "all biases": ("gpt2", {"target_modules": ["c_attn"], "bias": "all"}),
    "the biases of projections with experts": ("gpt2", {"target_modules": ["c_attn"], "bias": "lora_only"}),
    "some tokens": ("llama", {"trainable_token_indices": READ}),
    "some tokens, and a tied output layer": ("gpt2", {"trainable_token_indices": {"wte": READ}}),
    "all of them": (
        "phi",
        {
            "target_modules": ["fc1"],
            "bias": "lora_only",
            "trainable_token_indices": READ,
            "modules_to_save": ["1.mlp.fc2"],
        },
    ),
}


def trained_beside(model: Any, prefix: str) -> set[str]:
    """The names of the weights that are trained and not an adapter's."""
    return {name for name, weight in model.named_parameters() if weight.requires_grad and prefix not in name}


@pytest.mark.parametrize("what", CHOICES)
def test_the_same_weights_are_trained_saved_and_loaded_as_by_lora(what: str, tiny_model: Make, tmp_path: Path) -> None:
    arch, values = CHOICES[what]
    chosen = {"target_modules": "all-linear", **values}
    model = get_peft_model(tiny_model(arch), settings(**chosen)).train()
    lora = get_peft_model(tiny_model(arch), LoraConfig(task_type="CAUSAL_LM", **chosen))
    beside = trained_beside(model, "mole_studio_")
    assert beside == trained_beside(lora, "lora_") != set()
    assert {f"base_model.model.{layer.name}" for layer in layers_of(model)} == {
        name for name, module in lora.named_modules() if hasattr(module, "lora_A")
    }
    weights = dict(model.named_parameters())
    before = {name: value.detach().clone() for name, value in weights.items()}
    optimiser = torch.optim.SGD((weight for weight in model.parameters() if weight.requires_grad), lr=1.0)
    for _ in range(2):  # the experts' B is zero in the first
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
        optimiser.step()
    changed = {name for name, value in weights.items() if not torch.equal(value, before[name])}
    assert beside <= changed and all(name in beside or "mole_studio_" in name for name in changed)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model(arch), tmp_path)
    assert torch.equal(logits(loaded.eval()), logits(model.eval()))
    if "bias" not in values:
        with model.disable_adapter():
            assert torch.equal(logits(model), logits(tiny_model(arch)))


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_a_model_whose_own_biases_are_trained_is_never_taken_for_its_base(bias: str, tiny_model: Make) -> None:
    model = get_peft_model(tiny_model("gpt2"), settings(bias=bias))
    with pytest.raises(MoleError, match="is not the base model"), model.disable_adapter():
        pass
    for call in (model.unload, lambda: model.delete_adapter("default")):
        with pytest.raises(MoleError, match="is not the base model"):
            call()
    with pytest.raises(MoleError, match="which all adapters of a model share"):
        model.add_adapter("other", settings())
    without = get_peft_model(tiny_model("gpt2"), settings())
    with pytest.raises(MoleError, match="The adapter other trains biases of the base model itself"):
        without.add_adapter("other", settings(bias=bias))
    assert logits(without).isfinite().all()


def test_tokens_of_two_adapters_are_switched_with_them(tiny_model: Make) -> None:
    model = get_peft_model(tiny_model("gpt2"), settings(trainable_token_indices=[int(TOKENS[0, 0])]))
    model.add_adapter("other", settings(trainable_token_indices=[int(TOKENS[0, 1])]))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "trainable_tokens_delta" in name:
                weight.add_(1.0)
    base, found = logits(tiny_model("gpt2")), {}
    for name in ("default", "other", "default"):
        model.set_adapter(name)
        assert name not in found or torch.equal(found[name], logits(model.eval()))
        found[name] = logits(model.eval())
    assert not torch.equal(found["default"], found["other"]) and not torch.equal(found["default"], base)
    assert torch.equal(logits(model.unload()), base)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "biases that are not there": ({"bias": "all"}, "adapter.bias is 'all'; it must be none: this model has no biases"),
    "biases of a kind": ({"bias": "mole_only"}, "adapter.bias is 'mole_only'; it must be one of: none, lora_only, all"),
    "a token beyond the last": ({"trainable_token_indices": [9, 10**6]}, "trainable_token_indices is 1000000.*below"),
    "a token below 0": ({"trainable_token_indices": [-1]}, "ids from 0"),
    "a token twice": ({"trainable_token_indices": [3, 3]}, "different ids"),
    "tokens of nothing": ({"trainable_token_indices": {"embed": [3]}}, r"is 'embed'.*model.embed_tokens"),
    "tokens of what is trained whole": (
        {"trainable_token_indices": [3], "modules_to_save": ["embed_tokens"]}, "where modules_to_save has model.embed"
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_meant_is_refused_in_one_line(what: str, tiny_model: Make) -> None:
    values, line = REFUSED[what]
    refused(tiny_model(), line, **values)


@pytest.mark.parametrize("setting", ["modules_to_save", "target_modules"])
def test_tokens_of_a_tied_output_layer_are_not_trained_twice(setting: str, tiny_model: Make) -> None:
    """GPT-2's output layer has the embeddings' weights."""
    with pytest.raises(ConfigError, match=f"empty where {setting} has lm_head"):
        get_peft_model(tiny_model("gpt2"), settings(trainable_token_indices=[3], **{setting: ["lm_head"]}))
    get_peft_model(tiny_model("llama"), settings(trainable_token_indices=[3], **{setting: ["lm_head"]}))
