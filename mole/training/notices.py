"""What somebody should know of a run: at its start, of settings that cannot work as given; at its end, that it learnt
nothing. Importing this module does not import torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mole.config import RunConfig
from mole.core.devices import unused_gpu_notice
from mole.data import DataReport
from mole.models.context import positions_notice
from mole.training.steps import warmup_notice

if TYPE_CHECKING:
    from torch import nn

    from mole.training.callbacks import EventLog


def start_notices(config: RunConfig, hf_config: Any, total_steps: int, longest: int = 0) -> list[str]:
    """What to tell before a run starts, in sentences.

    Args:
        config: its settings, as they were given.
        hf_config: the base model's config.
        total_steps: optimizer steps of the whole run.
        longest: tokens of the longest row; 0 if unknown.
    """
    from mole.mixture.routers.reach import unreached_notice

    notices = (
        unused_gpu_notice(config.model.device),
        warmup_notice(config.training, total_steps),
        positions_notice(config, hf_config, longest),
        unreached_notice(config.adapter),
    )
    return [notice for notice in notices if notice]


def data_notices(report: DataReport, max_length: int) -> list[str]:
    """What to tell of a run's data, in sentences: what was guessed, and the rows left out or cut."""
    found = [*report.notices]
    if report.rejected:
        rows = "row cannot" if report.rejected == 1 else "rows cannot"
        found.append(f"{report.rejected} {rows} be used and {_is(report.rejected)} left out: {report.rejections[0]}.")
    if report.truncated:
        rows = f"{'row' if report.truncated == 1 else 'rows'} {_is(report.truncated)}"
        found.append(f"{report.truncated} {rows} longer than data.max_length, {max_length} tokens, and cut.")
    return found


def _is(count: int) -> str:
    return "is" if count == 1 else "are"


def signs_of_nothing_learnt(model: nn.Module, log: EventLog) -> list[str]:
    """What at the end of a run shows that it learnt nothing, in sentences."""
    from mole.mixture.model import METHOD_NAME

    found = []
    ups = [weight for name, weight in model.named_parameters() if f".{METHOD_NAME}_B." in name]
    if not any(weight.any() for weight in ups):
        found.append(
            "The adapter adds nothing: all of its B matrices are still zero, so no expert learnt anything. "
            "Check the router's settings (its experts may never be used) and training.learning_rate."
        )
    if log.loss_never_moved:
        found.append(
            f"The loss never moved from {log.highest_loss:.4g}. "
            "Check the data (rows may be all alike) and training.learning_rate."
        )
    return found
