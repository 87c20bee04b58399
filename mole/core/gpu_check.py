"""Whether PyTorch can compute on this machine's GPUs, and if not, why. No torch: a process of its own asks it.

A GPU that is there may be of no use: PyTorch was built without CUDA, the driver is older than it needs, or it has no
kernels for the GPU's generation.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any, NamedTuple

from mole.core.gpus import VISIBLE, borrows_gpus, given, has_signs
from mole.core.paths import home
from mole.core.processes import python_environment, read_record, write_record

SECONDS = 60.0
"""The longest that trying the GPUs may take."""
RECORD = "gpus.json"
"""In `$MOLE_HOME`: what worked when it was tried, until the machine starts anew or has another driver or PyTorch."""
STATE = ("/proc/sys/kernel/random/boot_id", "/proc/driver/nvidia/version")


class GpuCheck(NamedTuple):
    """The places (the N of `cuda:N`) of the GPUs that PyTorch can compute on; and why not on the others, if any."""

    places: tuple[int, ...]
    reason: str


def check_gpus() -> GpuCheck:
    """Which of the visible GPUs PyTorch can compute on; nothing is tried where nothing says that there is one."""
    if borrows_gpus():
        return GpuCheck((0,), "")
    return _checked(given()) if has_signs() else GpuCheck((), "")


def why_unusable() -> str | None:
    """Why PyTorch can compute on none of the GPUs that this machine seems to have; None where it can, or has none."""
    check = check_gpus()
    return None if check.places else check.reason or None


@functools.cache
def _checked(visible: str) -> GpuCheck:
    state = [visible, sys.executable, importlib.metadata.version("torch"), *map(_text, STATE)]
    kept = read_record(home() / RECORD)
    if kept.get("state") == state and all(isinstance(place, int) for place in kept.get("places") or [""]):
        return GpuCheck(tuple(kept["places"]), "")
    check = _ask(visible)
    if check.places:  # what does not work may be put in order at any time
        with contextlib.suppress(OSError):
            write_record(home() / RECORD, {"state": state, "places": check.places})
    return check


def _ask(visible: str) -> GpuCheck:
    environment = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", **python_environment()}
    environment.pop(VISIBLE, None)
    if visible != "all":
        environment[VISIBLE] = visible
    command = [sys.executable, "-m", "mole.core.gpu_check"]
    try:
        done = subprocess.run(command, capture_output=True, timeout=SECONDS, env=environment)
        places, reason = json.loads(done.stdout)
    except subprocess.TimeoutExpired:
        return GpuCheck((), f"it did not answer within {SECONDS:g} seconds")
    except (OSError, ValueError):
        return GpuCheck((), "the process that tried it failed")
    return GpuCheck(tuple(places), reason)


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


# ---------------------------------------------------------------------------------------------------------
# The process


def try_gpus() -> GpuCheck:
    """Compute something on each visible GPU."""
    import torch

    if torch.version.cuda is None and torch.version.hip is None:
        return GpuCheck((), f"PyTorch {torch.__version__} was built for the CPU only (see pytorch.org/get-started)")
    places, reasons = list[int](), list[str]()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            torch.cuda.init()
        except Exception as error:
            reasons.append(first_line(error))
        for place in range(0 if reasons else torch.cuda.device_count()):
            try:
                torch.ones(2, device=f"cuda:{place}").sum().item()
                places.append(place)
            except Exception as error:
                reasons.append(first_line(error))
    reasons += [first_line(warning.message) for warning in told]
    return GpuCheck(tuple(places), next(iter(reasons), "CUDA shows none"))


def first_line(problem: Any) -> str:
    """The first line of an error or a warning, without its full stop."""
    return next(iter(str(problem).strip().splitlines()), type(problem).__name__).rstrip(".")


if __name__ == "__main__":
    print(json.dumps(try_gpus()))
