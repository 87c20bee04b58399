"""Measures real training steps: steps on the longest rows and one on random rows, taken by the real trainer.

Run it in its own process, as `job` does: the peak memory is that of the process, and running out of memory is a valid
result. Nothing is saved.
"""

from __future__ import annotations

import dataclasses
import random
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from mole.config import RunConfig
from mole.data import Datasets, build_datasets
from mole.models.context import within_positions
from mole.models.loading import load_base, on_its_gpu
from mole.preflight.plan import GPU_RUNTIME
from mole.runs.run import Run
from mole.training.steps import count_steps
from mole.training.trainer import MoleTrainer, build_trainer

STEPS = ("warming up on the longest rows", "timing the longest rows", "timing random rows")
EncodedRow = dict[str, list[int]]


@dataclass(frozen=True)
class Measurement:
    """What real steps took.

    Attributes:
        peak: peak memory in bytes of this process, on a GPU or in RAM.
        longest_seconds, typical_seconds: time of an optimizer step on the longest rows, and on random rows.
        tokens_per_second: speed on random rows, without padding.
        total_steps, seconds: optimizer steps of the whole run, and their time without evaluation and checkpoints.
        longest: tokens of the longest row.
        trainable_parameters: counted on the real model.
        device, dtype: those of the base model.
    """

    peak: int
    longest_seconds: float
    typical_seconds: float
    tokens_per_second: float
    total_steps: int
    seconds: float
    longest: int
    trainable_parameters: int
    device: str
    dtype: str


def measure(config: RunConfig, folder: Path, report: Callable[[str, float], None]) -> Measurement:
    """Run three optimizer steps of a run in this process.

    Args:
        config: the run.
        folder: an empty folder for the trainer's files; the caller deletes it.
        report: called with the current stage and the share of the work that is done, 0…1.

    Raises:
        InputError: model, data or a setting cannot be used.
        MemoryError, RuntimeError: memory ran out; the allocator's own error.
    """
    report("loading the model", 0.05)
    base = load_base(on_its_gpu(config.model))
    config = within_positions(config, base.model.config)
    report("reading the data", 0.4)
    data = build_datasets(config.data, base.tokenizer, config.training.seed)
    batch = min(config.training.per_device_train_batch_size, len(data.train))
    training = dataclasses.replace(
        config.training,
        per_device_train_batch_size=batch,
        max_steps=len(STEPS),
        warmup_steps=0,
        eval_steps=0,
        logging_steps=1,
    )
    short = dataclasses.replace(config, training=training)
    rows = rows_for_steps(data.train, batch * config.training.gradient_accumulation_steps)
    run = Run("dry-run", folder)
    trainer = build_trainer(DryRunTrainer, run, short, base, Datasets(rows, [], data.report), {}, False)
    timer = StepTimer(base.device, report)
    trainer.add_callback(timer)
    trainer.train()
    total_steps, _ = count_steps(
        dataclasses.replace(config.training, per_device_train_batch_size=batch), len(data.train)
    )
    _, longest_seconds, typical_seconds = timer.seconds
    random_rows = rows[2 * len(rows) // 3 :]
    return Measurement(
        peak=peak_memory(base.device),
        longest_seconds=longest_seconds,
        typical_seconds=typical_seconds,
        tokens_per_second=sum(len(row["input_ids"]) for row in random_rows) / typical_seconds,
        total_steps=total_steps,
        seconds=total_steps * typical_seconds,
        longest=len(rows[0]["input_ids"]),
        trainable_parameters=sum(p.numel() for p in trainer.peft_model.parameters() if p.requires_grad),
        device=str(base.device),
        dtype=str(base.dtype).removeprefix("torch."),
    )


def rows_for_steps(rows: list[EncodedRow], count: int) -> list[EncodedRow]:
    """The rows of the three steps, `count` each: the longest, the longest again, and random ones."""
    by_length = sorted(rows, key=lambda row: len(row["input_ids"]), reverse=True)
    longest = [by_length[number % len(by_length)] for number in range(count)]
    return [*longest, *longest, *random.Random(0).choices(rows, k=count)]


class DryRunTrainer(MoleTrainer):
    """The real trainer, but it takes the rows in order and saves no checkpoints."""

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        return torch.utils.data.SequentialSampler(self.data.train)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Saves nothing."""


class StepTimer(TrainerCallback):
    """Measures the time of each step and reports the progress."""

    def __init__(self, device: torch.device, report: Callable[[str, float], None]) -> None:
        self.device, self.report = device, report
        self.seconds: list[float] = []
        self.begun = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        done = len(self.seconds)
        self.report(f"step {done + 1} of {len(STEPS)}: {STEPS[done]}", 0.5 + 0.5 * done / len(STEPS))
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.begun = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds.append(time.perf_counter() - self.begun)


def peak_memory(device: torch.device) -> int:
    """Peak memory in bytes: on a GPU of tensors and CUDA itself, on a CPU of this process."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device) + GPU_RUNTIME)
    try:  # ru_maxrss would include the peak of the process that started this one
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return int(next(line for line in status.splitlines() if line.startswith("VmHWM:")).split()[1]) << 10
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
