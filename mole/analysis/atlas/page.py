"""An atlas, or two of them, as one HTML file that opens without a server and loads nothing. No torch."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mole.analysis.atlas.comparison import side_by_side
from mole.core import files

PARTS = Path(__file__).parent / "html"
"""The page, its style and its script."""


def read_part(name: str) -> str:
    """A file of the page."""
    with open(PARTS / name, encoding="utf-8", opener=files.regular) as file:
        return file.read()


def atlas_page(atlases: Sequence[dict[str, Any]]) -> str:
    """The page of one atlas, or of two side by side. Raises `InputError` if two are not of the same rows.

    Texts of the data stand in the page as JSON, in which nothing ends the element they are in, and the script writes
    them as text only.
    """
    data = json.dumps(side_by_side(atlases), ensure_ascii=True)
    parts = {
        "TITLE": html.escape(" and ".join(str(atlas["target"]) for atlas in atlases)),
        "STYLE": read_part("page.css") + read_part("atlas.css"),
        "SCRIPT": read_part("atlas.js"),
        "DATA": data.replace("<", "\\u003c"),
    }
    head, *rest = read_part("atlas.html").split("{{")
    pieces = (piece.partition("}}") for piece in rest)
    return head + "".join(parts[name] + after for name, _, after in pieces)
