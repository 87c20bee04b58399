"""Where the studio runs, what is allowed there, its files, and limits of what it is given."""

from __future__ import annotations

import gc
import inspect
import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from mole import runs
from mole.config import RunConfig
from mole.core import checkpoint, limits
from mole.core.errors import ConfigError, DataError, InputError, ModelError, RunError
from mole.core.gpus import on_zerogpu
from mole.core.paths import local_path, make_folder
from mole.data import FILE_SUFFIXES

ROOT = Path(__file__).resolve().parent.parent
TITLE = "MoLE Studio"
CLAIM = "Train a mixture of LoRA experts, and see which experts handle each token."
FLEETING = ("tmpfs", "ramfs", "overlay")
"""File systems that are empty again when a container starts anew."""
DELETE_CACHE = (24 * 3600, 24 * 3600)
"""Gradio deletes its own copies of uploads after a day; those in `$MOLE_HOME/uploads` stay."""
VISITOR_SECONDS = 3600
"""What a visitor of a Space with ZeroGPU trained or uploaded is deleted so long after it ended or was uploaded."""


def space_id() -> str:
    """`owner/name` of the Hugging Face Space the studio runs on; empty elsewhere."""
    return os.environ.get("SPACE_ID", "")


def home_is_kept() -> bool:
    """Whether runs are still there when the studio's machine starts anew: on a Space, only those on mounted storage."""
    if not space_id():
        return True
    place = runs.home().resolve()
    mounted = {Path(disk.mountpoint) for disk in psutil.disk_partitions(all=True) if disk.fstype not in FLEETING}
    return "MOLE_HOME" in os.environ and not mounted.isdisjoint([place, *place.parents[:-1]])


def names() -> set[str]:
    """Further host names of the studio, of a proxy in front of it: `$MOLE_HOSTS`, separated by commas."""
    return {name.strip().lower() for name in os.environ.get("MOLE_HOSTS", "").split(",") if name.strip()}


def debug() -> bool:
    """Whether tracebacks of errors are logged: `mole studio --debug`."""
    return "--debug" in sys.argv


def asset(*parts: str) -> Path | None:
    """A file or folder of `assets/`, in the working tree or in the installed package; None if neither has it."""
    import mole

    places = (ROOT / "assets", Path(mole.__file__).parent / "assets")
    return next((path for place in places if (path := place.joinpath(*parts)).exists()), None)


def sample(name: str) -> Path | None:
    """A file of the sample data."""
    return asset("data", name)


def demo() -> Path | None:
    """The demo adapter's folder, as a target to chat with."""
    return asset("demo") if asset("demo", "adapter", "adapter_config.json") else None


def keep_upload(path: str) -> Path:
    """Copy an uploaded file to `$MOLE_HOME/uploads`, where queued runs still find it; equal files are kept once.

    Raises `DataError` when it cannot be kept.
    """
    source = Path(path)
    if source.suffix.lower() not in FILE_SUFFIXES:
        raise DataError(
            f"The upload {source.name} is not a data file; give one of {', '.join(FILE_SUFFIXES)}.", field="data.path"
        )
    try:
        inner = Path(source.stem).suffix.lower() if source.suffix.lower() == ".gz" else ""
        stem = re.sub(r"[^A-Za-z0-9._-]+", "-", source.stem.removesuffix(inner)).strip(".-")[:60] or "data"
        digits = 32 if space_id() else 8  # visitors must not guess the names of each other's files
        name = f"{stem}-{checkpoint.sha256(source)[:digits]}{inner}{source.suffix.lower()}"
        kept = uploads_folder() / name
        make_folder(kept.parent)
        if kept.exists():
            os.utime(kept)  # it is deleted an hour after the last upload, where that is the rule
        else:
            check_uploads(kept.parent)
            checkpoint.write_file(kept, lambda aside: shutil.copyfile(source, aside))
    except OSError as error:
        raise DataError(f"The upload {source.name} cannot be kept: {error}.", field="data.path") from None
    return kept


