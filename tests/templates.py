"""Tokenizers with the chat templates of `cases/templates`, and the text of an example with what is learnt of it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from mole.data import EncodedExample

TEMPLATES = Path(__file__).parent / "cases" / "templates"


def with_template(tokenizer: Any, name: str) -> Any:
    """A copy of the tokenizer with one of the templates."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = (TEMPLATES / f"{name}.jinja").read_text()
    return tokenizer


def marked(encoded: EncodedExample, tokenizer: Any) -> str:
    """The text of an example with ⟦ and ⟧ around what carries loss."""
    text, inside = "", False
    for token, label in zip(encoded.input_ids, encoded.labels, strict=True):
        if (label != -100) != inside:
            text, inside = text + ("⟧" if inside else "⟦"), not inside
        text += tokenizer.decode([token])
    return text + "⟧" * inside
