"""What a command's TARGET names: a run, `RUN@STEP` for a checkpoint of it, an adapter folder, or `base:MODEL`."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from mole.config import ModelConfig, RunConfig
from mole.core import checkpoint, files
from mole.core.devices import found_device, has_device
from mole.core.errors import ModelError, RunError
from mole.core.paths import local_path
from mole.models.adapter_files import read_adapter_config
from mole.models.gguf import EMBEDDED
from mole.models.loading import Loaded, attach, load_base, why_not_quantised
from mole.models.moved import check_base, different_files, noted_base
from mole.runs import store
from mole.runs.run import Run

MOVED = "If the base model of {target} has moved, say where it is now with --base PATH."
"""What to do about a base model that is not found."""


def load_target(target: str, model: ModelConfig | None = None, base_name: str | None = None) -> Loaded:
    """Load what a command's TARGET names: a run, a run's checkpoint, an adapter folder, or `base:MODEL`.

    Args:
        target: the run's name, `RUN@STEP`, the adapter's folder, or `base:` and a base model.
        model: dtype and device to use; its name is not looked at.
        base_name: where the adapter's base model is now; None where it was. `Loaded.notice` tells if it is another one.

    Raises `RunError`, `ModelError`, `ConfigError`, or `CheckpointError` for an adapter whose files have changed.
    """
    noted_name, adapter_dir = locate(target)
    if adapter_dir is None:
        if base_name is not None:
            raise ModelError(f"{target} is a base model; --base is for adapters.", field="base")
        base = load_base(dataclasses.replace(model or ModelConfig(), name=noted_name))
        return Loaded(base.model, base.tokenizer, target, noted_name)
    if base_name is None:
        check_base(noted_name, MOVED.format(target=target))
    others = different_files(noted_base(adapter_dir), base_name) if base_name is not None else []
    config, notice = as_trained(model or ModelConfig(), adapter_dir)
    base = load_base(dataclasses.replace(config, name=base_name or noted_name))
    loaded = attach(base, adapter_dir, target)
    loaded.add_notice(notice)
    if others:
        loaded.add_notice(f"{base_name} is not the base model that {target} was trained on: other {', '.join(others)}.")
    return loaded


def as_trained(model: ModelConfig, adapter_dir: Path | None) -> tuple[ModelConfig, str | None]:
    """The settings with the 8 or 4 bits that the base model had when its adapter was trained.

    Experts trained beside quantised weights make up for their rounding; and in 16 bits the model may not fit.

    Args:
        model: the settings otherwise.
        adapter_dir: the adapter's folder; None for a base model alone.

    Returns:
        The settings, and a notice where this machine has no such weights; None otherwise.
    """
    config = None if adapter_dir is None else run_config_of(adapter_dir)
    if config is None or config.model.quantization in ("none", model.quantization):
        return model, None
    bits = config.model.quantization
    if problem := why_not_quantised(found_device(model.device).partition(":")[0]):
        return model, f"The adapter was trained on a {bits} base model; here its weights are whole ({problem[0]})."
    return dataclasses.replace(model, quantization=bits), None


def locate(target: str) -> tuple[str, Path | None]:
    """The base model's name and the adapter's folder (None for `base:MODEL`) of a target, without loading them.

    Raises `RunError` or `ModelError` when there is no such run, checkpoint, folder, or finished adapter.
    """
    if target.startswith("base:"):
        return target.removeprefix("base:") or EMBEDDED, None
    name, at, step = target.rpartition("@")
    try:
        run = store.get(name if at else target)
    except RunError as error:
        folder = local_path(target)
        if os.path.isfile(folder / "adapter_config.json"):
            return base_of(folder), folder
        if os.path.isfile(folder / "adapter" / "adapter_config.json"):
            return base_of(folder / "adapter"), folder / "adapter"
        if os.path.isdir(folder):
            raise ModelError(f"The folder {target} holds no adapter: it has no adapter_config.json.") from None
        known = ", ".join(run.name for run in store.list_runs()[-5:]) or "none yet"
        raise ModelError(
            f"There is no run and no adapter folder {target!r}; runs: {known}. For a base model: base:{target}."
            if "/" not in target and "\\" not in target
            else f"There is no adapter folder {target}."
        ) from error
    if at:
        return run.config.model.name, checkpoint_of(run, step)
    if not (files.is_folder(run.adapter_dir) and files.is_file(run.adapter_dir / "adapter_config.json")):
        advice = {
            "queued": "it waits for its device",
            "running": "wait until it has finished",
            "failed": f"see `mole runs show {run.name}`",
        }.get(run.state, f"go on with `mole runs resume {run.name}`")
        kept = checkpoint.steps(run.checkpoints_dir)
        instead = f", or take its newest checkpoint: {run.name}@{kept[-1][0]}" if kept else ""
        raise RunError(f"The run {run.name} is {run.state} and has no adapter yet: {advice}{instead}.")
    return run.config.model.name, run.adapter_dir


def checkpoint_of(run: Run, step: str) -> Path:
    """The folder of a run's checkpoint. Raises `RunError` that lists the steps there are."""
    kept = {str(number): folder for number, folder in checkpoint.steps(run.checkpoints_dir)}
    if step not in kept:
        there = f"checkpoints: {', '.join(f'{run.name}@{number}' for number in kept)}" if kept else "it has none"
        raise RunError(f"The run {run.name} has no checkpoint of step {step or '(empty)'}; {there}.", field="target")
    checkpoint.read_manifest(kept[step])
    return kept[step]


def device_of_target(target: str) -> str:
    """`model.device` of the run that a target is of, if this machine has that device; else `auto`.

    Raises `RunError` or `ModelError` as `locate` does.
    """
    folder = locate(target)[1]
    config = None if folder is None else run_config_of(folder)
    return config.model.device if config is not None and has_device(config.model.device) else "auto"


def run_config_of(folder: Path) -> RunConfig | None:
    """The settings of the run that an adapter's folder lies in; None for an adapter elsewhere. Raises `InputError`."""
    run = folder.parent.parent if folder.parent.name == "checkpoints" else folder.parent
    return RunConfig.load(run / "run.yaml") if (run / "run.yaml").is_file() else None


def base_of(folder: Path) -> str:
    """The base model of an adapter folder: its run's when it lies in one, else PEFT's note. Raises `ModelError`."""
    config = run_config_of(folder)
    if config is not None:
        return config.model.name
    name = read_adapter_config(folder).get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise ModelError(f"{folder}/adapter_config.json does not say its base model (base_model_name_or_path).")
    # The embedded model is noted by its folder, which is another one on another machine.
    return EMBEDDED if Path(name).name == EMBEDDED and not Path(name).is_dir() else str(name)
