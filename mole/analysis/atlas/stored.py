"""An atlas as a JSON file in a run's folder. No torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mole.core import checkpoint, files
from mole.core.errors import InputError
from mole.core.text import one_line

FORMAT = 1
"""Version of the format, which docs/atlas.md describes."""
MAX_ATLAS_BYTES = 64 << 20
"""Largest atlas that is read; one of 210 projections with 8 experts has 2 MB."""


def write_atlas(path: Path, atlas: dict[str, Any]) -> None:
    """Write an atlas, whole or not at all."""
    text = json.dumps(atlas, ensure_ascii=False)
    checkpoint.write_file(path, lambda aside: aside.write_text(text, encoding="utf-8"))


def read_atlas(path: Path) -> dict[str, Any]:
    """An atlas that was written as JSON. Raises `InputError` if there is none, or of another version."""
    try:
        values = files.read_json(path, most=MAX_ATLAS_BYTES)
    except (OSError, ValueError) as error:
        raise InputError(f"There is no atlas in {path}: {one_line(error)}.") from None
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise InputError(f"{path} is no atlas of the version {FORMAT}; compute it again.")
    return values
