"""Finished runs as a folder or a .zip file: written by `mole runs export`, taken back by `mole runs import`. No torch.

An archive holds `run.yaml`, `events.jsonl`, the adapter, and the records of evaluations and atlases. Checkpoints stay
behind: the state of their optimizer is a pickle, which nobody should load from elsewhere.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import IO

from mole.config import RunConfig
from mole.core import checkpoint, files, limits, zips
from mole.core.errors import RunError, brief, writing
from mole.core.names import check_name
from mole.core.paths import home, local_path, make_folder, runs_dir
from mole.core.text import bytes_text, one_line
from mole.runs.run import Run
from mole.runs.store import is_unlisted, names_to_try

NEEDED = ("run.yaml", "events.jsonl", f"adapter/{checkpoint.MANIFEST}")
RECORDS = re.compile(r"(evaluations|atlas)/[1-9][0-9]{0,8}(\.atlas)?\.json")
"""Files of finished evaluations and atlases; their locks and logs stay behind."""


@dataclass(frozen=True)
class Member:
    """A file of an archive.

    Attributes:
        name: its path in the archive, with slashes.
        size: its bytes, as the archive says.
        open: opens it for reading.
    """

    name: str
    size: int
    open: Callable[[], IO[bytes]]


# ---------------------------------------------------------------------------------------------------------
# Export


def export(run: Run, dest: str | os.PathLike[str]) -> Path:
    """Copy a finished run to a new folder `dest`, or to a new file if it ends in .zip; returns the path written.

    Raises `RunError` when there is no adapter yet or `dest` exists, `CheckpointError` when the adapter does not verify.
    """
    target = local_path(os.fspath(dest)).absolute()
    if not files.is_file(run.adapter_dir / checkpoint.MANIFEST):
        raise RunError(f"The run {run.name} is {run.state} and has no adapter yet; export it when it has finished.")
    check_destination(target)
    checkpoint.verify(run.adapter_dir)
    files.check_tree(run.path)
    exported = [
        path for path in run.path.rglob("*") if path.is_file() and is_kept(path.relative_to(run.path).as_posix())
    ]
    aside = target.with_name(f".{target.name}-{secrets.token_hex(4)}")
    try:
        if target.suffix == ".zip":
            with zipfile.ZipFile(aside, "x", zipfile.ZIP_DEFLATED) as archive:
                for path in exported:
                    archive.write(path, path.relative_to(run.path))
        else:
            for path in exported:
                copy = aside / path.relative_to(run.path)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, copy)
        aside.rename(target)
    except BaseException:
        shutil.rmtree(aside) if aside.is_dir() else aside.unlink(missing_ok=True)
        raise
    return target


def check_destination(target: Path) -> None:
    """Raise `RunError` if an export cannot be written to `target`."""
    try:
        if target.exists() or target.is_symlink():
            raise RunError(f"{target} exists already; choose a new path.", field="dest")
        if not target.parent.is_dir():
            raise RunError(f"{target.parent} is not a folder; make it first.", field="dest")
        target.with_name(f".{target.name}-12345678").exists()
    except (OSError, ValueError) as error:
        raise RunError(f"{target} cannot be written: {one_line(error)}.", field="dest") from None


def is_kept(name: str) -> bool:
    """Whether a file of a run's folder is part of its archive."""
    return name in NEEDED or name.startswith("adapter/") or RECORDS.fullmatch(name) is not None


# ---------------------------------------------------------------------------------------------------------
# Import


@writing()
def import_run(
    source: str | os.PathLike[str], name: str | None = None, *, number: bool = False
) -> tuple[Run, list[str]]:
    """Take an exported run into `$MOLE_HOME/runs`, whole or not at all.

    Args:
        source: the folder or the .zip file that `export` wrote.
        name: the run's name here; its own if None.
        number: whether a taken name gets a number.

    Returns:
        The run, and the names of files in `source` that are no part of an export and were left out.

    Raises:
        RunError: `source` is no exported run, or is too large, or the name is taken (field `name`).
        CheckpointError: the adapter is not as it was written.
        InputError: `run.yaml` cannot be read.
    """
    path = local_path(os.fspath(source))
    make_folder(runs_dir())
    aside = runs_dir() / f".new-import-{secrets.token_hex(4)}"
    with opened_archive(path) as members:
        kept = [member for member in members if is_kept(member.name)]
        check_members(path, kept)
        make_folder(aside)
        try:
            for member in kept:
                extract(member, aside)
            return settle(aside, name, number), sorted(member.name for member in members if member not in kept)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise


@contextmanager
def opened_archive(path: Path) -> Iterator[list[Member]]:
    """The files of an archive, named from the folder in it that holds `run.yaml`. Raises `RunError`."""
    try:
        if path.is_dir():
            yield from_root(folder_members(path))
            return
        with open(path, "rb", opener=files.regular) as opened:
            check_count(path, zips.count_files(opened, limits.ARCHIVE_FILES))
            with zipfile.ZipFile(opened) as archive:
                yield from_root(zip_members(archive))
    except FileNotFoundError:
        raise RunError(f"There is no file or folder {path}.", field="source") from None
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise RunError(f"{path} cannot be unpacked: {one_line(error)}.", field="source") from None


