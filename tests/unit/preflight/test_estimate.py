"""What a run will take, told before it starts: counts exact, memory near the truth, and out-of-memory an answer."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, Qwen3MoeConfig

from mole import runs
from mole.cli import parser
from mole.config import ROUTERS, AdapterConfig, ModelConfig, RunConfig
from mole.core import locks
from mole.core.errors import ConfigError, InputError
from mole.mixture.model import mole_config
from mole.models.loading import load_base
from mole.preflight import dry_run, estimate, layer_costs, memory_profile, suggestions
from mole.preflight import job as preflight_job
from mole.preflight.job import PreflightJob
from mole.preflight.plan import GPU_RUNTIME, Planner, free_on
from mole.preflight.suggestions import MemorySuggestion
from mole.runs.targets import load_target
from mole.training.steps import count_steps, warmup_notice
from mole.training.trainer import train

Make = Callable[..., Any]
PATIENCE = 240


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Forty short rows and one long one."""
    rows = [{"prompt": f"Say {n}", "completion": str(n)} for n in range(40)]
    rows.append({"prompt": "word " * 120, "completion": "done"})
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


@pytest.fixture
def config(home: Path, tiny_folder: Path, data: Path) -> RunConfig:
    """A small run of a tiny model on the CPU."""
    return RunConfig.from_dict(
        {
            "model": {"name": str(tiny_folder), "device": "cpu", "dtype": "float32"},
            "data": {"path": str(data)},
            "adapter": {"num_experts": 4, "r": 4},
            "training": {"per_device_train_batch_size": 8, "max_steps": 10},
        }
    )


def changed(config: RunConfig, **overrides: Any) -> RunConfig:
    """The config with settings changed, `section__field=value`."""
    return suggestions.with_overrides(config, {name.replace("__", "."): value for name, value in overrides.items()})


def ended(check: PreflightJob) -> dict[str, Any]:
    """The state of a check once it has ended."""
    deadline = time.monotonic() + PATIENCE
    while check.alive:
        assert time.monotonic() < deadline, check.state()
        time.sleep(0.1)
    return check.state()


# ---------------------------------------------------------------------------------------------------------
# The estimate


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_the_counts_are_those_of_the_real_model(router: str, arch: str, tiny_model: Make) -> None:
    model = tiny_model(arch, layers=4)
    experts = 1 if router == "lora" else [2, 3, 5, 7]
    adapter = AdapterConfig.from_flat({"router": router, "num_experts": experts, "r": 4})
    counted = memory_profile.count_parameters(model.config, adapter, torch.float32)
    real = get_peft_model(model, mole_config(adapter, task_type="CAUSAL_LM"))
    assert counted.trainable == sum(p.numel() for p in real.parameters() if p.requires_grad)
    assert counted.total == sum(p.numel() for p in real.parameters())


@pytest.mark.parametrize(
    ("arch", "checkpointing"), [("llama", False), ("llama", True), ("gemma3", False), ("gpt2", False), ("phi", False)]
)
def test_the_profile_of_two_layers_predicts_five(arch: str, checkpointing: bool, tiny_model: Make) -> None:
    config = tiny_model(arch, layers=5).config
    adapter = AdapterConfig.from_flat({"router": "topk", "num_experts": [2, 8], "r": 4})
    shape = memory_profile.BatchShape(4, 48, 60)
    predicted = layer_costs.step_cost(config, adapter, torch.float32, shape, checkpointing)
    model = memory_profile.build_meta_model(config, adapter, torch.float32)
    whole = memory_profile.profile_step(model, torch.float32, shape, checkpointing)
    assert 0.95 * whole.bytes < predicted.bytes < (1.25 if checkpointing else 1.05) * whole.bytes
    assert predicted.flops == pytest.approx(whole.flops, rel=0.02)


UNEQUAL: dict[str, dict[str, Any]] = {
    "a layer in the middle": {"layers_to_transform": [1]},
    "layers left out by a pattern": {"exclude_modules": r".*layers\.[02]\..*", "modules_to_save": ["lm_head"]},
    "other ranks": {"rank_pattern": {"layers.2.mlp.down_proj": 32, "q_proj": 1}},
    "a module saved whole": {"modules_to_save": ["layers.1.mlp"], "target_modules": ["q_proj", "down_proj"]},
}


