"""LoRA's settings that choose layers and scale the update mean the same for a mixture, and are saved with it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapting import TOKENS, layers_of, logits, settings, shake
from peft import LoraConfig, PeftModel, get_peft_model

from mole.config import AdapterConfig
from mole.core.errors import ConfigError

Make = Callable[..., Any]


def names_of(model: Any) -> set[str]:
    """The full names of the adapted projections."""
    return {layer.name for layer in layers_of(model)}


def loras_choice(model: Any, **values: Any) -> set[str]:
    """The projections that PEFT's LoRA adapts with these settings."""
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **values))
    prefix = "base_model.model."
    return {name.removeprefix(prefix) for name, module in adapted.named_modules() if hasattr(module, "lora_A")}


CHOICES: dict[str, dict[str, Any]] = {
    "excluded names": {"target_modules": "all-linear", "exclude_modules": ["gate_proj", "layers.1.mlp.up_proj"]},
    "an excluded pattern": {"target_modules": "all-linear", "exclude_modules": r".*layers\.0\..*_proj"},
    "a layer": {"target_modules": ["q_proj", "o_proj", "up_proj"], "layers_to_transform": [1]},
    "layers of a list": {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [0, 2]},
    "both": {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [0, 2], "exclude_modules": ["v_proj"]},
}


@pytest.mark.filterwarnings("error:You have passed exclude_modules")
@pytest.mark.parametrize("what", CHOICES)
def test_the_same_projections_are_adapted_as_by_lora(what: str, tiny_model: Make, tmp_path: Path) -> None:
    model = get_peft_model(tiny_model(layers=3), settings(**CHOICES[what]))
    assert names_of(model) == loras_choice(tiny_model(layers=3), **CHOICES[what])
    shake(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model(layers=3), tmp_path)
    assert names_of(loaded) == names_of(model)
    assert torch.equal(logits(loaded.eval(), TOKENS), logits(model.eval(), TOKENS))


def test_a_layer_of_all_linear_is_all_of_its_projections(tiny_model: Make) -> None:
    """LoRA has no such combination."""
    model = get_peft_model(tiny_model(), settings(layers_to_transform=[1]))
    assert len(names_of(model)) == 7 and all(name.startswith("model.layers.1.") for name in names_of(model))


def test_only_names_stand_in_the_saved_settings(tiny_model: Make, tmp_path: Path) -> None:
    """A pattern in a file must not be able to hang who reads it."""
    get_peft_model(tiny_model(), settings(**CHOICES["an excluded pattern"])).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert isinstance(saved["exclude_modules"], list) and "model.layers.0.mlp.up_proj" in saved["exclude_modules"]
    assert saved["target_modules"] and all("layers.1." in name for name in saved["target_modules"])


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a name that no module has": ({"exclude_modules": ["q_prj"]}, "adapter.exclude_modules is .*the name of a module"),
    "a layer beyond the last": ({"layers_to_transform": [1, 7]}, "this model has 0 to 1, not 7"),
    "a layer below 0": ({"layers_to_transform": [-1]}, "a list of numbers from 0"),
    "nothing left": ({"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]}, "target modules are left"),
    "a pattern without end": ({"exclude_modules": "(?=a)b"}, "adapter.exclude_modules"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_meant_is_refused_in_one_line(what: str, tiny_model: Make) -> None:
    values, line = REFUSED[what]
    with pytest.raises(ConfigError, match=line) as error:
        get_peft_model(tiny_model(), settings(**values))
    assert "\n" not in str(error.value)


def test_rslora_multiplies_by_alpha_over_the_root_of_r(tiny_model: Make) -> None:
    outputs = []
    for alpha, rslora in ((8.0, True), (8.0 * math.sqrt(4), False)):
        model = get_peft_model(tiny_model(), settings(r=4, lora_alpha=alpha, use_rslora=rslora))
        shake(model)
        assert {layer.scaling["default"] for layer in layers_of(model)} == {4.0}
        outputs.append(logits(model.eval(), TOKENS))
    assert torch.equal(*outputs)


def test_empty_boxes_of_the_form_mean_all_layers() -> None:
    adapter = AdapterConfig.from_flat({"exclude_modules": "", "layers_to_transform": ""})
    assert adapter.exclude_modules is None and adapter.layers_to_transform is None
    assert AdapterConfig.from_flat({"layers_to_transform": "20, 21"}).layers_to_transform == [20, 21]
