"""Ways out for a run that does not fit: settings that make it smaller, the least costly for the result first."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch

from mole.config import RunConfig, apply_overrides
from mole.core.devices import cpu_is_fast_at_bfloat16
from mole.preflight.estimate import Planner, Way, verdict

WORTH = 0.98
"""A way out leaves at most this share of the peak, or it is none."""


def ways_out(config: RunConfig, plan: Planner, available: int | None) -> list[Way]:
    """What makes the run smaller, that which costs the result least first; all of it together where no one will do."""
    offers = [
        offer
        for offer in (
            smaller_batch(config, plan, available),
            checkpointing(config),
            half_precision(config, plan),
            quantised(config, plan),
            shorter(config, plan),
        )
        if offer is not None
    ]
    before = sum(plan.parts(config)[0].values())
    weighings = [(offer, weighed(config, plan, available, *offer)) for offer in offers]
    weighings = [(offer, way) for offer, way in weighings if way.peak < WORTH * before]
    offers, ways = [offer for offer, _ in weighings], [way for _, way in weighings]
    if ways and all(way.fits == "no" for way in ways):
        together: dict[str, Any] = {}
        labels = []
        for label, _, overrides in offers:
            together |= overrides
            labels.append(label)
            way = weighed(config, plan, available, " + ".join(labels), "All of these together.", dict(together))
            if way.fits != "no":
                break
        ways.append(way)
    return ways


Offer = tuple[str, str, dict[str, Any]]
"""Label, effect and overrides of a way."""


def weighed(
    config: RunConfig, plan: Planner, available: int | None, label: str, effect: str, overrides: dict[str, Any]
) -> Way:
    """An offer with its estimated peak."""
    parts, _ = plan.parts(varied(config, overrides))
    peak = sum(parts.values())
    return Way(label, effect, overrides, peak, verdict(peak, available))


def varied(config: RunConfig, overrides: dict[str, Any]) -> RunConfig:
    """The run with some settings changed."""
    return RunConfig.from_dict(apply_overrides(config.to_dict(), overrides))


def smaller_batch(config: RunConfig, plan: Planner, available: int | None) -> Offer | None:
    """The largest equal parts of the batch that fit easily, else those of one row: the effective batch stays."""
    batch, parts = config.training.per_device_train_batch_size, config.training.gradient_accumulation_steps
    divisors = [size for size in range(batch // 2, 0, -1) if batch % size == 0]
    if not divisors:
        return None
    whole, _ = plan.parts(config)
    shrinking = whole["activations"] + whole["logits"]
    rest = sum(whole.values()) - shrinking + (plan.counts.adapter_bytes if parts == 1 else 0)
    fitting = (size for size in divisors if verdict(rest + shrinking * size / batch, available) == "yes")
    size = next(fitting, 1)
    overrides = {
        "training.per_device_train_batch_size": size,
        "training.gradient_accumulation_steps": parts * batch // size,
    }
    label = f"Batch {size} × {parts * batch // size} accumulated"
    return label, "The effective batch and the result stay; a little slower.", overrides


def checkpointing(config: RunConfig) -> Offer | None:
    """Gradient checkpointing, where it is off."""
    if config.training.gradient_checkpointing:
        return None
    effect = "The result stays; about a third slower."
    return "Gradient checkpointing", effect, {"training.gradient_checkpointing": True}


def half_precision(config: RunConfig, plan: Planner) -> Offer | None:
    """bfloat16, where the base is float32 and the device is fast at it."""
    fast = cpu_is_fast_at_bfloat16() if plan.device.type == "cpu" else plan.device.type == "cuda"
    if fast and plan.device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    if plan.dtype(config) != torch.float32 or not fast:
        return None
    return "bfloat16", "Half the base model's memory, and faster; slightly less exact.", {"model.dtype": "bfloat16"}


def quantised(config: RunConfig, plan: Planner) -> Offer | None:
    """A base of 4 bits, where bitsandbytes is installed and knows the device."""
    installed = importlib.util.find_spec("bitsandbytes") is not None
    if config.model.quantization == "4bit" or not installed or plan.device.type not in ("cpu", "cuda"):
        return None
    effect = "The frozen base is rounded, the experts are not; slower."
    return "4-bit base model", effect, {"model.quantization": "4bit"}


def shorter(config: RunConfig, plan: Planner) -> Offer | None:
    """Shorter examples: nine of ten rows stay whole, or where they are all alike, half of each."""
    longest, most = plan.lengths.longest[0][0], plan.lengths.quantile
    length = max(most if most <= 0.75 * longest else longest // 2, 8)
    if length >= longest:
        return None
    cut = "One row in ten loses" if length == most else "Rows lose"
    return f"At most {length} tokens a row", f"{cut} the beginning of long prompts.", {"data.max_length": length}
