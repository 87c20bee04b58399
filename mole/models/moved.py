"""Base models that have moved since an adapter was trained: found by `--base`, and told from others. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mole.core import checkpoint
from mole.core.errors import CheckpointError, ModelError
from mole.models.sources import fingerprint, local_folder, resolve


def check_base(name: str, advice: str) -> None:
    """Raise `ModelError` with the advice unless the base model of an adapter is where it was."""
    try:
        resolve(name)
    except ModelError as error:
        raise ModelError(f"{error} {advice}") from error


def noted_base(folder: Path) -> dict[str, str]:
    """The fingerprint of the base model in the manifest of an adapter or checkpoint; empty where none is noted."""
    try:
        noted = checkpoint.read_manifest(folder).meta.get("base")
    except CheckpointError:  # an adapter from elsewhere
        return {}
    return noted if isinstance(noted, dict) else {}


def different_files(noted: Mapping[str, Any], name: str) -> list[str]:
    """The files of a base model that differ from the noted fingerprint; none where none is noted.

    Raises `ModelError` when there is no such model.
    """
    found = fingerprint(local_folder(resolve(name), progress=True)) if noted else {}
    return sorted(file for file in {*noted, *found} if noted.get(file) != found.get(file))
