"""Creating, finding and deleting runs. There is no database: a run is a folder of `runs_dir()`. No torch."""

from __future__ import annotations

import dataclasses
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from mole.config import ModelConfig, RunConfig
from mole.core import checkpoint, files
from mole.core.errors import BusyError, RunError, writing
from mole.core.names import MAX_BYTES, check_name
from mole.core.paths import home, make_folder, restrict, runs_dir
from mole.runs.run import Run, creation_facts

UNLISTED = re.compile(r"visitor-[0-9a-f]{32}")
"""Names of runs that no list shows. They cannot be guessed: whoever knows one was told it."""


def unlisted_name() -> str:
    """A new name for a run that no list shows."""
    return f"visitor-{secrets.token_hex(16)}"


def is_unlisted(name: str) -> bool:
    """Whether no list shows the run of this name; `get` finds it."""
    return UNLISTED.fullmatch(name) is not None


@writing()
def create(config: RunConfig, *, number: bool = False, fill: Callable[[Run], None] | None = None, **facts: Any) -> Run:
    """Create a run's folder, whole or not at all, with `run.yaml` and the event `created`.

    Without a name it is called `<router>-<model>-<n>`; with `number`, a number is added to a name that is taken. Paths
    in the config become absolute, as the run is trained from another folder. Raises `RunError` for a taken name.

    Args:
        config: the settings.
        number: whether a taken name gets a number.
        fill: adds what else the folder begins with.
        facts: what else the event `created` says.
    """
    config = absolute(config)
    make_folder(runs_dir())
    if config.name is not None:
        config = dataclasses.replace(config, name=check_name(config.name))
    if config.group is not None:
        config = dataclasses.replace(config, group=check_name(config.group, "group", "group"))
    for name in names_to_try(config, number):
        if not (runs_dir() / name).exists() and (run := _claim(name, config, fill, facts)):
            return run
    raise RunError(f"There is a run called {config.name!r} already; choose another name or delete it.", field="name")


def names_to_try(config: RunConfig, number: bool) -> Iterator[str]:
    """The names that a new run may get, in order; with `number`, a number is added to one that is taken."""
    if config.name is not None:
        yield config.name
        if not number:
            return
        stem, first = config.name[:58].encode()[: MAX_BYTES - 6].decode(errors="ignore"), 2
    else:
        model = Path(config.model.name.rstrip("/")).name.removesuffix(".gguf").lower()
        stem, first = f"{config.adapter.router}-{re.sub(r'[^a-z0-9._-]+', '-', model)[:40] or 'model'}", 1
    yield from (f"{stem}-{n}" for n in range(first, 100_000))


def _claim(name: str, config: RunConfig, fill: Callable[[Run], None] | None, facts: dict[str, Any]) -> Run | None:
    """The run, written under a temporary name and renamed; None when the name was taken in the meantime."""
    aside = runs_dir() / f".new-{name}-{secrets.token_hex(4)}"
    make_folder(aside)
    try:
        made = Run(name, aside)
        made.config_path.write_text(dataclasses.replace(config, name=name).to_yaml(), encoding="utf-8")
        restrict(made.config_path)
        made.append_event("created", 0, **creation_facts(config), **facts)
        if fill is not None:
            fill(made)
        checkpoint.sync(made.config_path, made.events_path, aside)
        aside.rename(runs_dir() / name)
        checkpoint.sync(runs_dir(), home())
    except BaseException as error:
        shutil.rmtree(aside, ignore_errors=True)
        if isinstance(error, OSError) and (runs_dir() / name).exists():
            return None
        raise
    return Run(name, runs_dir() / name)


def absolute(config: RunConfig) -> RunConfig:
    """The config with local paths made absolute; hub ids and the embedded model's name stay."""

    def found(name: str) -> str:
        try:
            path = Path(name).expanduser()
            return str(path.absolute()) if name and path.exists() else name
        except (RuntimeError, OSError, ValueError):
            return name

    def entry(source: Any) -> Any:
        return {**source, "path": found(source["path"])} if isinstance(source, dict) else found(source)

    data, model = config.data, config.model
    path = [entry(source) for source in data.path] if isinstance(data.path, list) else found(data.path)
    data = dataclasses.replace(data, path=path, eval_path=data.eval_path and found(data.eval_path))
    if model.name != ModelConfig().name:
        model = dataclasses.replace(model, name=found(model.name))
    begin = config.adapter.init_from or ""
    adapter = dataclasses.replace(config.adapter, init_from=begin if is_run(runs_dir() / begin) else found(begin))
    return dataclasses.replace(config, data=data, model=model, adapter=adapter)


def get(name: str) -> Run:
    """The run of that name. Raises `RunError` when there is none, or the name is not allowed."""
    path = runs_dir() / (name := check_name(name))
    found = is_run(path)
    if not found and not name.isascii():  # a folder from a system that decomposes letters (macOS)
        path = next((run.path for run in list_runs() if run.name == name), path)
        found = is_run(path)
    if found and name != name.swapcase() and os.path.lexists(runs_dir() / name.swapcase()):
        # A file system that ignores case also finds it by names it does not have, or there are two such runs.
        found = name in os.listdir(runs_dir())
    if not found:
        raise RunError(f"There is no run called {name!r}; `mole runs list` shows those there are.", field="name")
    return Run(name, path)


def is_run(path: Path) -> bool:
    """Whether a run's folder is at `path`; one that may not be entered is a run that is unreadable."""
    return files.is_folder(path) and (files.is_file(path / "run.yaml") or not os.access(path, os.X_OK))


def folder_names(unlisted: bool = False) -> list[str]:
    """The names in the folder of runs: those that lists may show, or only the unlisted ones."""
    try:
        return [name for name in os.listdir(runs_dir()) if is_unlisted(name) == unlisted]
    except (FileNotFoundError, NotADirectoryError):
        return []


def list_runs(unlisted: bool = False) -> list[Run]:
    """All runs that lists show, the oldest first; or only the unlisted ones."""
    folder, found = runs_dir(), []
    for name in folder_names(unlisted):
        try:
            run = Run(check_name(name), folder / name)
            if is_run(run.path):
                found.append((run.created, name, run))
        except (RunError, OSError):
            continue
    return [run for *_, run in sorted(found, key=lambda item: item[:2])]


@writing()
def delete(run: Run) -> None:
    """Remove a run's folder. Raises `RunError` while a process holds it."""
    try:
        # No process can hold a lock that is a link or a pipe, and such a folder must be easy to get rid of.
        odd = os.path.lexists(run.lock_path) and not files.is_file(run.lock_path)
        lock = nullcontext() if odd else run.lock()
    except BusyError:
        raise RunError(f"The run {run.name} is {run.state}; stop it first: mole runs stop {run.name}.") from None
    with lock:
        run.path.rename(runs_dir() / f".deleted-{run.name}-{secrets.token_hex(4)}")
    for leftover in runs_dir().glob(".deleted-*"):
        shutil.rmtree(leftover, ignore_errors=True)
