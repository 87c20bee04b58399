"""Atomic, verifiable folders: checkpoints and the final adapter.

A folder is written under a temporary name, every file is synced to the disk, a manifest with sizes and SHA-256 hashes
is added, and only then is the folder renamed. A folder that fails verification later is renamed to `NAME.bad`, never
deleted. Single files that must survive a power cut are written in the same order, without a manifest.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mole.core import files, paths
from mole.core.errors import CheckpointError

MANIFEST = "manifest.json"
VERSION = 1


@dataclass(frozen=True)
class Manifest:
    """The contents of a folder: `files` maps a relative path to its `sha256` and `size` (bytes)."""

    step: int
    files: dict[str, dict[str, Any]]
    meta: dict[str, Any]


def write(
    checkpoints: Path, step: int, writer: Callable[[Path], None], meta: dict[str, Any] | None = None, *, limit: int = 2
) -> Path:
    """Write the checkpoint `checkpoints/step-N` with what `writer(folder)` puts into a folder, then prune to `limit`.

    An existing checkpoint of the same step that verifies is kept: a run has one state per step.

    Returns:
        The checkpoint's folder.
    """
    paths.make_folder(checkpoints)
    _check_own(checkpoints)
    sync(checkpoints.parent)
    target = checkpoints / f"step-{step}"
    if target.exists():
        if _is_good(target, step):
            return target
        set_aside(target)
    write_folder(target, writer, step=step, meta=meta)
    prune(checkpoints, limit)
    return target


def write_folder(
    target: Path, writer: Callable[[Path], None], *, step: int, meta: dict[str, Any] | None = None
) -> Manifest:
    """Create or replace the folder `target` with what `writer(folder)` puts into an empty folder, plus a manifest.

    The folder appears under its name once all of it is on the disk. If `writer` or the disk fails, nothing is left
    behind and the exception propagates.

    Returns:
        The verified manifest.
    """
    _clear_leftovers(target.parent)
    aside = _aside(target)
    paths.make_folder(aside)
    try:
        writer(aside)
        _seal(aside, step, meta or {})
        old = target.rename(_aside(target)) if target.exists() else None
        aside.rename(target)
        sync(target.parent)
        if old:
            shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    return verify(target)


def write_file(target: Path, writer: Callable[[Path], Any]) -> None:
    """Create or replace the file `target` atomically with what `writer(file)` writes to a temporary one."""
    aside = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    try:
        writer(aside)
        paths.restrict(aside)
        sync(aside)
        aside.replace(target)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    sync(target.parent)


def verify(folder: Path, *, hashes: bool = True) -> Manifest:
    """Return a folder's manifest if its files match it exactly; `hashes=False` compares sizes only.

    Raises:
        CheckpointError: a file is missing, changed or unexpected; the message names it.
    """
    manifest = read_manifest(folder)
    found = {path.relative_to(folder).as_posix(): path for path in _files(folder)}
    found.pop(MANIFEST, None)
    for name in sorted(manifest.files.keys() ^ found.keys()):
        problem = "is missing" if name in manifest.files else "is not in its manifest"
        raise CheckpointError(f"{folder}: {name} {problem}.")
    for name, expected in manifest.files.items():
        path = found[name]
        if path.is_symlink() or not path.is_file():
            raise CheckpointError(f"{folder}: {name} is not a plain file.")
        if path.stat().st_size != expected.get("size"):
            raise CheckpointError(
                f"{folder}: {name} has {path.stat().st_size} bytes instead of {expected.get('size')}."
            )
        if hashes and sha256(path) != expected.get("sha256"):
            raise CheckpointError(f"{folder}: {name} has changed since it was written (its SHA-256 differs).")
    return manifest


def read_manifest(folder: Path) -> Manifest:
    """Read a folder's manifest without checking its files. Raises `CheckpointError` if missing, changed or invalid."""
    try:
        values = files.read_json(folder / MANIFEST)
    except FileNotFoundError:
        raise CheckpointError(f"{folder} has no {MANIFEST}: it was not completely written.") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder}/{MANIFEST} cannot be read: {error}.") from None
    if not isinstance(values, dict) or values.get("version") != VERSION:
        raise CheckpointError(f"{folder}/{MANIFEST} is not of version {VERSION}, the one this program writes.")
    checksum = values.pop("checksum", None)
    if checksum != _checksum(values):
        raise CheckpointError(f"{folder}/{MANIFEST} has changed since it was written (its checksum differs).")
    kinds = {"step": int, "files": dict, "meta": dict}
    wrong = [key for key, kind in kinds.items() if not isinstance(values.get(key), kind)]
    if wrong or not all(isinstance(entry, dict) for entry in values["files"].values()):
        raise CheckpointError(f"{folder}/{MANIFEST} is not a manifest: {(*wrong, 'files')[0]} has the wrong type.")
    return Manifest(step=values["step"], files=values["files"], meta=values["meta"])


