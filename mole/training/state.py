"""The training state of a checkpoint: optimizer, schedule, scaler and random generators, never pickled.

Tensors are stored as safetensors and values as JSON. Both keep floating-point numbers exactly, so a resumed run
continues bit for bit.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mole.core.errors import CheckpointError

TENSORS, VALUES = "training_state.safetensors", "training_state.json"


def save_training_state(folder: Path, optimizer: Any, scheduler: Any, scaler: Any = None) -> None:
    """Write the state of the optimizer, the schedule, the gradient scaler and all random generators."""
    state = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, Any] = {}
    for index, slots in state["state"].items():
        for name, value in slots.items():
            target = tensors if isinstance(value, Tensor) else scalars
            target[f"optimizer.{index}.{name}"] = value
    tensors["random.torch"] = torch.get_rng_state()
    if torch.cuda.is_initialized():  # asking would start CUDA in a run on the CPU
        for device, generator in enumerate(torch.cuda.get_rng_state_all()):
            tensors[f"random.cuda.{device}"] = generator
    kind, keys, *position = np.random.get_state()
    tensors["random.numpy"] = torch.from_numpy(np.asarray(keys, dtype=np.int64))
    values = {
        "optimizer": scalars,
        "param_groups": state["param_groups"],
        "scheduler": scheduler.state_dict(),
        "scaler": scaler.state_dict() if scaler is not None else None,
        "random": {"python": random.getstate(), "numpy": [kind, *position]},
    }
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, folder / TENSORS)
    (folder / VALUES).write_text(json.dumps(values), encoding="utf-8")


def read_training_state(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and values that `save_training_state` wrote. Raises `CheckpointError` when they cannot be read."""
    try:
        return load_file(folder / TENSORS), json.loads((folder / VALUES).read_text(encoding="utf-8"))
    except Exception as error:
        raise CheckpointError(f"The training state in {folder} cannot be read: {error}.") from error


def restore_optimizer(folder: Path, optimizer: Any, scheduler: Any, scaler: Any = None) -> None:
    """Restore the optimizer, the schedule and the scaler."""
    tensors, values = read_training_state(folder)
    slots: dict[int, dict[str, Any]] = {}
    for name, value in {**tensors, **values["optimizer"]}.items():
        prefix, index, *rest = name.split(".")
        if prefix == "optimizer":
            slots.setdefault(int(index), {})[".".join(rest)] = value
    optimizer.load_state_dict({"state": slots, "param_groups": values["param_groups"]})
    scheduler.load_state_dict(values["scheduler"])
    if scaler is not None and values["scaler"]:
        scaler.load_state_dict(values["scaler"])


def restore_random(folder: Path) -> None:
    """Restore the random generators of Python, NumPy and torch."""
    tensors, values = read_training_state(folder)
    version, state, gauss = values["random"]["python"]
    random.setstate((version, tuple(state), gauss))
    kind, *position = values["random"]["numpy"]
    np.random.set_state((kind, tensors["random.numpy"].numpy().astype(np.uint32), *position))
    torch.set_rng_state(tensors["random.torch"])
    if torch.cuda.is_initialized():
        for device in range(torch.cuda.device_count()):
            if f"random.cuda.{device}" in tensors:
                torch.cuda.set_rng_state(tensors[f"random.cuda.{device}"], device)
