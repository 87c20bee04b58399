"""TRL's trainers, which compute losses of their own, train the routers by the auxiliary loss as well."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapting import shake
from datasets import Dataset
from peft import get_peft_model
from torch import Tensor

from mole import MoleConfig, auxiliary_loss

Make = Callable[..., Any]
LOSSES = {"balance_loss_coef": 0.3, "entropy_loss_coef": 0.5, "z_loss_coef": 0.2}
TEXTS = ["one two three", "four five", "six", "seven eight nine ten"]


def adapted(model: Any, **losses: float) -> Any:
    """The model with a mixture of experts whose weights all matter."""
    config = MoleConfig(router="dynmole", task_type="CAUSAL_LM", num_experts=4, r=2, lora_dropout=0.0, **losses)
    model = get_peft_model(model, config)
    shake(model)
    return model.double()  # so that a small difference is not lost


def sft(folder: Path, **settings: Any) -> tuple[type[Any], Any, Any, dict[str, Any]]:
    from trl import SFTConfig, SFTTrainer

    rows = Dataset.from_list([{"text": text} for text in TEXTS])
    return SFTTrainer, SFTConfig(output_dir=str(folder), max_length=32, **settings), rows, {}


def dpo(folder: Path, **settings: Any) -> tuple[type[Any], Any, Any, dict[str, Any]]:
    from trl import DPOConfig, DPOTrainer

    rows = Dataset.from_list([{"prompt": text, "chosen": " good", "rejected": " very bad"} for text in TEXTS])
    return DPOTrainer, DPOConfig(output_dir=str(folder), max_length=32, **settings), rows, {}


def grpo(folder: Path, **settings: Any) -> tuple[type[Any], Any, Any, dict[str, Any]]:
    from trl import GRPOConfig, GRPOTrainer

    rows = Dataset.from_list([{"prompt": text} for text in TEXTS])

    def length(completions: list[str], **_: Any) -> list[float]:
        return [float(len(text)) for text in completions]

    sizes = {"num_generations": 2, "max_completion_length": 6}
    return GRPOTrainer, GRPOConfig(output_dir=str(folder), **sizes, **settings), rows, {"reward_funcs": length}


TRAINERS = {"SFT": sft, "DPO": dpo, "GRPO": grpo}
SETTINGS: dict[str, dict[str, Any]] = {
    "SFT": {},
    "SFT with smoothed labels": {"label_smoothing_factor": 0.1},
    "DPO": {},
    "GRPO": {},
}


def step_of(what: str, model: Any, tokenizer: Any, folder: Path) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """Take a plain SGD step of two micro-batches → minus each weight's gradient, and what the model was called with."""
    fixed: dict[str, Any] = {"max_steps": 1, "optim": "sgd", "learning_rate": 1.0, "lr_scheduler_type": "constant"}
    quiet: dict[str, Any] = {"report_to": [], "save_strategy": "no", "disable_tqdm": True, "use_cpu": True}
    sizes: dict[str, Any] = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_grad_norm": 0.0}
    plain: dict[str, Any] = {"bf16": False, "gradient_checkpointing": False}
    name = what.split()[0]
    trainer_class, arguments, rows, more = TRAINERS[name](folder, **fixed, **quiet, **sizes, **plain, **SETTINGS[what])
    trainer = trainer_class(model=model, args=arguments, train_dataset=rows, processing_class=tokenizer, **more)
    calls: list[dict[str, Tensor]] = []

    def note(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if module.training and torch.is_grad_enabled():
            calls.append({name: kwargs[name] for name in ("input_ids", "attention_mask")})

    before = {name: weight.detach().clone() for name, weight in model.named_parameters() if weight.requires_grad}
    hook = model.get_base_model().register_forward_pre_hook(note, with_kwargs=True)
    trainer.train()
    hook.remove()
    after = dict(model.named_parameters())
    return {name: weight - after[name].detach() for name, weight in before.items()}, calls


@pytest.mark.skipif(sys.version_info < (3, 11), reason="TRL needs Python 3.11")
@pytest.mark.parametrize("what", SETTINGS)
def test_the_auxiliary_loss_is_in_its_step_once(
    what: str, tiny_model: Make, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    """The step with auxiliary losses, less that without, is their gradient: the mean of those of the micro-batches."""
    steps = []
    for losses in (LOSSES, dict.fromkeys(LOSSES, 0.0)):
        torch.manual_seed(0)
        model = adapted(tiny_model(), **losses)
        step, calls = step_of(what, model, copy.deepcopy(tiny_tokenizer), tmp_path)
        steps.append(step)
    model = adapted(tiny_model(), **LOSSES, aux_loss="manual").train()
    assert len(calls) == 2, "two micro-batches"
    for call in calls:
        model(**call)
        (auxiliary_loss(model) / len(calls)).backward()
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            grad = torch.zeros_like(weight) if weight.grad is None else weight.grad  # B of the last projection
            added = steps[0][name] - steps[1][name]
            torch.testing.assert_close(added, grad, rtol=1e-3, atol=1e-4, msg=lambda text, n=name: f"{n}: {text}")