def check_count(path: Path, count: int) -> None:
    """Raise `RunError` for more files than an export can have."""
    if count > limits.ARCHIVE_FILES:
        raise RunError(
            f"{path} has more than {limits.ARCHIVE_FILES:,} files in it; it is no exported run.", field="source"
        )


def folder_members(folder: Path) -> list[Member]:
    """The files of a folder; links and devices are refused by their opener."""
    # more than an export can have is no export: a person's home has millions
    found = list(islice((path for path in folder.rglob("*") if not files.is_folder(path)), limits.ARCHIVE_FILES + 1))
    check_count(folder, len(found))
    return [Member(path.relative_to(folder).as_posix(), path.lstat().st_size, opener_of(path)) for path in found]


def opener_of(path: Path) -> Callable[[], IO[bytes]]:
    """A function that opens a file for reading, if it is a regular one."""
    return lambda: open(path, "rb", opener=files.unlinked)


def zip_members(archive: zipfile.ZipFile) -> list[Member]:
    """The files of a zip, without what a Mac adds."""
    infos = [info for info in archive.infolist() if not info.is_dir() and not info.filename.startswith("__MACOSX/")]
    return [Member(info.filename, info.file_size, partial(archive.open, info)) for info in infos]


def from_root(members: list[Member]) -> list[Member]:
    """The files under the folder nearest to the top that holds a `run.yaml`, named from there."""
    roots = [PurePosixPath(member.name).parent for member in members if PurePosixPath(member.name).name == "run.yaml"]
    root = min(roots, key=lambda folder: (len(folder.parts), str(folder)), default=PurePosixPath("."))
    if root == PurePosixPath("."):
        return members
    return [replace(one, name=one.name.removeprefix(f"{root}/")) for one in members if one.name.startswith(f"{root}/")]


def check_members(path: Path, members: list[Member]) -> None:
    """Raise `RunError` for files that are missing, leave the folder, stand there twice, or are too large in all."""
    names = [member.name for member in members]
    if missing := [needed for needed in NEEDED if needed not in names]:
        raise RunError(f"{path} is no exported run: it has no {missing[0]}.", field="source")
    for name in names:
        parts = name.split("/")
        if "\\" in name or "\0" in name or len(name) > limits.NAME or not {"", ".", ".."}.isdisjoint(parts):
            raise RunError(f"{path} has a file called {brief(name)}, which is no name within a run.", field="source")
    if len(set(names)) < len(names):
        raise RunError(f"{path} has two files of one name.", field="source")
    size, free = sum(member.size for member in members), shutil.disk_usage(runs_dir()).free
    if size > min(limits.ARCHIVE_BYTES, free):
        most = "the most is" if free > limits.ARCHIVE_BYTES else "the disk has room for"
        room = bytes_text(min(limits.ARCHIVE_BYTES, free))
        raise RunError(f"{path} has {bytes_text(size)} in it; {most} {room}.", field="source")


def extract(member: Member, folder: Path) -> None:
    """Write a file of an archive to a folder that was just made. Raises `RunError` if it cannot be read whole."""
    target = folder / member.name
    make_folder(target.parent)
    try:
        opened = member.open()
    except OSError as error:
        raise RunError(f"{member.name} cannot be read: {one_line(error)}.", field="source") from None
    with opened as source, open(target, "xb", opener=files.unlinked) as copy:
        shutil.copyfileobj(source, copy, 1 << 20)
        if copy.tell() != member.size:
            raise RunError(f"{member.name} has {copy.tell()} bytes instead of {member.size}.", field="source")
    checkpoint.sync(target)


def settle(aside: Path, name: str | None, number: bool) -> Run:
    """Check an unpacked run and give it its name. Raises `RunError`, `CheckpointError` and `InputError`."""
    made = Run(name or "imported", aside)
    checkpoint.verify(made.adapter_dir)
    config = RunConfig.load(made.config_path)
    given = name or (None if is_unlisted(config.name or "") else config.name)  # here a visitor's run is to be listed
    wanted = replace(config, name=check_name(given) if given else None)
    for free in names_to_try(wanted, number):
        if os.path.lexists(target := runs_dir() / free):  # renaming would replace an empty folder
            continue
        if free != config.name:
            made.config_path.write_text(replace(config, name=free).to_yaml(), encoding="utf-8")
        aside.rename(target)
        checkpoint.sync(runs_dir(), home())
        return Run(free, target)
    raise RunError(f"There is a run called {wanted.name!r} already; choose another name.", field="name")


def left_out_note(names: list[str]) -> str:
    """What to say of files that `import_run` left out."""
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"{brief(names[0])}{more} is no part of an export and was left out."
