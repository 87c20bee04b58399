"""Reading the values of columns and fields: texts, numbers, text in parts, JSON text. No torch."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from mole.core.errors import DataError, brief
from mole.core.text import one_line

TEXT_PARTS = ("text", "input_text", "output_text")
"""The types of parts of a content that are text."""


def join_parts(parts: Sequence[Any], label: str) -> str:
    """The text of a content that is a list of parts. Raises `DataError` for a part that is not text."""
    texts = []
    for part in parts:
        kind = part.get("type", "text") if isinstance(part, dict) else None
        text = part if isinstance(part, str) else part.get("text") if kind in TEXT_PARTS else None
        if not isinstance(text, str):
            what = f"of the type {brief(kind)}" if isinstance(kind, str) else json_type(part)
            raise DataError(f"{label} has a part that is {what}; only text is learnt")
        texts.append(text)
    return "".join(texts)


def parse_nested(value: Mapping[str, Any], name: str) -> Any:
    """The value of a column with a list or object, which CSV holds as JSON text. Raises `DataError`."""
    return parse_json_text(value.get(name), name)


def parse_json_text(value: Any, label: str) -> Any:
    """A value, or what it is as JSON if it is text; None if that is blank. Raises `DataError`."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{label} is text that is not JSON: {one_line(error)}") from None


def text_value(value: Mapping[str, Any], name: str, label: str = "", *, numbers: bool = False) -> str:
    """The text of a column, or with `numbers` a number as text.

    Raises `DataError` when it is missing, null, blank or neither.
    """
    entry, label = value.get(name), label or name
    if entry is None:
        raise DataError(f"{label} is null" if name in value else f"{label} is missing")
    if numbers and type(entry) in (int, float):
        entry = number_text(entry, label)
    if not isinstance(entry, str):
        raise DataError(f"{label} is {json_type(entry)}, not text")
    if not entry.strip():
        raise DataError(f"{label} is empty")
    try:
        entry.encode()
    except UnicodeEncodeError:
        raise DataError(f"{label} is not valid Unicode (half of a surrogate pair)") from None
    return entry


def number_text(number: float, label: str) -> str:
    """A number as it is written. Raises `DataError` for one that is not finite or has thousands of digits."""
    if isinstance(number, float) and not math.isfinite(number):
        raise DataError(f"{label} is {number}, not a number or text")
    try:
        return str(number)
    except ValueError:
        raise DataError(f"{label} is {brief(number)}") from None


def json_type(value: Any) -> str:
    """The type of a JSON value in words."""
    kinds = {type(None): "null", bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list"}
    return kinds.get(type(value), "an object" if isinstance(value, dict) else f"a {type(value).__name__}")
