"""Device selection, the names under which devices are locked, and free memory.

Only the functions that take or return `torch.device` import torch.
"""

from __future__ import annotations

import os
import platform
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

import psutil

from mole.core.errors import ConfigError
from mole.core.gpu_check import check_gpus, why_unusable
from mole.core.gpus import is_restricted, lock_name, place_of, restrict_to_gpu

if TYPE_CHECKING:
    import torch

CGROUP = Path("/sys/fs/cgroup")
HEADROOM = 1.25
"""Free memory required to load a model, as a multiple of its weights: attention caches and buffers need room too."""

# ---------------------------------------------------------------------------------------------------------
# Which device a setting means


def physical_device(device: str) -> str:
    """The name under which all processes lock a device: `cpu`, `mps`, or `cuda:N` with the system's N. No torch."""
    found = found_device(device)
    return lock_name(found) if found.startswith("cuda") else found


def is_physical_device(name: Any) -> TypeGuard[str]:
    """Whether `name`, read from a file, is one that `physical_device` returns."""
    return isinstance(name, str) and re.fullmatch(r"cpu|mps|cuda:[\w-]{1,64}", name) is not None


def found_device(device: str) -> str:
    """What `auto` means on this machine: the first GPU that works, else `cpu`; other names stay. No torch."""
    if device != "auto":
        return device
    places = check_gpus().places
    if places:
        return f"cuda:{places[0]}"
    return "mps" if sys.platform == "darwin" and os.uname().machine == "arm64" else "cpu"


def restrict_to(device: str) -> str:
    """Let this process see no GPU but the one that `device` means, if it is one → torch's name for the device.

    It must come before anything that may start CUDA: importing PEFT imports bitsandbytes, which does. Raises
    `ConfigError` if there is no such GPU.
    """
    found = found_device(device)
    return restrict_to_gpu(found) if found.startswith("cuda") else found


def has_device(device: str) -> bool:
    """Whether this machine has the device that a setting names, and PyTorch can compute on it. No torch."""
    if device.startswith("cuda"):
        return place_of(device) in check_gpus().places
    return device != "mps" or found_device("auto") == "mps"


def unused_gpu_notice(device: str) -> str | None:
    """What to tell where `auto` finds a GPU that cannot be used, in a sentence; None where there is nothing to tell."""
    why = why_unusable() if device == "auto" else None
    return why and f"This machine has a GPU, but PyTorch cannot use it: {why}. The CPU is used."


def pick_device(device: str = "auto") -> torch.device:
    """The torch device for a name; `auto` prefers a GPU. Raises `ConfigError` if the device does not exist."""
    import torch

    found = found_device(device)
    chosen = torch.device(restrict_to_gpu(found) if found.startswith("cuda") and is_restricted() else found)
    missing_gpu = chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count()
    if missing_gpu or (chosen.type == "mps" and not torch.backends.mps.is_available()):
        why = why_unusable() if missing_gpu else None
        advice = f"PyTorch cannot use the GPU: {why}." if why else ""
        known = ", ".join(available_devices())
        raise ConfigError("model.device", device, f"auto or a device of this machine ({known})", advice)
    return chosen


def available_devices() -> list[str]:
    """The devices available to torch: `cpu`, `cuda:0`, …, `mps`."""
    import torch

    names = ["cpu", *(f"cuda:{number}" for number in range(torch.cuda.device_count()))]
    return [*names, "mps"] if torch.backends.mps.is_available() else names


# ---------------------------------------------------------------------------------------------------------
# Number formats


def pick_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """The dtype for a name; `auto` is bfloat16 where the device supports it in hardware, float16 on other CUDA GPUs.

    Raises `ConfigError` for bfloat16 on a GPU that cannot compute with it.
    """
    import torch

    if dtype == "bfloat16" and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        name = torch.cuda.get_device_name(device)
        raise ConfigError("model.dtype", dtype, f"auto, float16 or float32 on this GPU ({name})")
    if dtype != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[dtype]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if device.type == "cpu" and cpu_is_fast_at_bfloat16():
        return torch.bfloat16
    return torch.float32


def cpu_is_fast_at_bfloat16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether the CPU multiplies bfloat16 matrices in hardware (AMX, AVX512-BF16, Arm's BF16); False if unknown.

    `$MOLE_CPU_BFLOAT16`, 0 or 1, overrides detection.
    """
    override = os.environ.get("MOLE_CPU_BFLOAT16")
    if override in ("0", "1"):
        return override == "1"
    fast = {"amx_bf16", "avx512_bf16"} if platform.machine() in ("x86_64", "AMD64") else {"bf16"}
    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return False
    flags = next((line for line in lines if line.lower().startswith(("flags", "features"))), "")
    return bool(fast & set(flags.split()))


# ---------------------------------------------------------------------------------------------------------
# Memory, in bytes


def free_memory(device: torch.device) -> int | None:
    """Free bytes on a device, for a CPU within the container's limit; None if unknown."""
    if device.type == "cuda":
        import torch

        torch.cuda.empty_cache()  # what the allocator keeps for later is free too
        return int(torch.cuda.mem_get_info(device)[0])
    return free_on_cpu() if device.type == "cpu" else None


def free_on_cpu(cgroup: Path = CGROUP) -> int:
    """Free bytes of RAM, within the container's limit."""
    left = _free_in_container(cgroup)
    available = int(psutil.virtual_memory().available)
    return available if left is None else min(available, left)


def _free_in_container(cgroup: Path) -> int | None:
    """The container's limit minus its use, not counting file pages that can be dropped."""
    try:
        limit = int((cgroup / "memory.max").read_text())
        stat = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
        return limit - int((cgroup / "memory.current").read_text()) + int(stat.get("inactive_file", 0))
    except (OSError, ValueError):
        return None


def total_on_cpu() -> int:
    """Bytes of RAM, within the container's limit."""
    total = int(psutil.virtual_memory().total)
    try:
        return min(total, int((CGROUP / "memory.max").read_text()))
    except (OSError, ValueError):
        return total
