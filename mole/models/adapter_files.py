"""Checks an adapter's folder before it is loaded, since it may come from anyone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mole.core import checkpoint, files, patterns
from mole.core.errors import ConfigError, ModelError, brief
from mole.core.text import one_line

WEIGHTS = "adapter_model.safetensors"


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """The contents of an adapter's `adapter_config.json`. Raises `ModelError` if it is not a JSON object."""
    try:
        values = files.read_json(folder / "adapter_config.json", files.regular)
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder}/adapter_config.json cannot be read: {one_line(error)}.") from None
    if not isinstance(values, dict):
        raise ModelError(f"{folder}/adapter_config.json is not a JSON object with an adapter's settings.")
    return values


def our_type() -> str:
    """The `peft_type` of MoLE adapters."""
    from mole.mixture.model import PEFT_TYPE

    return str(PEFT_TYPE.value)


@dataclass(frozen=True)
class AdapterFiles:
    """The contents of an adapter's folder: its settings, and the names of its weights."""

    folder: Path
    config: dict[str, Any]
    names: frozenset[str]

    @classmethod
    def read(cls, folder: Path) -> AdapterFiles:
        """Check a folder: safetensors only, no code, finite weights, sizes that match the settings.

        Raises:
            ModelError: something is missing or wrong.
            CheckpointError: a file has changed since it was written.
        """
        if not (folder / WEIGHTS).is_file():
            pickled = (folder / "adapter_model.bin").is_file()
            why = "only pickled weights, which can run code; save it again as safetensors" if pickled else "no weights"
            raise ModelError(f"The adapter in {folder} has {why} ({WEIGHTS}).")
        if (folder / checkpoint.MANIFEST).is_file():
            checkpoint.verify(folder)
        config = read_adapter_config(folder)
        if config.get("megatron_config"):  # PEFT would import the module it names
            raise ModelError(f"The adapter in {folder} needs code of its own (megatron_core), which is never run.")
        widths = check_weights(folder, ours=config.get("peft_type") == our_type())
        check_size(folder, config, max(widths.values(), default=0))
        return cls(folder, config, frozenset(widths))

    def peft_config(self) -> Any:
        """The settings as a `PeftConfig`; a pattern that is not RE2's becomes the names of the modules with weights.

        Raises the errors of the config for its other values.
        """
        from peft import PeftConfig

        values = dict(self.config)
        try:
            if isinstance(targets := values.get("target_modules"), str):
                patterns.compile_pattern(targets, "target_modules")
            if isinstance(excluded := values.get("exclude_modules"), str):
                patterns.compile_pattern(excluded, "exclude_modules")
        except ConfigError:
            values["target_modules"] = self.adapted_modules()
            values.pop("exclude_modules", None)
        return PeftConfig.from_peft_type(**PeftConfig.check_kwargs(**values))

    def adapted_modules(self) -> list[str]:
        """The full names of the modules of the base model that have weights here."""
        from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING

        prefixes: dict[Any, str] = PEFT_TYPE_TO_PREFIX_MAPPING
        prefix = prefixes.get(self.config.get("peft_type"), "")
        found = {name.partition(f".{prefix}")[0] for name in self.names if prefix and f".{prefix}" in name}
        return sorted(name.removeprefix("base_model.model.") for name in found)

    def check_complete(self, model: Any, adapter: str, base: str) -> None:
        """Check that a MoLE adapter had all of its weights and no others; of other PEFT methods, at least some.

        Raises `ModelError`, because PEFT would initialise missing weights at random.
        """
        from peft import get_peft_model_state_dict

        from mole.mixture.model import copy_names

        wanted = set(get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False))
        shared = copy_names(model, adapter)  # a file may have them or not
        wanted -= shared
        ours = model.peft_config[adapter].peft_type == our_type()
        if (missing := wanted - self.names) and (ours or missing == wanted):
            raise ModelError(
                f"The adapter in {self.folder} does not load on {base}: {len(missing)} of its {len(wanted)} weights "
                f"are missing, {min(missing)} among them."
            )
        if ours and (extra := self.names - wanted - shared):
            raise ModelError(
                f"The adapter in {self.folder} does not load on {base}: {len(extra)} of its weights do not exist "
                f"there, {min(extra)} among them."
            )


def check_weights(folder: Path, ours: bool) -> dict[str, int]:
    """Check that every weight is finite and, in MoLE adapters (`ours`), floating point.

    Returns:
        The longest dimension of each weight.

    Raises:
        ModelError: a weight is not finite or has the wrong dtype.
    """
    from safetensors import SafetensorError, safe_open

    widths = {}
    try:
        with safe_open(folder / WEIGHTS, framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118
                tensor = weights.get_tensor(name)
                widths[name] = max(*tensor.shape, 1, 1)
                if ours and not tensor.is_floating_point():
                    raise ModelError(
                        f"The adapter in {folder} is broken: {name} is {tensor.dtype}, not floating point."
                    )
                if tensor.is_floating_point() and not tensor.float().isfinite().all():
                    raise ModelError(f"The adapter in {folder} is broken: {name} holds numbers that are not finite.")
    except (OSError, SafetensorError) as error:
        raise ModelError(f"The weights of the adapter in {folder} cannot be read: {one_line(error)}.") from None
    return widths


def check_size(folder: Path, config: dict[str, Any], widest: int) -> None:
    """Check that the settings ask for no larger adapter than the weights, since loading allocates what they ask for.

    Raises `ModelError`.
    """
    experts = config.get("num_experts")
    counts = [count for count in (experts if isinstance(experts, list) else [experts]) if isinstance(count, int)]
    for setting, many in (("r", max(counts, default=1)), ("lambda_hidden", 1)):
        value = config.get(setting)
        if isinstance(value, int) and value * many > widest:
            raise ModelError(
                f"The adapter in {folder} does not fit its own weights: {setting} is {brief(value)}"
                f"{f' for {brief(many)} experts' if many > 1 else ''}, and no weight is wider than {widest}."
            )
    ranks, many = config.get("rank_pattern"), max(counts, default=1)
    for value in ranks.values() if isinstance(ranks, dict) else ():
        if isinstance(value, int) and value * many > widest:
            raise ModelError(
                f"The adapter in {folder} does not fit its own weights: rank_pattern has {brief(value)}, and no weight "
                f"is wider than {widest}."
            )
