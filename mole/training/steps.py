"""How many optimizer steps a run has. Does not import torch."""

from __future__ import annotations

import math

from mole.config import TrainingConfig


def count_steps(settings: TrainingConfig, rows: int) -> tuple[int, float]:
    """Optimizer steps of a run over this many training rows, and the number of epochs they make."""
    batches = math.ceil(rows / settings.per_device_train_batch_size)
    per_epoch = math.ceil(batches / settings.gradient_accumulation_steps)
    steps = settings.max_steps or math.ceil(per_epoch * settings.num_train_epochs)
    return steps, steps / per_epoch
