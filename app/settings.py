"""Where the studio runs, what it may do there, and the few numbers that bound it."""

from __future__ import annotations

import gc
import hashlib
import inspect
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mole import runs
from mole.errors import DataError, RunError

ROOT = Path(__file__).resolve().parent.parent
TITLE = "MoLE Studio"
CLAIM = "Train a mixture of LoRA experts, and watch which experts answer."
MAX_UPLOAD = "1gb"
MAX_QUEUE = 64
DELETE_CACHE = (24 * 3600, 24 * 3600)
"""Gradio's own copies of uploads are looked at, and deleted, after a day; ours in `$MOLE_HOME/uploads` stay."""


def space_id() -> str:
    """`owner/name` of the Hugging Face Space the studio runs on; empty elsewhere."""
    return os.environ.get("SPACE_ID", "")


def sample(name: str) -> Path | None:
    """A file of the sample data: in the working tree, or inside the installed package; None when neither has it."""
    import mole

    places = (ROOT / "assets" / "data" / name, Path(mole.__file__).parent / "assets" / "data" / name)
    return next((path for path in places if path.is_file()), None)


def keep_upload(path: str) -> Path:
    """Copy an uploaded file to `$MOLE_HOME/uploads`, where a queued run will still find it; the same content once.

    Raises `DataError` when it cannot be read.
    """
    source = Path(path)
    try:
        digest = hashlib.sha256()
        with source.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
        stem = re.sub(r"[^A-Za-z0-9._-]+", "-", source.stem).strip(".-")[:60] or "data"
        kept = runs.home() / "uploads" / f"{stem}-{digest.hexdigest()[:8]}{source.suffix.lower()}"
        kept.parent.mkdir(parents=True, exist_ok=True)
        if not kept.exists():
            aside = kept.with_name(f".{kept.name}.{os.getpid()}")
            shutil.copyfile(source, aside)
            aside.replace(kept)
    except OSError as error:
        raise DataError(f"The upload {source.name} cannot be kept: {error}.", field="data.path") from None
    return kept


@contextmanager
def quickly() -> Iterator[None]:
    """Import gradio inside this block, in half its time.

    It does not parse its own sources to refresh the `.pyi` files beside them: it leaves a class alone whose file is
    unknown, so none is known here. And the garbage collector rests, which would look through all that is imported
    again and again and find nothing.
    """
    collects = gc.isenabled()
    gc.disable()
    known = inspect.getfile

    def getfile(item: Any) -> str:
        if isinstance(item, type) and item.__module__.startswith("gradio."):
            raise OSError("not asked for now")
        return known(item)

    inspect.getfile = getfile  # type: ignore[assignment]
    try:
        yield
    finally:
        inspect.getfile = known
        if collects:
            gc.enable()
            gc.freeze()


def forbid_on_space() -> None:
    """Raise when the studio runs on a Space, where nobody's training may be started, stopped or deleted by anybody."""
    if space_id():
        raise RunError(f"Training is switched off on this Space. {how_to_duplicate()}")


def how_to_duplicate() -> str:
    """What a visitor of a Space does to train."""
    return (
        f"Duplicate it to train on hardware of your own: https://huggingface.co/spaces/{space_id()}?duplicate=true, "
        "or install MoLE Studio and run `mole studio`."
    )
