"""Targets: what a command's TARGET names, and what is said when there is no such thing."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from mole import models, runs
from mole.chat.model_cache import ModelCache
from mole.config import ModelConfig, RunConfig
from mole.core import checkpoint
from mole.core.errors import CheckpointError, ModelError, RunError
from mole.runs.targets import as_trained, device_of_target

CPU = ModelConfig(device="cpu", dtype="float32")


def on_cpu(name: str | Path) -> ModelConfig:
    return ModelConfig(name=str(name), device="cpu", dtype="float32")


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(3, 30)[None]).logits


def test_base_target_is_the_base_alone(tiny_folder: Path) -> None:
    loaded = runs.load_target(f"base:{tiny_folder}", CPU)
    assert (loaded.router, loaded.adapter_dir, loaded.notice) == ("none", None, None)
    assert loaded.base == str(tiny_folder) and loaded.name == f"base:{tiny_folder}"


def test_an_adapter_folder_finds_its_base_and_changes_its_output(tiny_adapter: Path, tiny_folder: Path) -> None:
    loaded = runs.load_target(str(tiny_adapter), CPU)
    assert (loaded.router, loaded.adapter_dir, loaded.base) == ("dynmole", tiny_adapter, str(tiny_folder))
    assert loaded.notice is None and not loaded.model.training
    assert not torch.allclose(logits(loaded.model), logits(models.load_base(on_cpu(tiny_folder)).model))


def test_an_adapter_of_another_peft_method_loads_too(tiny_folder: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    model = get_peft_model(models.load_base(on_cpu(tiny_folder)).model, config).eval()
    model.save_pretrained(str(tmp_path))
    loaded = runs.load_target(str(tmp_path), CPU)
    assert loaded.router == "none"
    torch.testing.assert_close(logits(loaded.model), logits(model))


def test_the_adapters_template_wins_and_a_difference_is_said(tiny_adapter: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_adapter, tmp_path / "adapter")
    (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}!")
    loaded = runs.load_target(str(folder), CPU)
    assert loaded.notice is not None and "chat template saved with the adapter" in loaded.notice
    from mole.data import render_prompt

    assert render_prompt([{"role": "user", "content": "hi"}], loaded.tokenizer) == "hi!"


def test_pickled_adapter_weights_are_refused(tiny_adapter: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_adapter, tmp_path / "adapter")
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(ModelError, match="only pickled weights"):
        runs.load_target(str(folder), CPU)


def test_an_adapter_changed_since_it_was_written_is_refused(tiny_adapter: Path, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    checkpoint.write_folder(folder, lambda aside: shutil.copytree(tiny_adapter, aside, dirs_exist_ok=True), step=1)
    runs.load_target(str(folder), CPU)
    with (folder / "adapter_model.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x7f")
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors has changed"):
        runs.load_target(str(folder), CPU)


def test_an_adapter_that_does_not_fit_the_base_is_one_clear_line(tiny_adapter: Path, tiny_model: Any) -> None:
    base = models.Base(tiny_model("gpt2"), None, "gpt2", torch.device("cpu"), torch.float32)
    with pytest.raises(ModelError, match="does not load on gpt2") as error:
        models.attach(base, tiny_adapter)
    assert "\n" not in str(error.value)


def test_the_embedded_base_is_found_under_another_home(tiny_adapter: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_adapter, tmp_path / "adapter")
    config = json.loads((folder / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "/home/somebody/.mole/models/smollm2-135m"
    (folder / "adapter_config.json").write_text(json.dumps(config))
    assert runs.locate(str(folder)) == ("smollm2-135m", folder)


def test_a_run_is_found_by_name_with_its_base(home: Path, tiny_adapter: Path, tiny_folder: Path) -> None:
    config = RunConfig(name="mine", model=on_cpu(tiny_folder))
    run = runs.create(config)
    with pytest.raises(RunError, match=r"mine is .* and has no adapter yet"):
        runs.load_target("mine", CPU)
    run.append_event("stopped", 3)
    with pytest.raises(RunError, match=r"mine is stopped .* `mole runs resume mine`"):
        runs.load_target("mine", CPU)
    shutil.copytree(tiny_adapter, run.adapter_dir)
    loaded = runs.load_target("mine", CPU)
    assert (loaded.name, loaded.base, loaded.adapter_dir) == ("mine", str(tiny_folder), run.adapter_dir)


def test_a_target_is_loaded_in_as_many_bits_as_it_was_trained_in(
    home: Path, tiny_adapter: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chat, the studio and evaluation go this way; a run on a 4-bit base may not fit in 16."""
    run = runs.create(RunConfig(name="mine", model=dataclasses.replace(on_cpu(tiny_folder), quantization="4bit")))
    shutil.copytree(tiny_adapter, run.adapter_dir)
    wanted = ModelConfig(device="cpu", dtype="float32")
    assert as_trained(wanted, run.adapter_dir) == (dataclasses.replace(wanted, quantization="4bit"), None)
    assert as_trained(wanted, None) == as_trained(wanted, tiny_adapter) == (wanted, None)
    loaded = runs.load_target("mine", CPU)
    cache = ModelCache()
    with cache.use("mine", CPU) as cached, cache.use(f"base:{tiny_folder}", CPU) as whole:
        footprints = [each.model.get_memory_footprint() for each in (loaded, cached, whole)]
        assert footprints[0] == footprints[1] < footprints[2]
    monkeypatch.setattr("mole.models.loading.importlib.util.find_spec", lambda name: None)
    loaded = runs.load_target("mine", CPU)
    assert loaded.model.get_memory_footprint() > footprints[0]
    assert loaded.notice is not None and loaded.notice.startswith("The adapter was trained on a 4bit base model; here")


