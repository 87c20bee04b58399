"""Suggests settings that reduce the memory of a run, those that affect the result least first."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any

from mole.config import RunConfig, apply_overrides
from mole.core.devices import cpu_is_fast_at_bfloat16
from mole.preflight.plan import Planner

WORTHWHILE = 0.98
"""A suggestion must reduce the peak to at most this share."""


@dataclass(frozen=True)
class MemorySuggestion:
    """Settings that reduce the memory of a run.

    Attributes:
        label: what changes, in a few words.
        effect: the effect on the result and the time.
        overrides: the settings, as `{"section.field": value}`.
        peak: estimated bytes at the peak with them.
        fits: `yes`, `tight`, `no` or `unknown`, with them.
    """

    label: str
    effect: str
    overrides: dict[str, Any]
    peak: int
    fits: str


Change = tuple[str, str, dict[str, Any]]
"""Label, effect and overrides of a suggestion before it is estimated."""


def suggest(config: RunConfig, plan: Planner) -> list[MemorySuggestion]:
    """Settings that reduce the memory of a run, those that affect the result least first.

    If none is enough on its own, the last suggestion combines as many of them as needed.
    """
    changes = (
        smaller_batch(config, plan),
        checkpointing(config),
        half_precision(config, plan),
        quantised(config, plan),
        shorter_rows(config, plan),
    )
    before = sum(plan.memory(config)[0].values())
    found = [estimated(config, plan, change) for change in changes if change is not None]
    found = [suggestion for suggestion in found if suggestion.peak < WORTHWHILE * before]
    if found and all(suggestion.fits == "no" for suggestion in found):
        found.append(combined(config, plan, found))
    return found


def combined(config: RunConfig, plan: Planner, suggestions: list[MemorySuggestion]) -> MemorySuggestion:
    """The first suggestions together, as many as needed for the run to fit, or all of them."""
    overrides: dict[str, Any] = {}
    labels = []
    for suggestion in suggestions:
        overrides |= suggestion.overrides
        labels.append(suggestion.label)
        together = estimated(config, plan, (" + ".join(labels), "All of these together.", dict(overrides)))
        if together.fits != "no":
            break
    return together


def estimated(config: RunConfig, plan: Planner, change: Change) -> MemorySuggestion:
    """A change with its estimated peak."""
    label, effect, overrides = change
    peak = sum(plan.memory(with_overrides(config, overrides))[0].values())
    return MemorySuggestion(label, effect, overrides, peak, plan.fits(peak))


def with_overrides(config: RunConfig, overrides: dict[str, Any]) -> RunConfig:
    """The run's config with some settings changed."""
    return RunConfig.from_dict(apply_overrides(config.to_dict(), overrides))


def smaller_batch(config: RunConfig, plan: Planner) -> Change | None:
    """The largest equal parts of the batch that fit easily, or else parts of one row; the effective batch stays."""
    batch, accumulated = config.training.per_device_train_batch_size, config.training.gradient_accumulation_steps
    divisors = [size for size in range(batch // 2, 0, -1) if batch % size == 0]
    if not divisors:
        return None
    parts, _ = plan.memory(config)
    shrinking = parts["activations"] + parts["logits"]
    rest = sum(parts.values()) - shrinking + (plan.counts.adapter_bytes if accumulated == 1 else 0)
    size = next((size for size in divisors if plan.fits(rest + shrinking * size / batch) == "yes"), 1)
    overrides = {
        "training.per_device_train_batch_size": size,
        "training.gradient_accumulation_steps": accumulated * batch // size,
    }
    label = f"Batch {size} × {accumulated * batch // size} accumulated"
    return label, "The same effective batch and result; slightly slower.", overrides


def checkpointing(config: RunConfig) -> Change | None:
    """Gradient checkpointing, if it is off."""
    if config.training.gradient_checkpointing:
        return None
    effect = "The same result; about a third slower."
    return "Gradient checkpointing", effect, {"training.gradient_checkpointing": True}


def half_precision(config: RunConfig, plan: Planner) -> Change | None:
    """bfloat16, if the base model is float32 and the device computes bfloat16 fast."""
    import torch

    if plan.device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = plan.device.type == "cpu" and cpu_is_fast_at_bfloat16()
    if plan.dtype(config) != torch.float32 or not fast:
        return None
    effect = "Half the base model's memory, and faster; slightly less precise."
    return "bfloat16", effect, {"model.dtype": "bfloat16"}


def quantised(config: RunConfig, plan: Planner) -> Change | None:
    """A 4-bit base model, if bitsandbytes is installed and supports the device."""
    installed = importlib.util.find_spec("bitsandbytes") is not None
    if config.model.quantization == "4bit" or not installed or plan.device.type not in ("cpu", "cuda"):
        return None
    effect = "The frozen base model is quantised, the experts are not; slower."
    return "4-bit base model", effect, {"model.quantization": "4bit"}


def shorter_rows(config: RunConfig, plan: Planner) -> Change | None:
    """A `max_length` that leaves nine of ten rows whole, or half the longest row if their lengths hardly differ."""
    longest, quantile = plan.lengths.longest[0][0], plan.lengths.quantile
    length = max(quantile if quantile <= 0.75 * longest else longest // 2, 8)
    if length >= longest:
        return None
    cut = "One row in ten loses" if length == quantile else "Rows lose"
    return f"At most {length} tokens a row", f"{cut} the beginning of long prompts.", {"data.max_length": length}
