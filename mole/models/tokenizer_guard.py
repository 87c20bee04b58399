"""Makes the failures of a tokenizer's own patterns and settings, and ids that its model cannot read, ordinary errors.

`tokenizer.json` comes with a model. The library that runs it (in Rust) panics where a pattern backtracks too long or
settings contradict each other, and Python sees a `BaseException`, which no handler of errors catches. No torch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mole.core.errors import ModelError, brief
from mole.core.text import one_line

MAX_FILE = 128 << 20
"""Bytes of `tokenizer.json`, which takes twenty times as many in memory; the largest on the hub have 35 MB."""
WRAPPED = ("_encode_plus", "_decode")
"""Methods through which every text and every token id goes."""


def check_tokenizer_files(folder: Path, name: str) -> None:
    """Check that a model's tokenizer is no larger than any in use. Raises `ModelError`."""
    for path in folder.glob("*token*"):
        if path.suffix in (".json", ".model") and (size := path.stat().st_size) > MAX_FILE:
            raise ModelError(
                f"The tokenizer of {name} is too large: {path.name} has {size:,} bytes, {MAX_FILE:,} are read."
            )


@contextmanager
def panics_as_errors(name: str) -> Iterator[None]:
    """A block in which a panic of the tokenizer of model `name` is a `ModelError`."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # the library does not export it
            raise
        raise ModelError(f"The tokenizer of {name} failed: {one_line(Exception(error))}.") from None


def guard(tokenizer: Any, name: str, rows: int | None = None) -> Any:
    """The tokenizer of model `name`, changed in place: its panics, and tokens without an embedding, are `ModelError`s.

    Args:
        tokenizer: of transformers.
        name: of its model.
        rows: how many tokens the model has embeddings for; None if unknown.
    """
    kind = type(tokenizer)
    last = rows if rows is not None and len(tokenizer) > rows else None

    def wrapped(method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def call(self: Any, *arguments: Any, **named: Any) -> Any:
            with panics_as_errors(name):
                result = method(self, *arguments, **named)
            if last is not None and method is kind._encode_plus:
                check_ids(result["input_ids"], last, self, name)
            return result

        return call

    # A class of the same name, as the name is saved with the tokenizer.
    methods = {method: wrapped(getattr(kind, method)) for method in WRAPPED}
    tokenizer.__class__ = type(kind.__name__, (kind,), {"__module__": kind.__module__, **methods})
    return tokenizer


def check_ids(ids: Any, rows: int, tokenizer: Any, name: str) -> None:
    """Raise `ModelError` if a text's token ids, or those of several texts, are not below the `rows` of embeddings."""
    for one in [ids] if ids and isinstance(ids[0], int) else ids:
        if (largest := max(one, default=0)) >= rows:
            raise ModelError(
                f"The tokenizer of {name} writes the token {brief(tokenizer.convert_ids_to_tokens(largest))} with the "
                f"id {largest}, and the model has embeddings for ids below {rows} only: use the tokenizer that "
                "belongs to the model, or a model whose embeddings were extended for it."
            )
