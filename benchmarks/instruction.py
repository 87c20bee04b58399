"""Training on instruction data of mixed lengths, loss on the answers only: tokens a second beside Trainer with LoRA.

Theirs is transformers' Trainer with PEFT's LoRA of as many parameters and its defaults: rows in random order, padded to
the longest of their batch, logits of every token. Ours is what `mole train` does with the same rows, batch, steps and
schedule; with the same LoRA it must come to the same loss.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from common import EQUAL, Figure, base, main, ratio, shortened, with_lora
from transformers import DataCollatorForSeq2Seq, Trainer, TrainerCallback, TrainingArguments

from mole import models
from mole.config import ModelConfig, RunConfig
from mole.data import Datasets, build_datasets
from mole.runs.run import Run
from mole.training.trainer import MoleTrainer, build_trainer

LORA, TRAINER = f"LoRA r {EQUAL}", f"Trainer with LoRA r {EQUAL}"
SAMPLE = Path(__file__).parents[1] / "assets" / "data" / "skills_train.jsonl"


class Clock(TrainerCallback):
    """Seconds of every step but the first."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.begun = 0.0

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.begun = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step > 1:
            self.seconds.append(time.perf_counter() - self.begun)


def conversations(path: Path, count: int) -> None:
    """Write conversations of one to eight questions of the sample data, most of them short."""
    rows = [json.loads(line) for line in SAMPLE.read_text(encoding="utf-8").splitlines()]
    draw = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            turns = draw.sample(rows, min(1 + int(draw.expovariate(0.5)), 8))
            messages = [
                {"role": role, "content": turn[key]}
                for turn in turns
                for role, key in (("user", "prompt"), ("assistant", "completion"))
            ]
            file.write(json.dumps({"messages": messages}) + "\n")


def loss_of(model: Any, data: Datasets) -> float:
    """Mean held-out loss, row by row."""
    model.eval()
    total, count = 0.0, 0
    with torch.no_grad():
        for row in data.eval:
            ids, labels = (torch.tensor([row[name]]) for name in ("input_ids", "labels"))
            learnt = int((labels[:, 1:] != -100).sum())
            total += model(input_ids=ids, labels=labels).loss.item() * learnt
            count += learnt
    return total / count


def ours(config: RunConfig, layers: int, folder: Path) -> tuple[Trainer, Any, Datasets]:
    """The trainer of `mole train`."""
    loaded = models.load_base(ModelConfig(device="cpu", dtype="float32"))
    shortened(loaded.model, layers)
    data = build_datasets(config.data, loaded.tokenizer, config.training.seed)
    trainer = build_trainer(MoleTrainer, Run(folder.name, folder), config, loaded, data, {}, progress=False)
    return trainer, trainer.peft_model, data


def theirs(config: RunConfig, layers: int, folder: Path) -> tuple[Trainer, Any, Datasets]:
    """Trainer with LoRA on the same rows."""
    tokenizer = models.load_tokenizer(config.model.name)
    data = build_datasets(config.data, tokenizer, config.training.seed)
    model = with_lora(base(layers=layers))
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=config.training.max_steps,
        per_device_train_batch_size=config.training.per_device_train_batch_size,
        learning_rate=config.training.learning_rate,
        lr_scheduler_type=config.training.lr_scheduler_type,
        warmup_steps=config.training.warmup_steps,
        weight_decay=config.training.weight_decay,
        max_grad_norm=config.training.max_grad_norm,
        seed=config.training.seed,
        data_seed=config.training.seed,
        use_cpu=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    collator = DataCollatorForSeq2Seq(tokenizer, padding=True)
    return Trainer(model, arguments, data_collator=collator, train_dataset=data.train), model, data


def config_of(rows: Path, seed: int, steps: int, **adapter: Any) -> RunConfig:
    """A run on these rows; without dropout, which is PEFT's default."""
    return RunConfig.from_dict(
        {
            "data": {"path": str(rows), "eval_fraction": 0.05},
            "adapter": {"lora_dropout": 0, **adapter},
            "training": {"max_steps": steps, "seed": seed, "save_steps": 1000},
        }
    )


def measure(options: argparse.Namespace) -> Iterator[Figure]:
    """The mixture and the same LoRA with ours, that LoRA with theirs, one after the other, several times."""
    mixture: dict[str, Any] = {"router": options.router}
    lora: dict[str, Any] = {"router": "lora", "num_experts": 1, "r": EQUAL, "lora_alpha": 2 * EQUAL}
    work = {options.router: (ours, mixture), LORA: (ours, lora), TRAINER: (theirs, lora)}
    seconds: dict[str, list[float]] = {name: [] for name in work}
    losses: dict[str, list[float]] = {name: [] for name in work}
    with tempfile.TemporaryDirectory() as given:
        folder = Path(given)
        conversations(folder / "rows.jsonl", 400)
        for seed in range(options.rounds):
            for name, (build, adapter) in work.items():
                config = config_of(folder / "rows.jsonl", seed, options.steps, **adapter)
                place = folder / f"{name} {seed}"
                place.mkdir()
                trainer, model, data = build(config, options.layers, place)
                trainer.add_callback(clock := Clock())
                trainer.train()
                seconds[name] += clock.seconds
                losses[name].append(loss_of(model, data))
    # All see the same rows in the same order, so tokens a second are to each other as the seconds are.
    there = statistics.median(seconds[TRAINER])
    for name in (options.router, LORA):
        about = f"a step {statistics.median(seconds[name]):.2f} s, {TRAINER} {there:.2f} s"
        yield ratio(f"tokens/s, {name} / {TRAINER}", seconds[TRAINER], seconds[name], ">= 1.60", about)
    words = "; ".join(f"{name} {', '.join(f'{loss:.3f}' for loss in found)}" for name, found in losses.items())
    yield ratio(f"held-out loss, {LORA} / {TRAINER}", losses[LORA], losses[TRAINER], "<= 1.02", words)


if __name__ == "__main__":
    main(__doc__ or "", measure, router="dynmole", layers=30, steps=5, rounds=1)
