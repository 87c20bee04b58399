"""Where a reply is computed while a run trains: what fits, and what the person can choose. No torch.

On one GPU a chat and a training run compete for memory, and the run loses hours of work when it runs out. So while a
run holds the GPU, replies are computed on the CPU unless the person decides otherwise, knowing what is free.
"""

from __future__ import annotations

from dataclasses import dataclass

from mole import runs
from mole.config import ModelConfig, RunConfig
from mole.core import locks
from mole.core.devices import HEADROOM
from mole.core.errors import MoleError
from mole.core.gpus import free_on_gpu, on_zerogpu
from mole.core.text import bytes_text
from mole.models import sizes

WAIT, CPU, GPU = "wait", "cpu", "gpu"
DEVICE_CHOICES = [("On the CPU, slower", CPU), ("Wait until the run has ended", WAIT), ("On the GPU anyway", GPU)]
BYTES_PER_WEIGHT = 2
"""Models are loaded in 16 bits on a GPU, those trained in 8 or 4 bits in as many."""


@dataclass(frozen=True)
class DeviceStatus:
    """What the decision depends on.

    Attributes:
        device: where replies are computed when no run trains: `cpu`, `mps`, `cuda:N`.
        training: the run that holds this device; empty for none.
        need: bytes the model takes on a GPU; 0 if unknown.
        free: bytes free there, None if unknown.
    """

    device: str
    training: str = ""
    need: int = 0
    free: int | None = None


@dataclass(frozen=True)
class DeviceHint:
    """What the page says about the device, and whether the person chooses."""

    text: str = ""
    choose: bool = False


def device_hint(status: DeviceStatus) -> DeviceHint:
    """What to say and to offer for a device status."""
    run = status.training
    if not run:
        return DeviceHint()
    if status.device == "cpu":
        return DeviceHint(f"The run {run} is training on this machine: replies are slow until it has ended.")
    return DeviceHint(
        f"The run {run} is training on the GPU. {memory_text(status)} Where should this reply be computed?", choose=True
    )


def memory_text(status: DeviceStatus) -> str:
    """Whether the model fits on the GPU next to the run."""
    if status.free is None or not status.need:
        return "Whether this model fits next to it is unknown."
    required = status.need * HEADROOM
    amounts = f"this model needs about {bytes_text(required)}, {bytes_text(status.free)} are free"
    if status.free >= required:
        return f"It fits next to it now ({amounts}), but the run may need more memory later."
    return f"It does not fit next to it ({amounts})."


def chat_device() -> str:
    """Where replies are computed when no run trains."""
    return runs.device_of(RunConfig())


def run_on_device(device: str) -> str:
    """The run that holds a device now; empty for none."""
    path = runs.device_lock_path(device)
    return str(locks.holder(path).get("run") or "another program") if locks.is_held(path) else ""


def competing_run() -> str:
    """The run that trains where replies would be computed; empty for none, and where each reply borrows a GPU."""
    return "" if on_zerogpu() else run_on_device(chat_device())


def device_status(target: str) -> DeviceStatus:
    """The device status for a reply of this target, now."""
    device = chat_device()
    training = competing_run()
    if not training or not device.startswith("cuda"):
        return DeviceStatus(device, training)
    try:
        from mole.runs.targets import as_trained, locate

        name, folder = locate(target)
        bits = as_trained(ModelConfig(), folder)[0].quantization
        need = round(sizes.parameters(sizes.files_of(name)) * sizes.QUANTISED_BYTES.get(bits, BYTES_PER_WEIGHT))
    except MoleError:
        need = 0
    return DeviceStatus(device, training, need, free_on_gpu(device))


def reply_device(choice: str, training: str) -> str:
    """The device a reply's model is loaded on, as `model.device`: the CPU while a run trains, unless GPU was chosen."""
    return "auto" if not training or choice == GPU else "cpu"
