"""LoRA's settings that choose layers and scale the update mean the same for a mixture, and are saved with it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapting import TOKENS, layers_of, logits, refused, settings, shake
from architectures import build
from peft import LoraConfig, PeftModel, get_peft_model

from mole.config import AdapterConfig

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
    "layers of a named list": {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
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


@pytest.mark.parametrize("lists", ["decoder.block", ["nothing", "encoder.block"], r"(en|de)coder\.block"])
def test_layers_are_counted_in_the_lists_that_are_named(lists: str | list[str], tmp_path: Path) -> None:
    """An encoder-decoder has two lists of layers."""
    chosen = {"target_modules": ["q", "wo"], "layers_to_transform": [1], "layers_pattern": lists}
    model = get_peft_model(build("t5"), settings(**chosen))
    assert names_of(model) == loras_choice(build("t5"), **chosen)
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())["layers_pattern"]
    assert set(saved) <= {"encoder.block", "decoder.block"}, "full names, no patterns"
    assert names_of(PeftModel.from_pretrained(build("t5"), tmp_path)) == names_of(model)


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


def loras_ranks(model: Any, **values: Any) -> dict[str, tuple[int, float]]:
    """Rank and scaling of each projection by PEFT's LoRA."""
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=2, lora_alpha=2, **values))
    return {
        name.removeprefix("base_model.model."): (module.r["default"], module.scaling["default"])
        for name, module in adapted.named_modules()
        if hasattr(module, "lora_A")
    }


PATTERNS: dict[str, dict[str, Any]] = {
    "names": {"rank_pattern": {"q_proj": 4, "layers.1.mlp.down_proj": 1}, "alpha_pattern": {"down_proj": 3.0}},
    "patterns": {"rank_pattern": {r"layers\.[12]\.mlp\..*": 3, "down_proj": 8}},
    "rsLoRA": {"rank_pattern": {"v_proj": 4}, "alpha_pattern": {"layers.0.self_attn.v_proj": 8.0}, "use_rslora": True},
}


@pytest.mark.parametrize("what", PATTERNS)
def test_ranks_and_alphas_of_some_projections_are_those_of_lora(what: str, tiny_model: Make, tmp_path: Path) -> None:
    targets = ["q_proj", "v_proj", "down_proj"]
    model = get_peft_model(tiny_model(layers=3), settings(target_modules=targets, **PATTERNS[what]))
    wanted = loras_ranks(tiny_model(layers=3), target_modules=targets, **PATTERNS[what])
    assert {layer.name: (layer.r["default"], layer.scaling["default"]) for layer in layers_of(model)} == wanted
    assert len({rank for rank, _ in wanted.values()}) > 1
    shake(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model(layers=3), tmp_path)
    assert torch.equal(logits(loaded.eval(), TOKENS), logits(model.eval(), TOKENS))
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert set(saved["rank_pattern"]) <= names_of(model), "full names, no patterns"


def test_projections_of_other_ranks_compute_by_themselves(tiny_model: Make) -> None:
    """q and k read the same input; with one rank they are computed together."""
    model = get_peft_model(tiny_model(), settings(rank_pattern={"k_proj": 6}))
    shake(model)
    model = model.double().train()
    together = model(input_ids=TOKENS).logits
    for layer in layers_of(model):
        layer.group = type(layer.group)([layer])
    torch.testing.assert_close(model(input_ids=TOKENS).logits, together, rtol=0, atol=1e-12)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a name that no module has": ({"exclude_modules": ["q_prj"]}, "adapter.exclude_modules is .*the name of a module"),
    "a layer beyond the last": ({"layers_to_transform": [1, 7]}, "this model has 0 to 1, not 7"),
    "a layer below 0": ({"layers_to_transform": [-1]}, "a list of numbers from 0"),
    "a list of layers that is not there": (
        {"layers_to_transform": [1], "layers_pattern": "blocks"},
        r"layers_pattern is .*of this model \(model.layers\)",
    ),
    "a list of layers without layers": ({"layers_pattern": "layers"}, "empty where layers_to_transform is"),
    "a pattern of lists that backtracks": ({"layers_to_transform": [1], "layers_pattern": "(?=a)b"}, "layers_pattern"),
    "a module to save that is not there": (
        {"modules_to_save": ["lm_hed"]},
        "modules_to_save is 'lm_hed'.*the end of a module's name.*lm_head",
    ),
    "a list of layers to save": ({"modules_to_save": ["layers"]}, "modules_to_save.*model.layers is a ModuleList"),
    "a module to save without weights": ({"modules_to_save": ["rotary_emb"]}, "modules_to_save is 'rotary_emb'"),
    "all of it saved whole": (
        {"target_modules": ["up_proj"], "modules_to_save": ["mlp"]},
        "modules_to_save.*target modules are left",
    ),
    "nothing left": ({"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]}, "target modules are left"),
    "a rank for nothing": ({"rank_pattern": {"q_prj": 2}}, "adapter.rank_pattern is 'q_prj'; it must be the name"),
    "a rank of 0": (
        {"rank_pattern": {"q_proj": 0}},
        "adapter.rank_pattern.q_proj is 0; it must be a rank of 1 to 1024",
    ),
    "an alpha of 0": ({"alpha_pattern": {"q_proj": 0.0}}, "adapter.alpha_pattern.q_proj is 0.0"),
    "a pattern that backtracks": ({"rank_pattern": {"(?=a)b": 2}}, "adapter.rank_pattern"),
    "a pattern without end": ({"exclude_modules": "(?=a)b"}, "adapter.exclude_modules"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_meant_is_refused_in_one_line(what: str, tiny_model: Make) -> None:
    values, line = REFUSED[what]
    refused(tiny_model(), line, **values)


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
    assert AdapterConfig.from_flat({"layers_to_transform": "20"}).layers_to_transform == [20]
    assert AdapterConfig.from_flat({"modules_to_save": "lm_head", "layers_pattern": ""}).modules_to_save == ["lm_head"]
    assert AdapterConfig.from_flat({"rank_pattern": "{down_proj: 16}"}).rank_pattern == {"down_proj": 16}