@pytest.mark.parametrize("what", UNEQUAL)
def test_layers_are_counted_by_what_each_has_of_the_adapter(what: str, tiny_model: Make) -> None:
    model = tiny_model(layers=3)
    adapter = AdapterConfig.from_flat({"router": "topk", "num_experts": 4, "r": 4, **UNEQUAL[what]})
    shape = memory_profile.BatchShape(4, 48, 60)
    whole = memory_profile.build_meta_model(model.config, adapter, torch.float32)
    short = layer_costs.ShortModels(model.config, adapter, torch.float32, shape, checkpointing=False)
    predicted = short.whole_cost(whole)
    real = get_peft_model(model, mole_config(adapter, task_type="CAUSAL_LM"))
    assert layer_costs.sizes(whole) == layer_costs.sizes(real)
    profiled = memory_profile.profile_step(whole, torch.float32, shape, checkpointing=False)
    assert predicted is not None and predicted.bytes == pytest.approx(profiled.bytes, rel=0.05)
    assert predicted.flops == pytest.approx(profiled.flops, rel=0.02)


def test_a_deep_model_whose_layers_differ_is_profiled_whole() -> None:
    """Qwen3-MoE, of which every other layer has no experts."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 5, "num_attention_heads": 2}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "mlp_only_layers": [1, 3]}
    config = Qwen3MoeConfig(**sizes, **experts, num_key_value_heads=1, head_dim=8, vocab_size=64)
    adapter, shape = AdapterConfig.from_flat({"num_experts": 2, "r": 2}), memory_profile.BatchShape(2, 8, 6)
    whole = memory_profile.build_meta_model(config, adapter, torch.float32)
    predicted = layer_costs.step_cost(config, adapter, torch.float32, shape, checkpointing=False)
    assert predicted == memory_profile.profile_step(whole, torch.float32, shape, checkpointing=False)


def test_the_profile_allocates_what_the_real_step_allocates(tiny_model: Make) -> None:
    """The same tracker, on real tensors and the kernels that really run."""
    model = tiny_model("llama", layers=4)
    adapter = AdapterConfig.from_flat({"router": "dynmole"})
    shape = memory_profile.BatchShape(8, 96, 200)
    predicted = layer_costs.step_cost(model.config, adapter, torch.float32, shape, False)
    real = get_peft_model(model, mole_config(adapter, task_type="CAUSAL_LM")).train()
    head = real.get_base_model().get_output_embeddings()
    tracker = memory_profile.MemoryTracker([*real.parameters(), *real.buffers()], head.weight.shape[0])
    with tracker:
        positions = torch.arange(200)
        mask = torch.ones(8, 96, dtype=torch.long)
        mask[0, -5:] = 0
        ids = torch.zeros(8, 96, dtype=torch.long)
        loss = memory_profile.summed_loss_at(real, head, positions, positions, input_ids=ids, attention_mask=mask)
        (loss + memory_profile.auxiliary_loss(real)).backward()
    assert predicted.bytes == pytest.approx(tracker.peak, rel=0.1)


def test_what_cuda_takes_for_itself_is_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asking for free memory starts CUDA in the asking process, which ends before the run begins."""
    monkeypatch.setattr("mole.preflight.plan.free_memory", lambda device: 10 << 30)
    free = {kind: free_on(torch.device(kind)) for kind in ("cpu", "cuda")}
    assert free == {"cpu": 10 << 30, "cuda": (10 << 30) + GPU_RUNTIME}
    monkeypatch.setattr("torch.cuda.max_memory_allocated", lambda device: 4 << 30)
    assert dry_run.peak_memory(torch.device("cuda")) == (4 << 30) + GPU_RUNTIME


