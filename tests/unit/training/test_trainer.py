"""A run's training: exact resume, losses that count a batch once, events that tell what happened."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from adapting import TOKENS, logits
from peft import PeftModel
from run_configs import run_config
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from mole import runs
from mole.chat.generate import generate
from mole.chat.settings import ChatSettings
from mole.config import ModelConfig
from mole.core.errors import CheckpointError, TrainingError
from mole.models.logits import only_positions
from mole.runs.targets import load_target
from mole.training.resume import run_identity
from mole.training.state import restore_random, save_training_state
from mole.training.trainer import train

ROWS = [{"prompt": f"Sort {a} {b}", "completion": f"{min(a, b)} {max(a, b)}"} for a in range(6) for b in range(6)]


@pytest.fixture
def make_run(home: Path, tiny_folder: Path, tmp_path: Path) -> Any:
    """`make_run(name, **{"training.max_steps": 3})`: a run of a tiny model on 36 rows."""
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(json.dumps(row) for row in ROWS))

    def make(name: str, **overrides: Any) -> runs.Run:
        settings = {
            "data.eval_fraction": 0.1,
            "adapter.num_experts": 3,
            "adapter.r": 2,
            "training.max_steps": 6,
            "training.per_device_train_batch_size": 4,
            "training.save_steps": 2,
            "training.warmup_steps": 0,
            **overrides,
        }
        return runs.create(run_config(name, tiny_folder, data, **settings))

    return make


def weights(run: runs.Run) -> bytes:
    return (run.adapter_dir / "adapter_model.safetensors").read_bytes()


def stop_after(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Let the request to stop arrive once the run has logged `step`."""
    monkeypatch.setattr(runs.Run, "stop_requested", lambda run: run.step >= step)


@pytest.mark.parametrize(
    ("router", "dtype"),
    [*((name, "float32") for name in ("dynmole", "adamole", "sparsegen", "lora")), ("dynmole", "bfloat16")],
)
def test_a_stopped_and_resumed_run_ends_with_the_same_weights_bit_for_bit(
    make_run: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, router: str, dtype: str
) -> None:
    settings = {"adapter.router": router, "model.dtype": dtype, "training.gradient_accumulation_steps": 2}
    if router == "lora":  # and from several files
        (tmp_path / "more.csv").write_text("prompt,completion\n" + "".join(f"Add {n},{n + 1}\n" for n in range(9)))
        more = {"path": str(tmp_path / "more.csv"), "weight": 1.5}
        settings["data.path"] = [str(tmp_path / "rows.jsonl"), more]
    whole, parts = make_run("whole", **settings), make_run("parts", **settings)
    train(whole)
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        train(parts)
    assert parts.events()[-1]["type"] == "stopped" and not parts.adapter_dir.exists()
    train(parts, resume=True)
    assert weights(parts) == weights(whole)


BESIDE: dict[str, tuple[str, dict[str, Any]]] = {
    "whole modules": ("llama", {"adapter.modules_to_save": ["lm_head", "norm"]}),
    "biases and tokens": ("gpt2", {"adapter.bias": "all", "adapter.trainable_token_indices": [20, 21]}),
}


