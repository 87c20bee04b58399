"""The adapter that a run begins with (`adapter.init_from`), instead of experts that add nothing yet.

Importing this module does not import torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mole.config import RunConfig
from mole.core.errors import ConfigError, MoleError
from mole.models.adapter_files import WEIGHTS, AdapterFiles, our_type, read_adapter_config
from mole.models.moved import noted_base
from mole.runs.targets import locate

FIELD = "adapter.init_from"
SHAPES = ("router", "num_experts", "r")
"""Settings that must be those of the adapter; whether all weights fit is seen when they are loaded."""
EFFECTS = ("lora_alpha", "use_rslora", "alpha_pattern")
"""Settings that change what the same weights add."""


def check_initial(config: RunConfig) -> Path | None:
    """The folder of the adapter that a run begins with; None for a run that begins anew.

    Raises `ConfigError` if there is no such adapter, if it is of another method, or if the experts of the run are not
    as many and as large.
    """
    given = config.adapter.init_from
    if not given:
        return None
    try:
        folder = locate(given)[1]
        found = read_adapter_config(folder) if folder else {}
    except MoleError as error:
        raise ConfigError(FIELD, given, "a run, RUN@STEP or an adapter's folder", str(error)) from error
    if found.get("peft_type") != our_type():
        kind = found.get("peft_type") or "a base model"
        raise ConfigError(FIELD, given, f"an adapter with a mixture of experts, not {kind}")
    values = config.adapter.to_flat()
    for name in SHAPES:
        if found.get(name) != values[name]:
            raise ConfigError(f"adapter.{name}", values[name], f"{found.get(name)!r}, as in {given} ({FIELD})")
    return folder


def begin_with(model: Any, config: RunConfig, base: Mapping[str, str]) -> list[str]:
    """Load the weights of `adapter.init_from` into a new adapter → what to tell of it, in sentences.

    Args:
        model: the `PeftModel` with the new adapter.
        config: the run's settings.
        base: the fingerprint of the base model's files.

    Raises `ConfigError` if the adapter was trained on another base model or its weights do not fit, `ModelError` or
    `CheckpointError` if its files cannot be read.
    """
    folder = check_initial(config)
    if folder is None:
        return []
    from peft import get_peft_model_state_dict, set_peft_model_state_dict
    from safetensors.torch import load_file

    given = config.adapter.init_from
    noted = noted_base(folder)
    others = sorted(file for file in {*noted, *base} if noted and noted.get(file) != base.get(file))
    if others:
        allowed = f"an adapter of the run's base model (other: {', '.join(others)})"
        raise ConfigError(FIELD, given, allowed)
    files, weights = AdapterFiles.read(folder), load_file(folder / WEIGHTS)
    wanted = get_peft_model_state_dict(model, save_embedding_layers=False)
    differ = {name for name in wanted.keys() & weights.keys() if wanted[name].shape != weights[name].shape}
    if unfit := sorted((wanted.keys() ^ weights.keys()) | differ):
        advice = f"{len(unfit)} weights are not in both, or not of one shape, {unfit[0]} among them."
        raise ConfigError(FIELD, given, "an adapter with the same projections, experts and ranks", advice)
    set_peft_model_state_dict(model, weights)
    values = config.adapter.to_flat()
    changed = [name for name in EFFECTS if name in files.config and files.config[name] != values[name]]
    told = [f"adapter.{name} is {plain(values[name])} and was {plain(files.config[name])}" for name in changed]
    notice = f"The run begins with the weights of {given}"
    return [f"{notice}; {'; '.join(told)}." if told else f"{notice}."]


def plain(value: Any) -> str:
    """A setting's value as people write it."""
    return f"{value:g}" if isinstance(value, float) else str(value)