def test_steps_and_epochs_are_those_of_the_trainer(config: RunConfig) -> None:
    result = estimate.estimate(changed(config, data__eval_fraction=0.0, training__max_steps=0))
    assert (result.rows, result.total_steps, result.epochs) == (41, 6, 1.0)
    assert result.longest > 5 * result.typical
    assert result.fits == "yes" and not result.suggestions and result.seconds is not None
    assert [note for note in result.notes if "warmup_steps" in note] == []
    short = changed(config, training__max_steps=1, training__warmup_steps=4)
    assert warmup_notice(short.training, 1) in estimate.estimate(short).notes
    accumulated = changed(config, data__eval_fraction=0.0, training__gradient_accumulation_steps=4)
    assert count_steps(accumulated.training, 41) == (10, 5.0)


def test_suggestions_for_a_run_that_does_not_fit_are_settings_that_make_it_smaller(config: RunConfig) -> None:
    plan = Planner.of(config)
    peak = sum(plan.memory(config)[0].values())
    plan.available = peak - 1
    assert plan.fits(peak) == "no"
    found = suggestions.suggest(config, plan)
    batch, checkpointing = found[:2]
    settings = suggested_training(config, batch)
    before = config.training
    assert settings.per_device_train_batch_size < before.per_device_train_batch_size
    assert settings.per_device_train_batch_size * settings.gradient_accumulation_steps == 8, "the same effective batch"
    assert suggested_training(config, checkpointing).gradient_checkpointing
    assert all(suggestions.with_overrides(config, one.overrides) != config for one in found)
    assert batch.peak < peak and checkpointing.peak < peak
    assert any("data.max_length" in one.overrides for one in found)


def suggested_training(config: RunConfig, suggestion: MemorySuggestion) -> Any:
    """The training section with a suggestion applied."""
    return suggestions.with_overrides(config, suggestion.overrides).training


def test_where_no_single_suggestion_is_enough_they_are_combined(config: RunConfig) -> None:
    plan = Planner.of(config)
    plan.available = 1
    assert suggestions.suggest(config, plan)[-1].label.count(" + ") >= 2


def test_bad_input_names_its_field(config: RunConfig) -> None:
    with pytest.raises(InputError) as told:
        estimate.estimate(changed(config, model__device="cuda:7"))
    assert told.value.field == "model.device"


# ---------------------------------------------------------------------------------------------------------
# The measurement, and the process it has


def test_real_steps_tell_the_truth_and_leave_nothing(config: RunConfig, tmp_path: Path) -> None:
    check = PreflightJob.of(config)
    check.start(config, "both")
    assert ended(check)["phase"] == "done", check.state()
    estimate, real = check.read("estimate"), check.read("measurement")
    assert real["trainable_parameters"] == estimate["trainable_parameters"]
    assert (real["total_steps"], real["longest"]) == (estimate["total_steps"], estimate["longest"])
    assert real["longest_seconds"] > 0 and real["seconds"] == pytest.approx(10 * real["typical_seconds"])
    assert real["peak"] == pytest.approx(estimate["peak"], rel=0.25)
    assert not runs.runs_dir().exists() and not check.scratch.exists()
    assert PreflightJob.of(dataclasses.replace(config, name="other")) == check, "the run's name does not matter"
    assert PreflightJob.of(changed(config, training__max_steps=11)) != check


def test_the_longest_rows_come_first(config: RunConfig, tmp_path: Path) -> None:
    rows = [{"input_ids": [1] * n, "labels": [1] * n} for n in (3, 9, 5, 7)]
    lengths = [len(row["input_ids"]) for row in dry_run.rows_for_steps(rows, 3)]
    assert lengths[:6] == [9, 7, 5, 9, 7, 5] and len(lengths) == 9


def test_too_little_memory_is_an_answer_with_suggestions(config: RunConfig) -> None:
    wide = changed(config, adapter__num_experts=64, adapter__r=64, training__per_device_train_batch_size=40)
    check = PreflightJob.of(wide)
    check.start(wide, "measurement", limit=700 << 20)
    state = ended(check)
    assert state["phase"] == "no_memory" and "memory ran out" in state["text"].lower(), state
    plan = Planner.of(wide)
    plan.available = 700 << 20
    first, *_ = suggestions.suggest(wide, plan)
    assert first.overrides["training.per_device_train_batch_size"] < 40


