"""A device that a process has for a while, such as the GPU of one call on ZeroGPU. No torch."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from mole.config import RunConfig


@dataclass(frozen=True)
class LentDevice:
    """A device that this process alone uses, until it is taken back.

    Attributes:
        device: `cpu`, or `cuda` for the GPU that the process sees.
        until: when training has to end, by `time.monotonic`, so that the adapter is saved in time.
    """

    device: str
    until: float

    def placed(self, config: RunConfig) -> RunConfig:
        """The settings of a run with this device."""
        return dataclasses.replace(config, model=dataclasses.replace(config.model, device=self.device))


def ended_early(step: int, total: int) -> list[str]:
    """What to tell of a run that ended at `step` of `total`; nothing where it took all steps."""
    if step >= total:
        return []
    return [f"It ended after {step} of {total} steps, since its time was over or it was stopped; this is its adapter."]
