"""How many optimizer steps a run has, and how many of them warm up. Does not import torch."""

from __future__ import annotations

import itertools
import math

from mole.config import TrainingConfig


def count_steps(settings: TrainingConfig, rows: int) -> tuple[int, float]:
    """Optimizer steps of a run over this many training rows, and the number of epochs they make."""
    batches = math.ceil(rows / settings.per_device_train_batch_size)
    per_epoch = math.ceil(batches / settings.gradient_accumulation_steps)
    steps = settings.max_steps or math.ceil(per_epoch * settings.num_train_epochs)
    return steps, steps / per_epoch


def schedule_stages(settings: TrainingConfig, steps: int) -> list[tuple[int, int]]:
    """The parts of a run of `steps` steps that each have a warm-up and a decay: steps before it, and its own steps."""
    starts = [0, *(step for step in settings.lr_restarts or [] if step < steps)]
    return [(start, end - start) for start, end in itertools.pairwise([*starts, steps])]


def warmup_steps(settings: TrainingConfig, steps: int) -> int:
    """Warm-up of a run of this many steps: the setting, but at most so long that its last step has the full rate.

    The learning rate of step n, from 1, is `learning_rate · min(1, (n - 1) / warm-up)`: the first step of a warm-up
    learns nothing.
    """
    return min(settings.warmup_steps, max(steps - 1, 0))


def warmup_notice(settings: TrainingConfig, steps: int) -> str | None:
    """What to tell of a warm-up that had to be shortened, in a sentence; None if it was not."""
    shortest = min(length for _, length in schedule_stages(settings, steps))
    used = warmup_steps(settings, shortest)
    if used == settings.warmup_steps or settings.lr_scheduler_type == "constant":
        return None
    where = "the run has" if shortest == steps else "the shortest stretch between restarts has"
    length = f"{where} only {shortest} step{'s' if shortest > 1 else ''}"
    return f"training.warmup_steps is {settings.warmup_steps}, and {length}: {used or 'none'} will warm up."
