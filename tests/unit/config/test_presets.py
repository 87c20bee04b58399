"""Presets are the set-ups of the papers, setting by setting, and one's own come back as they were saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mole.config import ROUTERS, RunConfig, delete_preset, find_preset, presets_dir, save_preset, saved_presets
from mole.core.errors import InputError, RunError

FFN = ["gate_proj", "up_proj", "down_proj"]
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
PAPERS: dict[str, dict[str, Any]] = {
    "dynmole": {
        "adapter.router": "dynmole", "adapter.num_experts": 6, "adapter.r": 24, "adapter.lora_alpha": 48,
        "adapter.lora_dropout": 0.05, "adapter.target_modules": FFN, "adapter.entropy_threshold": 0.9,
        "adapter.entropy_index": 1.1, "adapter.entropy_type": "tsallis", "adapter.top_p": 0.75,
        "adapter.keep_top_k": 2, "adapter.inclusive_top_p": False, "adapter.entropy_loss_coef": 0.01,
        "adapter.balance_loss_coef": 0.001, "adapter.z_loss_coef": 0.0,
        "training.learning_rate": 2e-4, "training.lr_scheduler_type": "constant", "training.warmup_steps": 0,
        "training.per_device_train_batch_size": 16, "training.num_train_epochs": 2, "training.max_steps": 0,
        "data.max_length": 512,
    },
    "adamole": {
        "adapter.router": "adamole", "adapter.num_experts": 8, "adapter.r": 4, "adapter.lora_alpha": 16,
        "adapter.target_modules": ATTENTION, "adapter.max_threshold": None, "adapter.balance_loss_coef": 0.001,
        "adapter.balance_on_margin": False, "training.learning_rate": 1e-4, "training.warmup_steps": 200,
        "training.lr_scheduler_type": "constant_with_warmup", "training.per_device_train_batch_size": 16,
        "training.num_train_epochs": 2, "training.max_steps": 0, "data.max_length": 256,
    },
    "mola": {
        "adapter.router": "topk", "adapter.top_k": 2, "adapter.num_experts": [2, 4, 6, 8], "adapter.r": 8,
        "adapter.lora_alpha": 16, "adapter.lora_dropout": 0.05, "adapter.target_modules": "all-linear",
        "adapter.balance_loss_coef": 0.001, "training.learning_rate": 3e-4, "training.warmup_steps": 100,
        "training.max_steps": 0,
    },
    "loramoe": {
        "adapter.router": "dense", "adapter.num_experts": 8, "adapter.r": 4, "adapter.lora_alpha": 32,
        "adapter.cv_loss_coef": 0.0, "training.max_steps": 0,
    },
    "ldmole": {
        "adapter.router": "sparsegen", "adapter.num_experts": 8, "adapter.r": 8, "adapter.lora_alpha": 16,
        "adapter.lora_dropout": 0.1, "adapter.target_modules": "all-linear", "adapter.lambda_hidden": 64,
        "adapter.lambda_activation": "relu", "adapter.balance_loss_coef": 1.0, "adapter.sparsity_loss_coef": 0.0,
        "adapter.sparsity_k": 2, "training.learning_rate": 1e-4, "training.weight_decay": 0.1, "training.max_steps": 0,
    },
    "lora": {"adapter.router": "lora", "adapter.num_experts": 1, "training.max_steps": 0},
}  # fmt: skip
"""What the papers and the authors' code say, written out once more."""

MINE = {
    "model": {"name": "some/model", "dtype": "float16", "quantization": "8bit", "device": "cuda:1"},
    "data": {"path": "mine.jsonl", "eval_path": "held.jsonl", "eval_fraction": 0.1, "columns": {"prompt": "q"}},
    "adapter": {"router": "topp", "top_p": 0.5, "r": 99},
    "training": {"seed": 5},
}


def setting(config: RunConfig, dotted: str) -> Any:
    section, _, name = dotted.partition(".")
    return config.to_dict()[section][name]


@pytest.mark.parametrize("name", PAPERS)
def test_a_papers_preset_has_the_papers_values(name: str) -> None:
    config = find_preset(name).run_config({})
    assert {dotted: setting(config, dotted) for dotted in PAPERS[name]} == PAPERS[name]
    assert find_preset(name).paper == ROUTERS[config.adapter.router].paper


def test_a_preset_keeps_model_and_data_and_puts_all_else_back() -> None:
    config = find_preset("mola").run_config(MINE)
    assert config.to_dict()["model"] == MINE["model"]
    assert {key: setting(config, f"data.{key}") for key in MINE["data"]} == MINE["data"]
    assert (config.adapter.r, config.training.seed) == (8, 0)


def test_the_presets_of_a_machine_say_which_model() -> None:
    small, large = find_preset("cpu").run_config(MINE), find_preset("gpu-24gb").run_config(MINE)
    assert (small.model.name, small.model.device, small.data.path) == ("smollm2-135m", "cpu", "mine.jsonl")
    assert small.adapter == RunConfig().adapter
    assert (large.model.dtype, large.model.quantization, large.model.device) == ("bfloat16", "4bit", "cuda")
    assert large.training.gradient_checkpointing
    assert large.training.per_device_train_batch_size * large.training.gradient_accumulation_steps == 16


def test_ones_own_come_back_as_they_were_saved(home: Path) -> None:
    config = RunConfig.from_dict(MINE)
    save_preset("my-way", config)
    found = find_preset("my-way")
    assert found.user_saved and "topp on some/model" in found.summary
    assert found.run_config({"model": {"name": "another"}, "data": {"path": "other.jsonl"}}) == config
    save_preset("my-way", RunConfig())
    assert [preset.name for preset in saved_presets()] == ["my-way"]
    assert find_preset("my-way").run_config({}) == RunConfig()
    delete_preset("my-way")
    assert saved_presets() == []
    with pytest.raises(RunError, match="no saved preset 'my-way'"):
        delete_preset("my-way")


@pytest.mark.parametrize(("name", "reason"), [("mola", "built-in"), ("../x", "not allowed"), ("", "not allowed")])
def test_names_that_would_hide_or_leave_are_refused(home: Path, name: str, reason: str) -> None:
    with pytest.raises(RunError, match=reason):
        save_preset(name, RunConfig())
    assert not presets_dir().exists()


def test_a_damaged_file_is_passed_over_and_a_wrong_one_says_what_is_wrong(home: Path) -> None:
    presets_dir().mkdir()
    (presets_dir() / "damaged.yaml").write_text("a: [")
    (presets_dir() / "odd.yaml").write_text("adapter: 5\nmodel: {device: tpu}")
    assert [preset.name for preset in saved_presets()] == ["odd"]
    with pytest.raises(InputError, match=r"model\.device"):
        find_preset("odd").run_config({})
    with pytest.raises(InputError, match=r"no preset 'damaged'; available: cpu, .*mola.*, odd\."):
        find_preset("damaged")
