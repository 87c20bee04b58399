"""How much memory a model's weights take, and how much a device has left. No torch until a GPU is asked about."""

from __future__ import annotations

import contextlib
import math
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
from safetensors import SafetensorError, safe_open

from mole.core.errors import MoleError
from mole.data.readers import local_path
from mole.models.sources import EMBEDDED, cached_from_hub, resolve

if TYPE_CHECKING:
    import torch

CGROUP = Path("/sys/fs/cgroup")
HEADROOM = 1.25
"""Free memory needed to load a model, as a multiple of its weights: attention caches and buffers need room too."""


def files_of(model: str) -> list[Path]:
    """The weight files of a base model that is on this machine; none for one that must be fetched first."""
    try:
        here = model == EMBEDDED or os.path.exists(local_path(model))
        source = resolve(model) if here else cached_from_hub(model)
    except (MoleError, OSError, ValueError):
        return []
    folder = Path(source.location) if source else Path()
    return sorted(folder.glob("*.safetensors")) if source and folder.is_dir() else []


def parameters(files: Iterable[Path]) -> int:
    """Number of weights in safetensors files, read from their headers; 0 for files that are not there."""
    total = 0
    for path in files:
        with contextlib.suppress(OSError, SafetensorError), safe_open(path, framework="np") as file:
            total += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    return total


def free(device: torch.device) -> int | None:
    """Bytes free on a device; for a CPU what programs can still get, also inside a container. None if unknown."""
    if device.type == "cuda":
        import torch

        return int(torch.cuda.mem_get_info(device)[0])
    return free_on_cpu() if device.type == "cpu" else None


def free_on_cpu(cgroup: Path = CGROUP) -> int:
    """The smaller of what the machine has left and what the container may still take."""
    left = _left_in(cgroup)
    available = int(psutil.virtual_memory().available)
    return available if left is None else min(available, left)


def _left_in(cgroup: Path) -> int | None:
    """Limit less use, where files that were read and can be forgotten do not count as used."""
    try:
        limit = int((cgroup / "memory.max").read_text())
        stat = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
        return limit - int((cgroup / "memory.current").read_text()) + int(stat.get("inactive_file", 0))
    except (OSError, ValueError):
        return None


def free_on_gpu(number: str) -> int | None:
    """Bytes free on the GPU of the machine's own `number`, told without torch where that is not loaded."""
    torch: Any = sys.modules.get("torch")
    if torch is None:
        query = ["nvidia-smi", f"--id={number}", "--query-gpu=memory.free", "--format=csv,noheader,nounits"]
        try:
            return int(subprocess.run(query, capture_output=True, timeout=5, check=True).stdout) << 20
        except (OSError, ValueError, subprocess.SubprocessError):
            return None
    return int(torch.cuda.mem_get_info(0)[0]) if torch.cuda.is_available() else None
