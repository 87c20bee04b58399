"""The learning rate of a run whose schedule begins again after some steps."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler

from mole.config import TrainingConfig
from mole.training.steps import schedule_stages, warmup_steps


def restarting_schedule(optimizer: Any, settings: TrainingConfig, steps: int) -> LambdaLR:
    """The schedule of a run of `steps` steps: that of a run of its own for each of its stages, one after the other."""
    stages = schedule_stages(settings, steps)
    factors = [stage_factor(settings, length) for _, length in stages]
    starts = [start for start, _ in stages]

    def factor(step: int) -> float:
        """Share of the peak learning rate after so many steps."""
        stage = bisect_right(starts, step) - 1
        return factors[stage](step - starts[stage])

    return LambdaLR(optimizer, factor)


def stage_factor(settings: TrainingConfig, steps: int) -> Callable[[int], float]:
    """Steps done → share of the peak learning rate, in a run of `steps` steps without restarts."""
    stand_in = torch.optim.SGD([torch.zeros(1)], lr=1.0)  # the factors do not depend on the optimizer
    schedule: Any = get_scheduler(
        settings.lr_scheduler_type,
        stand_in,
        num_warmup_steps=warmup_steps(settings, steps),
        num_training_steps=steps,
    )
    factor: Callable[[int], float] = schedule.lr_lambdas[0]
    return factor


def set_rate(optimizer: Any, schedule: Any) -> None:
    """Give the optimizer the learning rate that its schedule has for the next step.

    The state of an optimizer holds that of the schedule it was saved with, which a run that is continued replaces.
    """
    plain: LambdaLR = getattr(schedule, "scheduler", schedule)  # accelerate may wrap it
    rates = [base * factor(plain.last_epoch) for base, factor in zip(plain.base_lrs, plain.lr_lambdas, strict=True)]
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    plain._last_lr = rates  # what is logged
