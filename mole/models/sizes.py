"""Sizes of a model's weights, read from the headers of its files. No torch."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterable
from pathlib import Path

from mole.core.errors import ModelError, MoleError
from mole.core.paths import local_path
from mole.models.sources import EMBEDDED, cached_from_hub, resolve
from mole.models.weights import shapes_in

QUANTISED_BYTES = {"8bit": 1.0, "4bit": 0.53}
"""Bytes per weight of a quantised projection in bitsandbytes, scales included."""


def files_of(model: str) -> list[Path]:
    """The weight files of a base model on this machine; empty for one that must be downloaded first."""
    try:
        here = model == EMBEDDED or os.path.exists(local_path(model))
        source = resolve(model) if here else cached_from_hub(model)
    except (MoleError, OSError, ValueError):
        return []
    folder = Path(source.location) if source else Path()
    return sorted(folder.glob("*.safetensors")) if source and folder.is_dir() else []


def parameters(files: Iterable[Path]) -> int:
    """Number of weights in safetensors files, read from their headers; missing files count as 0."""
    total = 0
    for path in files:
        with contextlib.suppress(ModelError):
            total += sum(map(math.prod, shapes_in(path)))
    return total
