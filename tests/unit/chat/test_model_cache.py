"""Several targets in memory: they share what they can, answer as each alone does, and leave when memory runs short."""

from __future__ import annotations

import json
import os
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapting import adapt, logits
from peft import LoraConfig, get_peft_model

from mole import record_routing
from mole.chat.model_cache import ModelCache
from mole.config import ModelConfig
from mole.core.errors import MoleError
from mole.models import sizes
from mole.models.loading import load_base
from mole.runs.targets import load_target

CPU = ModelConfig(device="cpu", dtype="float32")


@pytest.fixture
def targets(tmp_path: Path, tiny_folder: Path, tiny_tokenizer: Any) -> dict[str, str]:
    """The base, three adapters of ours with different shapes and templates, and one of another PEFT method."""
    found = {"base": f"base:{tiny_folder}"}
    config = ModelConfig(name=str(tiny_folder), device="cpu", dtype="float32")
    for seed, (name, router, values) in enumerate(
        [
            ("dynmole", "dynmole", {}),
            ("few", "topk", {"num_experts": [2, 4], "target_modules": ["q_proj", "down_proj"]}),
            ("lora", "lora", {"num_experts": 1, "modules_to_save": ["lm_head", "norm"]}),
        ]
    ):
        model = adapt(load_base(config).model, router, seed, **values)
        for weight_name, weight in model.named_parameters():
            if "modules_to_save" in weight_name:
                weight.data.mul_(1.5)
        model.save_pretrained(tmp_path / name)
        (tmp_path / name / "chat_template.jinja").write_text(f"{{{{ messages[0]['content'] }}}} {name}:")
        found[name] = str(tmp_path / name)
    foreign = LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    get_peft_model(load_base(config).model, foreign).save_pretrained(str(tmp_path / "foreign"))
    return {**found, "foreign": str(tmp_path / "foreign")}


def plenty(device: torch.device) -> int:
    return 1 << 60


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_switching_gives_the_very_logits_of_each_loaded_alone(targets: dict[str, str], dtype: str) -> None:
    config = ModelConfig(device="cpu", dtype=dtype)
    alone = {name: logits(load_target(target, config).model) for name, target in targets.items()}
    assert len({values.sum().item() for values in alone.values()}) == len(alone), "they do differ"
    cache, embeddings = ModelCache(plenty), set()
    for name in ("base", "dynmole", "base", "few", "lora", "foreign", "dynmole", "base", "few", "foreign", "lora"):
        with cache.use(targets[name], config) as loaded:
            assert torch.equal(logits(loaded.model), alone[name]), name
            embeddings.add(loaded.model.get_input_embeddings().weight.data_ptr())
    assert len(cache) == 5 and len(embeddings) == 2, "ours share one base; the other method has its own"


def test_each_target_has_its_own_template_and_only_its_own_routing(targets: dict[str, str]) -> None:
    cache = ModelCache(plenty)
    seen = {}
    for name in ("dynmole", "base", "few", "lora", "base"):
        with cache.use(targets[name], CPU) as loaded, record_routing(loaded.model) as trace:
            logits(loaded.model)
            seen[name] = (loaded.tokenizer.chat_template.split()[-1], trace.router, trace.experts, len(trace.modules))
    assert seen["dynmole"] == ("dynmole:", "dynmole", 4, 14)
    assert seen["few"] == ("few:", "topk", 4, 4)
    assert seen["lora"] == ("lora:", "lora", 1, 14)
    assert seen["base"][1:] == ("none", 0, 0) and not seen["base"][0].endswith(":")


def test_a_run_trained_anew_is_loaded_anew(targets: dict[str, str]) -> None:
    cache = ModelCache(plenty)
    with cache.use(targets["dynmole"], CPU) as loaded:
        before = logits(loaded.model)
    shutil.copy(Path(targets["lora"]) / "adapter_config.json", Path(targets["dynmole"]) / "adapter_config.json")
    shutil.copy(Path(targets["lora"]) / "adapter_model.safetensors", Path(targets["dynmole"]))
    os.utime(Path(targets["dynmole"]) / "adapter_config.json", ns=(1, 1))
    assert not cache.holds(targets["dynmole"], CPU)
    with cache.use(targets["dynmole"], CPU) as loaded:
        assert loaded.router == "lora" and not torch.equal(logits(loaded.model), before)