@pytest.mark.parametrize("what", BESIDE)
def test_what_is_trained_beside_the_experts_resumes_and_is_loaded_by_every_way(
    make_run: Any, monkeypatch: pytest.MonkeyPatch, what: str, tiny_model: Any, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    arch, beside = BESIDE[what]
    for part in (tiny_model(arch), tiny_tokenizer):
        part.save_pretrained(tmp_path / "base")
    settings = {"model.name": str(tmp_path / "base"), "training.max_steps": 4}
    whole, parts = (make_run(name, **settings, **beside) for name in ("whole", "parts"))
    without = make_run("without", **settings)
    for run in (whole, without):
        train(run)
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        train(parts)
    train(parts, resume=True)
    assert weights(parts) == weights(whole) and len(weights(whole)) > len(weights(without))
    in_studio = load_target("whole", ModelConfig(device="cpu", dtype="float32")).model
    exported = runs.export(whole, tmp_path / "exported") / "adapter"
    in_peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), exported).eval()
    assert torch.equal(logits(in_studio), logits(in_peft))
    (prompt,) = TOKENS[:1].tolist()
    read: list[int] = []
    generate(in_studio, prompt, ChatSettings(max_new_tokens=3), set(), 100, go_on=lambda ids: not read.extend(ids))
    assert read[: len(prompt)] == prompt and len(read) == len(prompt) + 3


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_a_warm_up_as_long_as_the_run_is_shortened_and_said(
    make_run: Any, steps: int, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"training.max_steps": steps, "training.warmup_steps": 4, "training.logging_steps": 1}
    run = make_run("short", **settings)
    train(run, progress=True)
    rates = [event["learning_rate"] for event in run.events() if event["type"] == "step"]
    shares = {1: [1], 2: [0, 1], 4: [0, 1 / 3, 2 / 3, 1]}[steps]
    assert rates == pytest.approx([run.config.training.learning_rate * share for share in shares])
    ups = [weight for name, weight in load_file(run.adapter_dir / "adapter_model.safetensors").items() if "_B" in name]
    assert ups and all(weight.any() for weight in ups)
    (notice,) = next(event["notices"] for event in run.events() if event["type"] == "started")
    assert f"has only {steps} step" in notice and f"Note: {notice}" in capsys.readouterr().err


def test_a_warm_up_that_fits_the_run_stays_and_nothing_is_said(make_run: Any) -> None:
    run = make_run("longer", **{"training.max_steps": 3, "training.warmup_steps": 2, "training.logging_steps": 1})
    train(run)
    rates = [event["learning_rate"] for event in run.events() if event["type"] == "step"]
    assert rates == pytest.approx([0, run.config.training.learning_rate / 2, run.config.training.learning_rate])
    assert [event["notices"] for event in run.events() if event["type"] == "started"] == [[]]