def newest_good(checkpoints: Path) -> Path | None:
    """The newest checkpoint that verifies, or None; only for the process that holds the run.

    Newer checkpoints that fail are renamed to `step-N.bad`; temporary folders of a killed process are removed.
    """
    _check_own(checkpoints)
    _clear_leftovers(checkpoints)
    for step, folder in reversed(steps(checkpoints)):
        if _is_good(folder, step):
            return folder
        set_aside(folder)
    return None


def steps(checkpoints: Path) -> list[tuple[int, Path]]:
    """The checkpoints in a folder as (step, path), sorted by step; not verified, and none is a link."""
    if not files.is_folder(checkpoints):
        return []
    found = [(re.fullmatch(r"step-(\d+)", path.name), path) for path in checkpoints.iterdir()]
    return sorted((int(match[1]), path) for match, path in found if match and files.is_folder(path))


def prune(checkpoints: Path, limit: int) -> None:
    """Remove all but the `limit` newest good checkpoints; broken ones are set aside and do not count.

    Those that are kept are verified by SHA-256, the others by size.
    """
    good = 0
    for step, folder in reversed(steps(checkpoints)):
        if not _is_good(folder, step, hashes=good < limit):
            set_aside(folder)
            continue
        good += 1
        if good > limit:
            shutil.rmtree(folder.rename(_aside(folder)), ignore_errors=True)


def set_aside(folder: Path) -> Path:
    """Rename a broken folder to `NAME.bad` (`NAME.bad-2`, … when taken) and return the new path."""
    target, number = folder.with_name(f"{folder.name}.bad"), 1
    while target.exists():
        number += 1
        target = folder.with_name(f"{folder.name}.bad-{number}")
    return folder.rename(target)


def _is_good(folder: Path, step: int, hashes: bool = True) -> bool:
    try:
        return verify(folder, hashes=hashes).step == step
    except (CheckpointError, OSError):
        return False


def _aside(target: Path) -> Path:
    return target.with_name(f".tmp-{target.name}-{secrets.token_hex(4)}")


def _seal(folder: Path, step: int, meta: dict[str, Any]) -> None:
    """Sync every file, write the manifest, sync it and the folders."""
    contents = {}
    for path in sorted(folder.rglob("*")):  # a folder before what is in it
        if not path.is_symlink():
            paths.restrict(path)
    for path in _files(folder):
        sync(path)
        contents[path.relative_to(folder).as_posix()] = {"sha256": sha256(path), "size": path.stat().st_size}
    values = json.loads(json.dumps({"version": VERSION, "step": step, "files": contents, "meta": meta}))
    manifest = folder / MANIFEST
    manifest.write_text(json.dumps({**values, "checksum": _checksum(values)}, indent=1), encoding="utf-8")
    paths.restrict(manifest)
    sync(manifest, *(path for path in folder.rglob("*") if path.is_dir()), folder)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())


def _check_own(folder: Path) -> None:
    """Raise `CheckpointError` if `folder` is a link: what is renamed and removed in it would be someone else's."""
    if folder.is_symlink():
        raise CheckpointError(f"{folder} is a link; checkpoints are kept in a folder of the run itself. Remove it.")


def _clear_leftovers(folder: Path) -> None:
    """Remove the temporary folders of a killed writer."""
    for leftover in folder.glob(".tmp-*"):
        shutil.rmtree(leftover, ignore_errors=True)


def sync(*paths: Path) -> None:
    """`fsync` files and folders (their entries), in this order."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def sha256(path: Path) -> str:
    """The SHA-256 of a file, as hex; read in chunks."""
    digest = hashlib.sha256()
    with open(path, "rb", opener=files.regular) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _checksum(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