def test_after_cancelling_the_process_is_gone(config: RunConfig) -> None:
    check = PreflightJob.of(config)
    check.start(config, "measurement")
    deadline = time.monotonic() + PATIENCE
    while check.read("state").get("phase") != "working":
        assert time.monotonic() < deadline
        time.sleep(0.05)
    pid = locks.holder(check.lock_path)["pid"]
    check.cancel()
    assert check.state()["phase"] == "cancelled" and not check.alive
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    assert not check.scratch.exists() and not locks.is_held(runs.device_lock_path("cpu"))


def test_a_process_that_was_killed_from_outside_did_not_fit(config: RunConfig) -> None:
    check = PreflightJob.of(config)
    check.folder.mkdir(parents=True)
    check.tell("measurement", "working", "step 1 of 3")
    assert check.state()["phase"] == "no_memory" and "ended the process" in check.state()["text"]


def test_a_run_that_has_the_device_is_named_and_not_fought(config: RunConfig) -> None:
    path = runs.device_lock_path("cpu")
    path.parent.mkdir(parents=True)
    check = PreflightJob.of(config)
    with locks.acquire(path, run="first") or pytest.fail("locked"):
        check.start(config, "measurement")
        state = ended(check)
        assert state["phase"] == "busy" and "first is using cpu" in state["text"]
        assert "first" in estimate.estimate(config).notes[0]
        check.start(config, "measurement", wait=True)
        while check.state()["phase"] != "waiting":
            time.sleep(0.1)
    assert ended(check)["phase"] == "done", "it begins once the run lets go"


# ---------------------------------------------------------------------------------------------------------
# On the command line


def test_the_command_prints_a_table_and_keeps_the_numbers(
    config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--model", config.model.name, "--data", config.data.path, "--set", "model.device=cpu", "--batch-size", "4"]
    target = tmp_path / "out.json"
    assert parser.main(["preflight", *flags, "--steps", "5", "--json", str(target)]) == 0
    out = capsys.readouterr().out
    assert "It fits. (estimated;" in out and "peak" in out
    written = json.loads(target.read_text())["estimate"]
    assert written["total_steps"] == 5
    assert {"peak", "seconds", "fits", "ways"} <= set(written) and "suggestions" not in written
    assert parser.main(["preflight", *flags, "--router", "nosuch"]) == 2
    assert parser.main(["preflight", "--model", config.model.name, "--data", str(tmp_path / "none.jsonl")]) == 2
    assert parser.main(["preflight", *flags, "--wait"]) == 2


# ---------------------------------------------------------------------------------------------------------
# A quantised base


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_a_run_on_a_quantised_base_trains_and_its_adapter_loads(config: RunConfig, bits: str) -> None:
    run = runs.create(changed(config, model__quantization=bits, training__max_steps=2))
    train(run)
    assert run.state == "finished"
    loaded = load_target(run.name, ModelConfig(device="cpu", dtype="float32"))
    assert isinstance(loaded.model, PeftModel) and loaded.router == "dynmole" and loaded.notice is None
    with torch.no_grad():
        assert torch.isfinite(loaded.model(input_ids=torch.tensor([[5, 6, 7]])).logits).all()


def test_a_quantised_base_is_smaller_and_without_bitsandbytes_one_line_says_so(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(config.model.name))
    four = load_base(dataclasses.replace(config.model, quantization="4bit")).model
    assert four.get_memory_footprint() < 0.7 * plain.get_memory_footprint()
    told = estimate.estimate(changed(config, model__quantization="4bit"))
    assert told.memory["base model"] == pytest.approx(four.get_memory_footprint(), rel=0.25)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="bitsandbytes is not installed"):
        load_base(dataclasses.replace(config.model, quantization="4bit"))


def test_checks_are_kept_in_bounds(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight_job, "KEPT", 3)
    for number in range(6):
        (preflight_job.home() / "preflight" / f"old{number}").mkdir(parents=True)
    preflight_job.prune_jobs(preflight_job.home() / "preflight" / "old0")
    assert len(list((preflight_job.home() / "preflight").iterdir())) == 4
    assert preflight_job.find_job("old0") is not None and preflight_job.find_job("../runs") is None