def test_the_target_used_longest_ago_goes_when_memory_runs_short(targets: dict[str, str]) -> None:
    left = {"bytes": 1 << 60}
    cache = ModelCache(lambda device: left["bytes"])
    base: dict[str, weakref.ref[Any]] = {}
    for name in ("base", "foreign", "dynmole", "lora", "dynmole"):
        with cache.use(targets[name], CPU) as loaded:
            base[name] = weakref.ref(loaded.model.get_input_embeddings())
    del loaded
    left["bytes"] = 0
    with cache.use(targets["few"], CPU) as loaded:
        assert loaded.model.get_input_embeddings() is base["dynmole"](), "the base they share stays, with the newest"
    assert [name for name, target in targets.items() if cache.holds(target, CPU)] == ["dynmole", "few"]
    assert base["foreign"]() is None, "the other method's base is given back"


def test_what_fits_stays(targets: dict[str, str], tiny_folder: Path) -> None:
    base = sizes.parameters(sizes.files_of(str(tiny_folder))) * 4
    model = load_base(ModelConfig(name=str(tiny_folder), device="cpu", dtype="float32")).model
    assert base == sum(weight.numel() for weight in model.parameters()) * 4
    cache = ModelCache(lambda device: base * 2)  # always room for one more, adapter and margin included
    for target in targets.values():
        with cache.use(target, CPU):
            pass
    assert len(cache) == len(targets)


@pytest.mark.parametrize("last", ["dynmole", "lora"])  # the second trains modules whole
def test_after_the_last_adapter_has_left_the_base_answers_as_before(targets: dict[str, str], last: str) -> None:
    left = {"bytes": 1 << 60}
    cache = ModelCache(lambda device: left["bytes"])
    alone = logits(load_target(targets["few"], CPU).model)
    with cache.use(targets["base"], CPU) as loaded:
        before = logits(loaded.model)
    with cache.use(targets[last], CPU):
        pass
    with cache.use(targets["base"], CPU):
        pass
    left["bytes"] = 0  # drops the only adapter, and keeps the base, the newest
    with cache.use(targets["few"], CPU) as loaded:
        assert torch.equal(logits(loaded.model), alone)
    assert not cache.holds(targets[last], CPU)
    with cache.use(targets["base"], CPU) as loaded:
        assert torch.equal(logits(loaded.model), before)


def test_an_adapter_that_changes_biases_of_the_base_leaves_that_of_others_alone(
    tmp_path: Path, tiny_model: Any, tiny_tokenizer: Any
) -> None:
    for part in (tiny_model("gpt2"), tiny_tokenizer):
        part.save_pretrained(tmp_path / "gpt2")
    config = ModelConfig(name=str(tmp_path / "gpt2"), device="cpu", dtype="float32")
    for name, values in {"biased": {"bias": "all"}, "plain": {}}.items():
        model = adapt(load_base(config).model, **values)
        for weight_name, weight in model.named_parameters():
            if weight_name.endswith(".bias") and name == "biased":
                weight.data.add_(0.5)
        model.save_pretrained(tmp_path / name)
    targets = [f"base:{tmp_path / 'gpt2'}", str(tmp_path / "plain"), str(tmp_path / "biased")]
    alone = {target: logits(load_target(target, CPU).model) for target in targets}
    cache = ModelCache(plenty)
    for target in [*targets, *reversed(targets)]:
        with cache.use(target, CPU) as loaded:
            assert torch.equal(logits(loaded.model), alone[target])
    assert not torch.equal(alone[targets[1]], alone[targets[2]])
    cache.clear()
    assert len(cache) == 0


def test_an_adapter_that_does_not_load_leaves_no_trace(targets: dict[str, str], tmp_path: Path) -> None:
    cache = ModelCache(plenty)
    with cache.use(targets["base"], CPU) as loaded:
        before = logits(loaded.model)
    broken = Path(shutil.copytree(targets["dynmole"], tmp_path / "broken"))
    values = json.loads((broken / "adapter_config.json").read_text())
    (broken / "adapter_config.json").write_text(json.dumps({**values, "r": 3}))
    with pytest.raises(MoleError, match="does not load on"), cache.use(str(broken), CPU):
        pass
    with cache.use(targets["base"], CPU) as loaded:
        assert torch.equal(logits(loaded.model), before)


def test_clearing_gives_the_memory_back(targets: dict[str, str]) -> None:
    cache = ModelCache(plenty)
    with cache.use(targets["dynmole"], CPU) as loaded:
        base = weakref.ref(loaded.model.get_base_model())
    del loaded
    cache.clear("cuda")
    assert len(cache) == 1
    cache.clear()
    assert len(cache) == 0 and base() is None


def test_weights_are_counted_from_headers(tmp_path: Path, tiny_model: Callable[..., Any]) -> None:
    assert sizes.parameters([tmp_path / "nothing.safetensors"]) == 0
    assert sizes.files_of("no/such-folder-here/at-all") == []