def test_a_run_that_learnt_nothing_says_so_at_its_end(
    make_run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No probability reaches a threshold of 1, so no expert is used: B gets no gradient, the loss stays."""
    (tmp_path / "alike.jsonl").write_text("\n".join([json.dumps(ROWS[1])] * 8))
    settings = {"training.max_steps": 2, "data.path": str(tmp_path / "alike.jsonl"), "data.eval_fraction": 0.0}
    stuck = make_run("stuck", **settings, **{"adapter.router": "threshold", "adapter.threshold": 1.0})
    train(stuck, progress=True)
    zero, still = stuck.events()[-1]["notices"]
    assert "B matrices are still zero" in zero and "never moved" in still
    printed = capsys.readouterr().err
    assert f"Note: {zero}" in printed and f"Note: {still}" in printed
    fine = make_run("fine", **settings)
    train(fine, progress=True)
    assert fine.events()[-1]["notices"] == [] and "Note:" not in capsys.readouterr().err


ONE_EXPERT = {"adapter.router": "topk", "adapter.top_k": 1, "adapter.balance_loss_coef": 0.0}


def test_what_a_training_has_to_say_is_told_with_the_run(make_run: Any, tmp_path: Path) -> None:
    rows = [*ROWS[:6], {"prompt": "What?", "completion": None}, {"prompt": "long " * 99, "completion": "x", "id": 7}]
    (tmp_path / "other.jsonl").write_text("\n".join(map(json.dumps, rows)))
    settings = {"data.path": str(tmp_path / "other.jsonl"), "data.max_length": 64, "data.eval_fraction": 0}
    run = make_run("told", **settings, **{"training.warmup_steps": 9, "training.max_steps": 2})
    train(run)
    warmup, unused, left_out, cut = run.details()["notices"]
    assert warmup.startswith("training.warmup_steps is 9") and "not used: id." in unused
    assert left_out.startswith("1 row cannot be used and is left out: row 7: ")
    assert cut == "1 row is longer than data.max_length, 64 tokens, and cut."


def gates(run: runs.Run) -> list[torch.Tensor]:
    return [
        w
        for name, w in sorted(load_file(run.adapter_dir / "adapter_model.safetensors").items())
        if "_studio_gate" in name
    ]


@pytest.mark.parametrize("renormalize", [None, True])
def test_the_gate_of_top_1_is_taught_by_the_loss_unless_its_weight_is_renormalised(
    make_run: Any, renormalize: bool | None
) -> None:
    short, longer = (
        make_run(f"s{n}", **{**ONE_EXPERT, "adapter.renormalize": renormalize, "training.max_steps": n}) for n in (1, 4)
    )
    for run in (short, longer):
        train(run)
    before, after = gates(short), gates(longer)
    assert before and all(torch.equal(a, b) == bool(renormalize) for a, b in zip(before, after, strict=True))


def test_a_top_1_run_that_an_earlier_version_began_goes_on_renormalised(
    make_run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Earlier versions knew no such setting: it is missing in what their checkpoints and adapters say."""

    def without_it(*given: Any) -> dict[str, Any]:
        identity = run_identity(*given)
        del identity["config"]["adapter"]["renormalize"]
        return identity

    whole, parts = (make_run(name, **ONE_EXPERT, **{"adapter.renormalize": True}) for name in ("whole", "parts"))
    train(whole)
    with monkeypatch.context() as patch:
        patch.setattr("mole.training.trainer.run_identity", without_it)
        stop_after(patch, 3)
        train(parts)
    written = parts.path / "run.yaml"
    written.write_text(written.read_text().replace("  renormalize: true\n", ""))
    parts = runs.get("parts")
    assert parts.config.adapter.params.renormalize is None
    train(parts, resume=True)
    assert weights(parts) == weights(whole)


def test_two_runs_of_one_config_are_equal_and_another_seed_is_not(make_run: Any) -> None:
    first, again, other = make_run("first"), make_run("again"), make_run("other", **{"training.seed": 1})
    for run in (first, again, other):
        train(run)
    assert weights(first) == weights(again) != weights(other)


def test_resume_passes_over_a_broken_checkpoint(make_run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, parts = make_run("whole"), make_run("parts")
    train(whole)
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        train(parts)
    newest = max(parts.checkpoints_dir.iterdir(), key=lambda folder: int(folder.name.split("-")[1]))
    broken = newest / "adapter_model.safetensors"
    broken.write_bytes(broken.read_bytes()[:-1])
    train(parts, resume=True)
    resumed = [event["resumed_from"] for event in parts.events() if event["type"] == "started"]
    assert resumed[1] not in (None, newest.name)
    assert weights(parts) == weights(whole)


def test_resume_with_other_settings_says_which(make_run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run("changed")
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        train(run)
    text = run.config_path.read_text()
    run.config_path.write_text(text.replace("lora_alpha: 16.0", "lora_alpha: 32.0"))
    with pytest.raises(CheckpointError, match=r"adapter.lora_alpha was 16.0 and is now 32.0"):
        train(runs.get("changed"), resume=True)


def test_checkpoints_hold_no_pickle(make_run: Any) -> None:
    run = make_run("plain", **{"training.max_steps": 2})
    train(run)
    kinds = {path.suffix for path in run.path.rglob("*") if path.is_file()}
    assert kinds <= {".safetensors", ".json", ".jsonl", ".jinja", ".md", ".yaml", ".log", ""}


@pytest.mark.parametrize(("dtype", "loss", "grad_norm"), [("float32", 1e-5, 1e-5), ("bfloat16", 1e-3, 3e-3)])
def test_micro_batches_add_up_to_one_big_batch(make_run: Any, dtype: str, loss: float, grad_norm: float) -> None:
    """Means over tokens (cross-entropy, entropy and z-loss) give the same first step however the batch is cut.

    In float64 the gradients agree to 4e-16 of their norm, in float32 to 4e-7, in bfloat16 (8 bits) to 2e-3.
    """
    adapters = []
    for name, batch, parts in (("one", 8, 1), ("four", 2, 4)):
        run = make_run(
            name,
            **{
                "model.dtype": dtype,
                "training.max_steps": 1,
                "training.per_device_train_batch_size": batch,
                "training.gradient_accumulation_steps": parts,
                "adapter.balance_loss_coef": 0,
                "adapter.entropy_loss_coef": 0.5,
                "adapter.z_loss_coef": 0.1,
                "adapter.lora_dropout": 0,
                "training.max_grad_norm": 0,
            },
        )
        train(run)
        step = next(event for event in run.events() if event["type"] == "step")
        adapters.append((step, load_file(run.adapter_dir / "adapter_model.safetensors")))
    (one, first), (four, second) = adapters
    assert one["loss"] == pytest.approx(four["loss"], abs=loss)
    assert one["aux_loss"] == pytest.approx(four["aux_loss"], abs=loss)
    assert one["grad_norm"] == pytest.approx(four["grad_norm"], rel=grad_norm)
    assert first.keys() == second.keys()


def test_a_loss_that_is_not_finite_stops_the_run_with_advice(make_run: Any) -> None:
    run = make_run("diverged", **{"training.learning_rate": 1, "adapter.lora_alpha": 1e30, "training.max_grad_norm": 0})
    with pytest.raises(TrainingError, match="learning_rate"):
        train(run)


def test_events_tell_the_course_of_the_run(make_run: Any) -> None:
    run = make_run("told", **{"training.eval_steps": 3})
    train(run)
    events = run.events()
    by_type = {kind: [event for event in events if event["type"] == kind] for kind in {e["type"] for e in events}}
    assert by_type["started"][0]["total_steps"] == 6
    assert by_type["data"][0]["rows"] == 32 and by_type["data"][0]["eval_rows"] == 4
    assert [event["step"] for event in by_type["step"]] == [1, 2, 3, 4, 5, 6]
    assert [event["step"] for event in by_type["eval"]] == [3, 6]
    assert [event["step"] for event in by_type["checkpoint"]] == [2, 4, 6]
    assert math.isfinite(by_type["finished"][0]["metrics"]["eval_loss"])
    for step in by_type["step"]:
        assert {"loss", "aux_loss", "learning_rate", "grad_norm", "tokens_per_second", "memory_mb", "eta_s"} <= set(
            step
        )
        routing = step["routing"]
        assert routing["layers"] == len(routing["load"]) == len(routing["entropy"]) == len(routing["active"])
        assert all(sum(load) == pytest.approx(1, abs=1e-3) for load in routing["load"])


def test_the_adapter_keeps_the_template_it_was_trained_with(make_run: Any, tiny_tokenizer: Any) -> None:
    run = make_run("kept", **{"training.max_steps": 1})
    train(run)
    assert (run.adapter_dir / "chat_template.jinja").read_text() == tiny_tokenizer.chat_template


def test_logits_only_at_labels_are_those_of_the_whole_forward(tiny_model: Any) -> None:
    model = tiny_model("gemma3")
    ids = torch.randint(0, 300, (3, 7), generator=torch.Generator().manual_seed(0))
    whole = model(input_ids=ids).logits.flatten(0, 1)
    positions = torch.tensor([2, 6, 9, 20])
    with only_positions(model.get_output_embeddings(), positions):
        part = model(input_ids=ids).logits[0]
    torch.testing.assert_close(part, whole[positions])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradient_checkpointing_changes_the_memory_not_the_weights(make_run: Any, dtype: str) -> None:
    plain, saving = (
        make_run(name, **{"model.dtype": dtype, "training.gradient_checkpointing": on})
        for name, on in (("plain", False), ("saving", True))
    )
    for run in (plain, saving):
        train(run)
    assert weights(plain) == weights(saving)


def test_a_checkpoint_of_a_run_on_the_cpu_does_not_start_cuda(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # a machine with a GPU, which another process uses
    for name in ("get_rng_state_all", "get_rng_state", "set_rng_state", "device_count"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: pytest.fail("CUDA was started"))
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))])
    save_training_state(tmp_path, optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer))
    torch.manual_seed(3)
    restore_random(tmp_path)
