"""A grid of runs: every combination of some settings' values, as one named group. No torch."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from mole.config import DataConfig, RunConfig, TextLoader, apply_overrides, check_sections, parse_yaml
from mole.core.errors import InputError, RunError
from mole.core.names import check_name
from mole.core.paths import runs_dir
from mole.runs import queue, store
from mole.runs.inputs import check_inputs
from mole.runs.run import Run

SHORT = {
    "router": "", "seed": "s", "num_experts": "e", "learning_rate": "lr", "lora_alpha": "alpha", "max_steps": "steps",
    "per_device_train_batch_size": "batch", "path": "", "name": "", "target_modules": "on",
}  # fmt: skip
"""How a setting is said in a run's name, where that is not its own name."""

Axes = Mapping[str, Sequence[Any]]


def expand(values: Mapping[str, Any] | RunConfig, axes: Axes, group: str) -> list[RunConfig]:
    """Every combination of the axes' values over a config, named after them: `sweep-topk-s0`, `sweep-topk-s1`, ….

    Settings of the config's own router that another one lacks are left out for that other. Combinations that come
    down to the same run are made once.

    Args:
        values: the config, or its nested form.
        axes: the values of each setting by its dotted name, e.g. `{"training.seed": [0, 1]}`; text is read as on a
            command line.
        group: the name all of them get as `group`, and begin with.

    Raises:
        InputError: a combination is no possible run (the message names it), an axis is empty, or they are too many.
    """
    group = check_name(group, "group", "group")
    nested = values.to_dict() if isinstance(values, RunConfig) else values
    check_sections(nested)
    nested = {**nested, "adapter": {"router": "dynmole", **nested.get("adapter", {})}, "group": group}
    check_axes(axes)
    made: list[RunConfig] = []
    names: list[str] = []
    for combination in itertools.product(*axes.values()):
        chosen = dict(zip(axes, combination, strict=True))
        config = combine(nested, chosen)
        if config not in made:
            made.append(config)
            names.append("-".join([group, *filter(None, itertools.starmap(word, chosen.items()))]))
    for config, name in zip(made, unique(names, group), strict=True):
        config.name = name
    return made


def check_axes(axes: Axes) -> None:
    """See that there is something to combine, and not too much. Raises `InputError`."""
    empty = [dotted for dotted, given in axes.items() if not given]
    if empty or not axes:
        raise InputError(
            f"The grid has no values for {empty[0]}; give some, e.g. 0,1,2."
            if empty
            else "The grid is empty; give a setting with its values, e.g. training.seed=0,1,2.",
            field=empty[0] if empty else None,
        )
    count = math.prod(len(given) for given in axes.values())
    if count > queue.QUEUE_LIMIT:
        raise InputError(f"The grid has {count} combinations; {queue.QUEUE_LIMIT} runs can be queued at a time.")


def combine(nested: Mapping[str, Any], chosen: Mapping[str, Any]) -> RunConfig:
    """One combination as a config without a name. Raises `InputError` naming the combination and what is wrong."""
    try:
        return RunConfig.from_dict({**apply_overrides(dict(nested), chosen), "name": None})
    except InputError as error:
        told = ", ".join(f"{dotted}={value}" for dotted, value in chosen.items())
        raise InputError(f"The combination {told} is not possible: {error}", field=error.field) from None


def word(dotted: str, value: Any) -> str:
    """A setting's value in a run's name, e.g. `s0` or `top_k3`."""
    name = dotted.rpartition(".")[2]
    if dotted == "data.path":
        text = "-".join(Path(source.path.rstrip("/")).stem for source in DataConfig(path=value).sources)
    elif dotted == "model.name":
        text = Path(str(value).rstrip("/")).stem
    else:
        text = "-".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
    text = re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-.")
    return f"{SHORT.get(name, name)}{text}"


def unique(names: Sequence[str], group: str) -> list[str]:
    """The names, or numbered ones when they would be too long or alike."""
    if len(set(names)) == len(names) and all(len(name) <= 64 for name in names):
        return list(names)
    return [f"{group[:60]}-{number}" for number in range(1, len(names) + 1)]


def parse_axis(text: str) -> tuple[str, list[Any]]:
    """`section.field=value,value` as on a command line; a value in brackets keeps its commas. Raises `InputError`."""
    dotted, separator, given = text.partition("=")
    if not separator or not given.strip():
        raise InputError(f"--grid {text!r} must be SECTION.FIELD=VALUE,VALUE…, e.g. training.seed=0,1,2.")
    return dotted.strip(), parse_values(given)


def parse_values(text: str) -> list[Any]:
    """Values with commas between them, e.g. `0, 1, 2` or `8, [2,4,6,8]`; `null` is no value."""
    try:
        found = parse_yaml(f"[{text}]", TextLoader)  # plain text everywhere: the settings know their types
    except yaml.YAMLError:
        found = [part.strip() for part in text.split(",")]
    return [None if value in ("null", "~") else value for value in found if value != ""]


def check_free(configs: Iterable[RunConfig]) -> None:
    """See that no run has one of the names. Raises `RunError`."""
    for config in configs:
        if (runs_dir() / str(config.name)).exists():
            raise RunError(
                f"There is a run called {config.name!r} already; choose another group name or delete it.", field="group"
            )


def queue_all(configs: Sequence[RunConfig], check: Callable[[RunConfig], None] = check_inputs) -> list[Run]:
    """Make and queue the runs of a grid: all of them, or none when something is wrong with one.

    `check` is called with one config for each model and data set, before a run is made.

    Raises `InputError` when data, model or a name cannot be used, `BusyError` when the queue has no room for all.
    """
    check_free(configs)
    queue.check_room(len(configs))
    sources: list[tuple[Any, Any]] = []
    for config in configs:
        if (config.model, config.data) not in sources:
            check(config)
            sources.append((config.model, config.data))
    made: list[Run] = []
    try:
        for config in configs:
            made.append(store.create(config))
    except BaseException:
        for run in made:
            store.delete(run)
        raise
    for run in made:
        queue.start(run)
    return made


def free_group(stem: str = "grid") -> str:
    """`grid-1`, or the first such name that no run begins with."""
    taken = {run.group for run in store.list_runs()}
    return next(name for name in (f"{stem}-{n}" for n in itertools.count(1)) if name not in taken)
