"""Estimates what a run takes before it starts: parameters, memory, time, whether it fits, and what reduces its memory.

No weights are read and no step is run: parameters are counted exactly, memory and time come from a profiled step on
tensors without data (`memory_profile`). `dry_run` measures real steps instead. Importing this module does not load
torch.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from mole import runs
from mole.config import RunConfig
from mole.preflight.plan import Planner
from mole.preflight.suggestions import MemorySuggestion, suggest
from mole.training.notices import start_notices
from mole.training.steps import count_steps


@dataclass(frozen=True)
class Estimate:
    """What a run takes: parameters are exact, memory and time are estimated.

    Attributes:
        trainable_parameters, total_parameters: of the adapted model.
        memory: bytes by part; `peak` is their sum. Empty, with a note, if the architecture cannot be profiled.
        available: bytes free on the device, None if unknown.
        fits: `yes`, `tight`, `no` or `unknown`.
        device, dtype: those of the run.
        total_steps, epochs: optimizer steps of the run, and the number of epochs they make.
        rows, longest, typical: number of training rows, tokens of the longest one, and mean tokens per row.
        seconds_per_step: rough time of a step; None while another process uses the device.
        suggestions: ways to reduce memory, those that affect the result least first; empty if the run fits easily.
        notes: anything else worth knowing, in sentences.
    """

    trainable_parameters: int
    total_parameters: int
    memory: dict[str, int]
    available: int | None
    fits: str
    device: str
    dtype: str
    total_steps: int
    epochs: float
    rows: int
    longest: int
    typical: float
    seconds_per_step: float | None
    suggestions: list[MemorySuggestion] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def peak(self) -> int:
        """Bytes at the peak."""
        return sum(self.memory.values())

    @property
    def seconds(self) -> float | None:
        """Rough time of the whole run."""
        return None if self.seconds_per_step is None else self.seconds_per_step * self.total_steps

    def to_dict(self) -> dict[str, Any]:
        """The estimate as JSON values, including `peak` and `seconds`; `ways` is the JSON name of `suggestions`."""
        values = dataclasses.asdict(self)
        values["ways"] = values.pop("suggestions")
        return {**values, "peak": self.peak, "seconds": self.seconds}


def estimate(config: RunConfig) -> Estimate:
    """Estimate what a run takes. Raises `InputError` when its model, data or settings cannot be used."""
    plan = Planner.of(config)
    memory, note = plan.memory(config)
    notes = [*plan.counts.notices, *filter(None, [note])]
    fits = plan.fits(sum(memory.values())) if memory else "unknown"
    device = runs.device_of(config)
    user = runs.device_user(device)
    if user:
        notes.append(
            f"{user} is using {device}: its memory does not count as free, and the speed is unknown. "
            "Measure when it has ended."
        )
    steps, epochs = count_steps(config.training, plan.lengths.rows)
    longest = plan.lengths.longest[0][0]
    notes += start_notices(config, plan.hf_config, steps, longest)
    return Estimate(
        trainable_parameters=plan.counts.trainable,
        total_parameters=plan.counts.total,
        memory=memory,
        available=plan.available,
        fits=fits,
        device=str(plan.device),
        dtype=str(plan.dtype(config)).removeprefix("torch."),
        total_steps=steps,
        epochs=epochs,
        rows=plan.lengths.rows,
        longest=longest,
        typical=plan.lengths.typical,
        seconds_per_step=None if user or not memory else plan.seconds_per_step(config),
        suggestions=suggest(config, plan) if fits in ("tight", "no") else [],
        notes=notes,
    )
