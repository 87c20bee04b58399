"""This machine's GPUs: which ones CUDA shows, and the names that each of them has. No torch.

CUDA shows a process some of the GPUs, those in CUDA_VISIBLE_DEVICES or all; `cuda:N` is the N-th of these. An entry of
that variable is the system's number of a GPU, the beginning of its UUID, or the name of a part (MIG). All processes
lock a GPU under the same name, `lock_name`, whatever CUDA shows them.
"""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
from importlib.metadata import version
from typing import Any, NamedTuple

from mole.core.errors import ConfigError

VISIBLE = "CUDA_VISIBLE_DEVICES"
GIVEN = "MOLE_VISIBLE_GPUS"
"""Environment variable: `VISIBLE` as it was before `restrict_to_gpu`, for this process and those that it starts."""
SIGNS = ("/dev/nvidia0", "/proc/driver/nvidia/gpus", "/dev/dxg", "/dev/kfd")
"""Files of a machine with a GPU: of NVIDIA's driver, of Windows under WSL, of AMD's driver."""

ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
"""Environment variables of torch's allocator, the newer name first; from 2.9 on the older one brings a warning."""

ZEROGPU = "SPACES_ZERO_GPU"
"""Environment variable: true on a Hugging Face Space with ZeroGPU."""


class Gpu(NamedTuple):
    """A GPU as `nvidia-smi` lists it: the system's number, its UUID, product name and bytes of memory."""

    number: str
    uuid: str
    name: str
    memory: int


# ---------------------------------------------------------------------------------------------------------
# Names


def given() -> str:
    """CUDA_VISIBLE_DEVICES as it was given; `all` if it was not."""
    return os.environ.get(GIVEN, os.environ.get(VISIBLE, "all"))


def given_entries() -> list[str] | None:
    """The entries of CUDA_VISIBLE_DEVICES as it was given; None if it was not, so that all GPUs are visible."""
    if given() == "all":
        return None
    entries = []
    for entry in (part.strip() for part in given().split(",")):
        if entry in ("", "-1"):  # CUDA ignores all that follows
            break
        entries.append(entry)
    return entries


def entry_at(place: int) -> str | None:
    """The entry of the visible GPU at a place, from 0; None if there are not so many."""
    entries = given_entries()
    if entries is None:
        return str(place)
    return entries[place] if place < len(entries) else None


def lock_name(device: str) -> str:
    """The name under which `cuda` or `cuda:N` is locked: `cuda:` and the system's number, or the name of a part."""
    entry = entry_at(place_of(device)) or str(place_of(device))
    number = next((gpu.number for gpu in system_gpus() if is_gpu(entry, gpu)), entry)
    return "cuda:" + re.sub(r"[^\w-]", "-", number)[:64]


def is_gpu(entry: str, gpu: Gpu) -> bool:
    """Whether an entry of CUDA_VISIBLE_DEVICES means this GPU."""
    return entry == gpu.number or (entry.startswith("GPU-") and gpu.uuid.startswith(entry))


def place_of(device: str) -> int:
    """The place of `cuda` or `cuda:N` among the visible GPUs."""
    return int(device.partition(":")[2] or 0)


def restrict_to_gpu(device: str) -> str:
    """Show this process only the GPU `cuda` or `cuda:N` → torch's name for it from now on, `cuda`.

    It must come before anything that may start CUDA: importing PEFT imports bitsandbytes, which does. Raises
    `ConfigError` if there is no such GPU, or if this process computes on another one already.
    """
    entries = given_entries()
    entry = entry_at(place_of(device))
    if entry is None:
        shown = f"{VISIBLE} shows {len(entries or [])} of the GPUs"
        raise ConfigError("model.device", device, f"auto, cpu or a visible GPU, from cuda:0 on ({shown})")
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")  # numbers as `nvidia-smi` gives them
    if not {*ALLOCATOR} & os.environ.keys():  # rows of many lengths leave gaps that no other length fits in
        newer = tuple(map(int, version("torch").split(".")[:2])) >= (2, 9)
        os.environ[ALLOCATOR[0 if newer else 1]] = "expandable_segments:True"
    if os.environ.get(VISIBLE) == entry:
        return "cuda"
    torch: Any = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        if os.environ.get(GIVEN) is None and place_of(device) == 0:
            return "cuda"  # the process of somebody else, who computes on the first one
        raise ConfigError(
            "model.device", device, "the GPU that this process computes on already", "Use another process."
        )
    os.environ.setdefault(GIVEN, given())
    os.environ[VISIBLE] = entry
    return "cuda"


def is_restricted() -> bool:
    """Whether this process, or the one that started it, has called `restrict_to_gpu`."""
    return GIVEN in os.environ


# ---------------------------------------------------------------------------------------------------------
# What there is


def on_zerogpu() -> bool:
    """Whether this is a Space with ZeroGPU: a function of the studio gets a GPU for a call, in a fork made for it."""
    return os.environ.get(ZEROGPU, "").lower() in ("1", "t", "true")


def borrows_gpus() -> bool:
    """Whether functions of this process get a GPU for a call: it has imported `spaces`, which shows `cuda` until then.

    That is the studio's process and its forks; what they start as a program sees the GPUs that there are.
    """
    return on_zerogpu() and "spaces" in sys.modules


@functools.cache
def system_gpus() -> tuple[Gpu, ...]:
    """The NVIDIA GPUs of the machine; empty where `nvidia-smi` is missing or fails, or a GPU is only borrowed."""
    if borrows_gpus():
        return ()
    try:
        rows = nvidia_smi("--query-gpu=index,uuid,name,memory.total")
        return tuple(Gpu(number, uuid, name, int(size) << 20) for number, uuid, name, size in rows)
    except (OSError, ValueError, subprocess.SubprocessError):
        return ()


def nvidia_smi(*query: str) -> list[list[str]]:
    """The rows of what `nvidia-smi` answers. Raises `OSError` or `SubprocessError`."""
    command = ["nvidia-smi", *query, "--format=csv,noheader,nounits"]
    lines = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.splitlines()
    return [[cell.strip() for cell in line.split(",")] for line in lines if line.strip()]


def gpu_of(device: str) -> Gpu | None:
    """The GPU that `cuda` or `cuda:N` means; None if unknown."""
    entry = entry_at(place_of(device))
    return next((gpu for gpu in system_gpus() if entry is not None and is_gpu(entry, gpu)), None)


def free_on_gpu(name: str) -> int | None:
    """Free bytes on the GPU that is locked under this name; None if unknown."""
    try:
        ((free,),) = nvidia_smi(f"--id={name.partition(':')[2]}", "--query-gpu=memory.free")
        return int(free) << 20
    except (OSError, ValueError, subprocess.SubprocessError):
        return None


def has_signs() -> bool:
    """Whether something on this machine says that it has a GPU, which this process may see."""
    return given_entries() != [] and (any(map(os.path.exists, SIGNS)) or bool(system_gpus()))