def uploads_folder() -> Path:
    """Where uploads are kept."""
    return runs.home() / "uploads"


def check_uploads(folder: Path) -> None:
    """Raise `DataError` when the maximum number of uploads is kept; only their owner can delete some."""
    if len(os.listdir(folder)) >= limits.UPLOADS:
        raise DataError(
            f"{limits.UPLOADS} uploads are kept already, which is the most; delete some in {folder}.", field="data.path"
        )


def check_asked(message: Any, system: Any, max_new_tokens: Any) -> None:
    """Check types and sizes of a message, a system prompt and a reply length. Raises `InputError` naming the field."""
    for field, text in (("message", message), ("system", system)):
        if not isinstance(text, str):
            raise ConfigError(field, text, "text")
        if len(text) > limits.MESSAGE:
            raise InputError(
                f"The {field} has {len(text)} characters; it must have at most {limits.MESSAGE}.", field=field
            )
    if not isinstance(max_new_tokens, (int, float)) or not 1 <= max_new_tokens <= limits.NEW_TOKENS:
        allowed = f"a whole number from 1 to {limits.NEW_TOKENS}"
        raise ConfigError("max_new_tokens", max_new_tokens, allowed, "mole chat writes longer ones.")


def check_public(config: RunConfig) -> None:
    """On a Space, allow samples, uploads and the default model only. Raises `InputError` for anything else."""
    if not space_id():
        return
    for path in (*(source.path for source in config.data.sources), config.data.eval_path):
        if path and not is_public(path):
            raise DataError("This Space allows its samples and uploaded files only.", field="data.path")
    if config.model != RunConfig().model:
        raise ModelError("This Space allows its default model only.", field="model.name")


def is_public(path: str) -> bool:
    """Whether a visitor of a Space may read a data file; elsewhere all files belong to the user."""
    if not space_id():
        return True
    folders = [asset("data"), uploads_folder()]
    found = local_path(path).resolve()
    return any(folder is not None and found.is_relative_to(folder.resolve()) for folder in folders)


@contextmanager
def quickly() -> Iterator[None]:
    """Import gradio inside this block in half the time.

    On import, gradio parses its sources to refresh the `.pyi` files beside them, except for classes whose file is
    unknown; so inside this block no file is known. The garbage collector is paused, because it would scan all imported
    objects again and again and find nothing.
    """
    collects = gc.isenabled()
    gc.disable()
    known = inspect.getfile

    def getfile(item: Any) -> str:
        if isinstance(item, type) and item.__module__.startswith("gradio."):
            raise OSError("unknown while gradio is imported")
        return known(item)

    inspect.getfile = getfile  # type: ignore[assignment]
    try:
        yield
    finally:
        inspect.getfile = known
        if collects:
            gc.enable()
            gc.freeze()


def visitors_train() -> bool:
    """Whether visitors may train short runs: on a Space with ZeroGPU, each on a quota of their own."""
    return bool(space_id()) and on_zerogpu()


def forbid_on_space() -> None:
    """Raise `RunError` on a Space, where visitors must not start, stop or delete runs that are not theirs."""
    if not space_id():
        return
    if visitors_train():
        raise RunError(f"Only short training by the button in Train is possible on this Space. {how_to_duplicate()}")
    raise RunError(f"Training is switched off on this Space. {how_to_duplicate()}")


def delete_cache() -> tuple[int, int]:
    """How often Gradio deletes its copies of uploads and downloads, and how old they are then; in seconds."""
    return (600, VISITOR_SECONDS) if visitors_train() else DELETE_CACHE


def how_to_duplicate() -> str:
    """How a visitor of a Space can train."""
    return (
        f"Duplicate it to train on your own hardware: https://huggingface.co/spaces/{space_id()}?duplicate=true, "
        "or install MoLE Studio and run `mole studio`."
    )
