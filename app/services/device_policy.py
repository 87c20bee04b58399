"""Where a reply is computed while a run trains: what fits, and what there is to choose. No torch.

On one GPU a chat and a training fight for memory, and the training loses hours. So while a run holds the GPU, replies
are computed on the CPU unless the person says otherwise, knowing what is free.
"""

from __future__ import annotations

from dataclasses import dataclass

from mole import runs
from mole.config import RunConfig
from mole.core import locks
from mole.core.devices import HEADROOM, free_on_gpu
from mole.core.errors import MoleError
from mole.core.text import bytes_text
from mole.models import sizes

WAIT, CPU, GPU = "wait", "cpu", "gpu"
CHOICES = [("On the CPU, slower", CPU), ("Wait until the run has ended", WAIT), ("On the GPU anyway", GPU)]
BYTES_A_WEIGHT = 2
"""Models are loaded in 16 bits on a GPU."""


@dataclass(frozen=True)
class Situation:
    """What the decision depends on.

    Attributes:
        device: where replies are computed when nobody trains: `cpu`, `mps`, `cuda:N`.
        training: the run that holds this device; empty for none.
        need: bytes the model takes on a GPU; 0 if unknown.
        free: bytes free there, None if unknown.
    """

    device: str
    training: str = ""
    need: int = 0
    free: int | None = None


@dataclass(frozen=True)
class Advice:
    """What the person is told, and whether there is something to choose."""

    text: str = ""
    choose: bool = False


def advise(situation: Situation) -> Advice:
    """What to say and offer in a situation."""
    run = situation.training
    if not run:
        return Advice()
    if situation.device == "cpu":
        return Advice(f"The run {run} is training on this machine: replies are slow until it has ended.")
    return Advice(
        f"The run {run} is training on the GPU. {fitting(situation)} Where shall this reply be computed?", True
    )


def fitting(situation: Situation) -> str:
    """What fits beside the training."""
    if situation.free is None or not situation.need:
        return "Whether this model fits beside it cannot be told."
    required = situation.need * HEADROOM
    figures = f"this model needs about {bytes_text(required)}, {bytes_text(situation.free)} are free"
    if situation.free >= required:
        return f"Now it would fit beside it ({figures}), but the training may need more later."
    return f"It does not fit beside it ({figures})."


def device() -> str:
    """Where replies are computed when nobody trains."""
    return runs.device_of(RunConfig())


def training_on(device: str) -> str:
    """The run that holds a device now; empty for none."""
    path = runs.device_lock_path(device)
    return str(locks.holder(path).get("run") or "another program") if locks.is_held(path) else ""


def look(target: str) -> Situation:
    """The situation of a target now."""
    place = device()
    training = training_on(place)
    if not training or not place.startswith("cuda"):
        return Situation(place, training)
    try:
        from mole.runs.targets import locate

        need = sizes.parameters(sizes.files_of(locate(target)[0])) * BYTES_A_WEIGHT
    except MoleError:
        need = 0
    return Situation(place, training, need, free_on_gpu(place.partition(":")[2]))


def device_for(choice: str, training: str) -> str:
    """The device a reply is loaded on: the GPU when nobody trains there, or the person said so."""
    return "auto" if not training or choice == GPU else "cpu"
