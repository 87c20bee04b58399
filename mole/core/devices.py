"""Device selection, the names under which devices are locked, and free memory.

Only the functions that take or return `torch.device` import torch.
"""

from __future__ import annotations

import functools
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

import psutil

from mole.core.errors import ConfigError

if TYPE_CHECKING:
    import torch

CGROUP = Path("/sys/fs/cgroup")
HEADROOM = 1.25
"""Free memory required to load a model, as a multiple of its weights: attention caches and buffers need room too."""

# ---------------------------------------------------------------------------------------------------------
# Names: `model.device` as configured, the system's index of a GPU, and torch's index


def physical_device(device: str) -> str:
    """The name under which a device is locked: `cpu`, `mps` or `cuda:N` with N the system's index. No torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if device == "auto":
        has_nvidia = Path("/dev/nvidia0").exists() or Path("/proc/driver/nvidia/gpus").is_dir()
        if has_nvidia and visible not in ("", "-1"):
            device = "cuda"
        else:
            device = "mps" if sys.platform == "darwin" and os.uname().machine == "arm64" else "cpu"
    if device == "cuda":
        return f"cuda:{(visible or '0').split(',')[0].strip()}"
    return device


def is_physical_device(name: Any) -> TypeGuard[str]:
    """Whether `name`, read from a file, is one that `physical_device` returns."""
    return isinstance(name, str) and re.fullmatch(r"cpu|mps|cuda:[\w-]{1,64}", name) is not None


def restrict_to_gpu(device: str) -> str:
    """Make `cuda:N` the only GPU visible to this process, and return torch's name for it, `cuda`.

    Must be called before CUDA is initialised. Other names are returned unchanged.
    """
    kind, _, number = device.partition(":")
    if number:
        os.environ["CUDA_VISIBLE_DEVICES"] = number
    return kind


def pick_device(device: str = "auto") -> torch.device:
    """The torch device for a name; `auto` prefers a GPU. Raises `ConfigError` if the device does not exist."""
    import torch

    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    chosen = torch.device(device)
    missing_gpu = chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count()
    if missing_gpu or (chosen.type == "mps" and not torch.backends.mps.is_available()):
        raise ConfigError(
            "model.device", device, f"auto or a device of this machine ({', '.join(available_devices())})"
        )
    return chosen


def available_devices() -> list[str]:
    """The devices available to torch: `cpu`, `cuda:0`, …, `mps`."""
    import torch

    names = ["cpu", *(f"cuda:{number}" for number in range(torch.cuda.device_count()))]
    return [*names, "mps"] if torch.backends.mps.is_available() else names


# ---------------------------------------------------------------------------------------------------------
# Number formats


def pick_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """The dtype for a name; `auto` is bfloat16 where the device supports it in hardware, float16 on other CUDA GPUs."""
    import torch

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


def free_on_gpu(number: str) -> int | None:
    """Free bytes on the GPU with the system's index `number`; does not import torch."""
    torch: Any = sys.modules.get("torch")
    if torch is not None:
        return int(torch.cuda.mem_get_info(0)[0]) if torch.cuda.is_available() else None
    query = ["nvidia-smi", f"--id={number}", "--query-gpu=memory.free", "--format=csv,noheader,nounits"]
    try:
        return int(subprocess.run(query, capture_output=True, timeout=5, check=True).stdout) << 20
    except (OSError, ValueError, subprocess.SubprocessError):
        return None


def total_on_cpu() -> int:
    """Bytes of RAM, within the container's limit."""
    total = int(psutil.virtual_memory().total)
    try:
        return min(total, int((CGROUP / "memory.max").read_text()))
    except (OSError, ValueError):
        return total


def gpu_named(device: str) -> tuple[str, int] | None:
    """Product name and bytes of the NVIDIA GPU that `model.device` selects; None for other devices."""
    if device in ("cpu", "mps") or os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1"):
        return None
    found = visible_gpus()
    number = int(device.partition(":")[2] or 0)
    return found[number] if number < len(found) else None


@functools.cache
def visible_gpus() -> list[tuple[str, int]]:
    """Product name and bytes of each NVIDIA GPU visible to this process, in order."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").strip()
    only = [f"--id={visible}"] if visible else []
    query = ["nvidia-smi", *only, "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        lines = subprocess.run(query, capture_output=True, text=True, timeout=5, check=True).stdout.splitlines()
        return [(name.strip(), int(size) << 20) for name, _, size in (line.rpartition(",") for line in lines)]
    except (OSError, ValueError, subprocess.SubprocessError):
        return []
