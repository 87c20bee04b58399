"""Patterns in `target_modules` of a mixture: the modules PEFT would choose, written down by their names."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapting import adapt, layers_of, logits, settings
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from torch import nn

from mole.core.errors import ConfigError

Make = Callable[..., Any]
PATTERNS = {
    "llama": [
        r".*\.(q|v)_proj", r".*_proj", r".*layers\.1\..*_proj", r"(.*\.)?self_attn\.[qk]_proj", "(?i).*Q_PROJ",
        r"model\.layers\.\d+\.mlp\.(?:up|down)_proj", "lm_head", r"lm_head|.*\.o_proj", r".*\.0\.self_attn\.q_proj",
    ],
    "gpt2": [r".*\.c_attn", r".*\.mlp\.c_(fc|proj)", r".*h\.0\..*c_proj"],
}  # fmt: skip
CASES = [(arch, pattern) for arch, patterns in PATTERNS.items() for pattern in patterns]


def adapted(model: Any) -> set[str]:
    """Names of the modules that have an adapter."""
    return {name for name, module in model.get_base_model().named_modules() if hasattr(module, "base_layer")}


@pytest.mark.parametrize(("arch", "pattern"), CASES)
def test_a_pattern_adapts_what_peft_itself_adapts(arch: str, pattern: str, tiny_model: Make, tmp_path: Path) -> None:
    theirs = get_peft_model(tiny_model(arch), LoraConfig(target_modules=pattern, task_type="CAUSAL_LM"))
    ours = adapt(tiny_model(arch), target_modules=pattern)
    assert adapted(ours) == adapted(theirs)
    ours.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]
    assert written == sorted(written) and all(re.fullmatch(r"[\w.]+", name) for name in written)
    loaded = PeftModel.from_pretrained(tiny_model(arch), tmp_path)
    assert adapted(loaded) == adapted(theirs)
    assert torch.equal(logits(loaded), logits(ours))


@pytest.mark.parametrize("layers", [3, 9])
def test_also_where_peft_shortens_a_long_list_of_names(layers: int, tiny_model: Make, tmp_path: Path) -> None:
    """From 20 names on PEFT replaces full names by their ends, as far as no other module is meant by them."""
    pattern = r".*layers\.[0-7]\..*_proj"
    theirs = get_peft_model(tiny_model(layers=layers), LoraConfig(target_modules=pattern, task_type="CAUSAL_LM"))
    ours = adapt(tiny_model(layers=layers), target_modules=pattern, r=1)
    assert adapted(ours) == adapted(theirs)
    ours.save_pretrained(tmp_path)
    assert adapted(PeftModel.from_pretrained(tiny_model(layers=layers), tmp_path)) == adapted(theirs)


def test_an_adapter_file_with_a_pattern_loads_by_every_way(tiny_model: Make, tmp_path: Path) -> None:
    """Earlier versions kept the pattern in `adapter_config.json`."""
    model = adapt(tiny_model(), target_modules=r".*\.(q|v)_proj")
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "target_modules": r".*\.(q|v)_proj"}))
    loaded = PeftModel.from_pretrained(tiny_model(), tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    native = tiny_model()
    native.load_adapter(str(tmp_path))
    assert {layer.name for layer in layers_of(native)} == {layer.name for layer in layers_of(model)}
    torch.testing.assert_close(logits(native.eval()), logits(model), rtol=0, atol=1e-6)


def test_a_second_adapter_with_a_pattern_adapts_no_inner_module_of_the_first(tiny_model: Make) -> None:
    model = adapt(tiny_model(), target_modules=["q_proj"])
    model.add_adapter("other", settings("topk", target_modules=r".*(q|k)_proj.*"))
    first, second = (
        {layer.name for layer in layers_of(model) if name in layer.routers} for name in ("default", "other")
    )
    assert {name.rpartition(".")[2] for name in first} == {"q_proj"}
    assert {name.rpartition(".")[2] for name in second} == {"q_proj", "k_proj"} and len(second) == 4


@pytest.mark.parametrize("targets", ["q_proj", "nothing.*", "(.+)+!", "", ["nothing"]])
def test_targets_that_name_no_module_are_refused_with_the_layers_there_are(targets: Any, tiny_model: Make) -> None:
    with pytest.raises(ConfigError, match=r"adapter.target_modules is .*down_proj, gate_proj, k_proj, lm_head"):
        get_peft_model(tiny_model(), settings(target_modules=targets))


@pytest.mark.parametrize("targets", [".*norm", ".*mlp", ".*", ["embed_tokens", "q_proj"]])
def test_targets_that_name_other_modules_than_linear_ones_are_refused(targets: Any, tiny_model: Make) -> None:
    model = tiny_model()
    with pytest.raises(ConfigError, match=r"linear layers only \(down_proj.* is a "):
        get_peft_model(model, settings(target_modules=targets))
    assert not layers_of(model)


def test_a_full_name_that_ends_another_one_is_refused() -> None:
    """PEFT takes a name in a list for the end of a name, and would adapt both."""
    model = nn.ModuleDict({"proj": nn.Linear(4, 4), "block": nn.ModuleDict({"proj": nn.Linear(4, 4)})})
    with pytest.raises(ConfigError, match=r"both proj and block\.proj"):
        inject_adapter_in_model(settings(target_modules="proj"), model)
    assert len(layers_of(inject_adapter_in_model(settings(target_modules=r"(.*\.)?proj"), model))) == 2


def test_names_in_a_list_are_compared_as_they_are(tiny_model: Make) -> None:
    model = adapt(tiny_model(), target_modules=["q_proj", ".*", "(.+)+!", "k.proj"])
    assert {layer.name.rpartition(".")[2] for layer in layers_of(model)} == {"q_proj"}
    assert model.peft_config["default"].target_modules == ["q_proj"]
