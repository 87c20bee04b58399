"""Real steps instead of an estimate: the largest step the data can ask for, and a usual one, by the real trainer.

Run it in a process of its own (`job` does): its peak of memory is that process's, and running out of memory
is an answer. Nothing is kept.
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
from mole.data.encoding import Datasets, build_datasets
from mole.models.loading import load_base, on_its_gpu
from mole.runs.run import Run
from mole.training.trainer import MoleTrainer, assemble

STEPS = ("warming up on the longest rows", "timing the longest rows", "timing usual rows")
Row = dict[str, list[int]]


@dataclass(frozen=True)
class Measurement:
    """What real steps took.

    Attributes:
        peak: bytes at the peak: the GPU's, or on a CPU this process's.
        longest_seconds, typical_seconds: an optimizer step on the longest rows, and on rows taken at random.
        tokens_per_second: of the latter, padding not counted.
        total_steps, seconds: optimizer steps of the whole run, and how long they take (no evaluation, no saving).
        longest: tokens of the longest row.
        trainable_parameters: counted on the real model.
        device, dtype: where and in what it ran.
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


def measure(config: RunConfig, folder: Path, tell: Callable[[str, float], None]) -> Measurement:
    """Take three optimizer steps of a run in this process.

    Args:
        config: the run.
        folder: an empty one for what the trainer leaves; the caller deletes it.
        tell: is told what goes on, and the share of it that is done.

    Raises:
        InputError: model, data or a setting cannot be used.
        MemoryError, RuntimeError: memory ran out, as the allocator says it.
    """
    tell("loading the model", 0.05)
    base = load_base(on_its_gpu(config.model))
    tell("reading the data", 0.4)
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
    rows = chosen(data.train, batch * config.training.gradient_accumulation_steps)
    run = Run("trial", folder)
    trainer = assemble(Trial, run, short, base, Datasets(rows, [], data.report), {}, False)
    watch = Watch(base.device, tell)
    trainer.add_callback(watch)
    trainer.train()
    whole = dataclasses.replace(config.training, per_device_train_batch_size=batch)
    trainer.run_config, trainer.data = dataclasses.replace(config, training=whole), data
    total_steps = trainer.total_steps()
    _, longest_seconds, typical_seconds = watch.seconds
    usual = rows[2 * len(rows) // 3 :]
    return Measurement(
        peak=peak_memory(base.device),
        longest_seconds=longest_seconds,
        typical_seconds=typical_seconds,
        tokens_per_second=sum(len(row["input_ids"]) for row in usual) / typical_seconds,
        total_steps=total_steps,
        seconds=total_steps * typical_seconds,
        longest=len(rows[0]["input_ids"]),
        trainable_parameters=sum(p.numel() for p in trainer.peft_model.parameters() if p.requires_grad),
        device=str(base.device),
        dtype=str(base.dtype).removeprefix("torch."),
    )


def chosen(rows: list[Row], count: int) -> list[Row]:
    """Rows for a step three times: the longest, the longest again, and some at random; `count` each."""
    by_length = sorted(rows, key=lambda row: len(row["input_ids"]), reverse=True)
    longest = [by_length[place % len(by_length)] for place in range(count)]
    return [*longest, *longest, *random.Random(0).choices(rows, k=count)]


class Trial(MoleTrainer):
    """The real trainer, over rows in their order, that keeps nothing."""

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        return torch.utils.data.SequentialSampler(self.data.train)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Nothing is kept."""


class Watch(TrainerCallback):
    """Times the steps. The event log, which comes first, waits for the device at the end of each."""

    def __init__(self, device: torch.device, tell: Callable[[str, float], None]) -> None:
        self.device, self.tell = device, tell
        self.seconds: list[float] = []
        self.begun = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        done = len(self.seconds)
        self.tell(f"step {done + 1} of {len(STEPS)}: {STEPS[done]}", 0.5 + 0.5 * done / len(STEPS))
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.begun = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds.append(time.perf_counter() - self.begun)


def peak_memory(device: torch.device) -> int:
    """Bytes at the peak: what tensors held on a GPU, what the process held on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    try:  # ru_maxrss begins with the peak of the process that started this one
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return int(next(line for line in status.splitlines() if line.startswith("VmHWM:")).split()[1]) << 10
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