def test_a_target_is_used_where_its_run_trained_if_that_is_here(home: Path, tiny_adapter: Path) -> None:
    for name, device in (("on-cpu", "cpu"), ("elsewhere", "cuda:7")):
        run = runs.create(RunConfig(name=name, model=ModelConfig(device=device)))
        shutil.copytree(tiny_adapter, run.adapter_dir)
    found = [device_of_target(target) for target in ("on-cpu", "elsewhere", str(tiny_adapter), "base:x")]
    assert found == ["cpu", "auto", "auto", "auto"]


@pytest.mark.parametrize(
    "target, message",
    [
        ("nothing", "There is no run and no adapter folder 'nothing'; runs: none yet"),
        ("../nothing", "There is no adapter folder ../nothing"),
        ("base:./nothing", "There is no model at ./nothing"),
    ],
)
def test_a_target_that_is_not_there_is_said(home: Path, target: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        runs.load_target(target, CPU)


def test_a_folder_without_adapter_is_said(home: Path, tiny_folder: Path) -> None:
    with pytest.raises(ModelError, match=r"holds no adapter: it has no adapter_config\.json"):
        runs.load_target(str(tiny_folder), CPU)


def test_a_checkpoint_of_a_run_is_a_target(home: Path, tiny_adapter: Path, tiny_folder: Path) -> None:
    run = runs.create(RunConfig(name="mine", model=on_cpu(tiny_folder)))
    with pytest.raises(RunError, match="mine has no checkpoint of step 20; it has none"):
        runs.locate("mine@20")
    for step in (3, 20):
        copy = functools.partial(shutil.copytree, tiny_adapter, dirs_exist_ok=True)
        checkpoint.write(run.checkpoints_dir, step, copy, limit=2)
    run.append_event("stopped", 20)
    with pytest.raises(RunError, match="or take its newest checkpoint: mine@20"):
        runs.locate("mine")
    with pytest.raises(RunError, match="no checkpoint of step 7; checkpoints: mine@3, mine@20"):
        runs.load_target("mine@7", CPU)
    with pytest.raises(RunError, match=r"no checkpoint of step \(empty\)"):
        runs.load_target("mine@", CPU)
    with pytest.raises(ModelError, match="no run and no adapter folder 'other@3'"):
        runs.load_target("other@3", CPU)
    folder = run.checkpoints_dir / "step-20"
    loaded = runs.load_target("mine@20", CPU)
    assert (loaded.name, loaded.base, loaded.adapter_dir) == ("mine@20", str(tiny_folder), folder)
    assert runs.locate(str(folder)) == (str(tiny_folder), folder), "typed as a folder it is the same"
    with (folder / "adapter_model.safetensors").open("r+b") as file:
        file.write(b"\x00")
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors has changed"):
        runs.load_target("mine@20", CPU)
    (folder / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="was not completely written"):
        runs.load_target("mine@20", CPU)
