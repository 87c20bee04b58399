"""A run that begins with an earlier adapter: with its weights, on its base model, or refused by the setting's name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from run_configs import run_config
from safetensors.torch import load_file, save_file

from mole import runs
from mole.core.errors import ConfigError, MoleError
from mole.training.trainer import train

ROWS = [{"prompt": f"Sort {a} {b}", "completion": f"{min(a, b)} {max(a, b)}"} for a in range(4) for b in range(4)]
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def make_run(home: Path, tiny_folder: Path, tmp_path: Path) -> Callable[..., runs.Run]:
    """`make_run("b", **{"adapter.init_from": "a"})`: a run of six steps on sixteen rows."""
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(json.dumps(row) for row in ROWS))

    def make(name: str, **overrides: Any) -> runs.Run:
        settings = {
            "data.eval_fraction": 0, "adapter.num_experts": 3, "adapter.r": 2, "adapter.lora_dropout": 0.1,
            "training.max_steps": 6, "training.warmup_steps": 0, "training.learning_rate": 0.01,
            "training.save_steps": 2, "training.logging_steps": 1, "training.per_device_train_batch_size": 4,
            **overrides,
        }  # fmt: skip
        config = run_config(name, tiny_folder, data, **settings)
        runs.check_inputs(config)
        return runs.create(config)

    return make


def losses(run: runs.Run) -> list[float]:
    return [event["loss"] for event in run.events() if event["type"] == "step"]


def notices(run: runs.Run) -> list[str]:
    found: list[str] = next(event for event in run.events() if event["type"] == "started")["notices"]
    return found


def test_a_run_begins_with_the_weights_of_an_earlier_one(make_run: Callable[..., runs.Run], home: Path) -> None:
    first = make_run("first")
    train(first)
    for given in ("first", str(first.adapter_dir), f"first@{first.step}"):
        run = make_run("next", **{"adapter.init_from": given, "training.learning_rate": 1e-9, "training.max_steps": 1})
        train(run)
        before, after = (load_file(each.adapter_dir / WEIGHTS) for each in (first, run))
        assert before.keys() == after.keys()
        assert all((before[name] - after[name]).abs().max() < 1e-6 for name in before)
        assert f"The run begins with the weights of {run.config.adapter.init_from}." in notices(run)
        assert "init_from" not in json.loads((run.adapter_dir / "adapter_config.json").read_text())
        shutil.rmtree(run.path)


def test_such_a_run_resumes_without_the_adapter_that_it_began_with(
    make_run: Callable[..., runs.Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = make_run("first")
    train(first)
    whole, parts = (make_run(name, **{"adapter.init_from": "first"}) for name in ("whole", "parts"))
    train(whole)
    assert losses(whole)[0] < losses(first)[0] - 0.1
    with monkeypatch.context() as patch:
        patch.setattr(runs.Run, "stop_requested", lambda run: run.step >= 2)
        train(parts)
    shutil.rmtree(first.path)
    train(parts, resume=True)
    assert (whole.adapter_dir / WEIGHTS).read_bytes() == (parts.adapter_dir / WEIGHTS).read_bytes()


def test_what_cannot_begin_a_run_is_refused_before_it_is_created(
    make_run: Callable[..., runs.Run], make_adapter: Callable[..., Path], tiny_folder: Path, tmp_path: Path
) -> None:
    adapter = make_adapter(num_experts=3)
    lora = tmp_path / "lora"
    lora.mkdir()
    (lora / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "x"}))
    for given, more, words in [
        ("nothing", {}, "adapter.init_from is 'nothing'; it must be a run, RUN@STEP or an adapter's folder."),
        (str(lora), {}, "it must be an adapter with a mixture of experts, not LORA."),
        (f"base:{tiny_folder}", {}, "it must be an adapter with a mixture of experts, not a base model."),
        (str(adapter), {"adapter.r": 4}, "adapter.r is 4; it must be 2, as in "),
        (str(adapter), {"adapter.router": "topk"}, "adapter.router is 'topk'; it must be 'dynmole', as in "),
        (str(adapter), {"adapter.num_experts": [3, 4]}, "adapter.num_experts is [3, 4]; it must be 3, as in "),
    ]:
        with pytest.raises(ConfigError) as refused:
            make_run("refused", **{"adapter.init_from": given, **more})
        assert words in str(refused.value) and "\n" not in str(refused.value)
    assert runs.list_runs() == []


def test_an_adapter_that_does_not_fit_or_is_of_another_base_model_is_refused(
    make_run: Callable[..., runs.Run], tiny_model: Callable[..., Any], tiny_tokenizer: Any, tmp_path: Path
) -> None:
    first = make_run("first", **{"training.max_steps": 1})
    train(first)
    narrow = make_run("narrow", **{"adapter.init_from": "first", "adapter.target_modules": ["q_proj"]})
    with pytest.raises(ConfigError, match=r"the same projections, experts and ranks\. \d+ weights are not in both"):
        train(narrow)
    other = tmp_path / "other"
    tiny_model(seed=1).save_pretrained(other)
    tiny_tokenizer.save_pretrained(other)
    moved = make_run("moved", **{"adapter.init_from": "first", "model.name": str(other)})
    with pytest.raises(ConfigError, match=r"an adapter of the run's base model \(other: model.safetensors\)"):
        train(moved)
    weights = load_file(first.adapter_dir / WEIGHTS)
    save_file({name: weight * torch.nan for name, weight in weights.items()}, first.adapter_dir / WEIGHTS)
    broken = make_run("broken", **{"adapter.init_from": "first"})
    with pytest.raises(MoleError, match=WEIGHTS):
        train(broken)


def test_what_changes_the_effect_of_the_same_weights_is_told(make_run: Callable[..., runs.Run]) -> None:
    first = make_run("first", **{"training.max_steps": 1})
    train(first)
    run = make_run("next", **{"adapter.init_from": "first", "adapter.lora_alpha": 4.0, "training.max_steps": 1})
    train(run)
    assert "The run begins with the weights of first; adapter.lora_alpha is 4 and was 16." in notices(run)
