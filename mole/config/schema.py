"""The configuration of a run: the sections model, data, adapter and training of `run.yaml`, and `RunConfig`.

Every setting is declared once, as a dataclass field made by `setting(...)`. The command line's flags, the form in the
browser, `run.yaml`, `MoleConfig` and the documentation follow from these fields. No torch: the command line and the
studio start before it is loaded.

The nested form of a configuration is `{"model": {"name": …}, "adapter": {"router": …}, …}`, as in `run.yaml`; the
dotted form of a setting is `adapter.router`.
"""

from __future__ import annotations

import dataclasses
import math
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from mole.config.fields import build_settings, check_settings, setting, unknown_setting
from mole.config.router_params import DynMoLEParams, RouterParams, params_class, router_field_names
from mole.config.yaml_loader import read_yaml
from mole.core import limits, patterns
from mole.core.errors import ConfigError, InputError, brief

ALL_LINEAR = "all-linear"
"""The `target_modules` that stand for every linear layer except the output layer."""


@dataclass
class ModelConfig:
    """The frozen base model."""

    name: str = setting(
        "smollm2-135m",
        "Hub id, local folder, .gguf file, or smollm2-135m (the embedded default).",
        label="Base model",
        flag="--model",
    )
    dtype: str = setting(
        "auto",
        "Data type of the base model; auto selects bfloat16 where the device computes it fast.",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    device: str = setting("auto", "auto, cpu, mps, cuda or cuda:N; auto selects the GPU if there is one.")
    quantization: str = setting(
        "none",
        "Store the frozen base in 8 or 4 bits (bitsandbytes): less memory, slightly less exact; experts unaffected.",
        choices=("none", "8bit", "4bit"),
    )

    def __post_init__(self) -> None:
        check_settings(self, "model")
        if not self.name:
            raise ConfigError("model.name", self.name, "a hub id, a folder, a .gguf file or smollm2-135m")
        if not re.fullmatch(r"auto|cpu|mps|cuda(:[0-9]{1,2})?", self.device):
            raise ConfigError("model.device", self.device, "auto, cpu, mps, cuda or cuda:N")


@dataclass
class DataConfig:
    """The training examples and the held-out examples."""

    path: str = setting("", "JSON, JSONL, CSV or Parquet file, or a hub id.", label="Training data", flag="--data")
    eval_path: str | None = setting(None, "Held-out file; leave empty to hold out a fraction of the training data.")
    eval_fraction: float = setting(0.02, "Fraction of the rows held out if there is no held-out file.", ge=0, le=0.5)
    max_length: int = setting(
        512,
        "Maximum length of an example in tokens; of longer prompts the oldest content goes.",
        ge=8,
        le=limits.LENGTH,
    )
    enable_thinking: bool | None = setting(
        None,
        "Whether chat templates with this choice let the model think; automatic: where the answer has a thought.",
        label="Thinking",
    )
    columns: dict[str, str] = setting(
        {}, "Column names of the file where they differ, e.g. {prompt: question, completion: reply}."
    )

    def __post_init__(self) -> None:
        check_settings(self, "data")


@dataclass
class AdapterConfig:
    """The mixture of LoRA experts: settings shared by all routers, and the selected router's parameters in `params`."""

    router: str = setting("dynmole", "Routing method.", flag="--router")
    num_experts: int | list[int] = setting(
        8,
        "LoRA experts per projection; a list is spread over equal groups of layers (MoLA: 2,4,6,8).",
        flag="--experts",
    )
    r: int = setting(8, "Rank of each expert.", ge=1, le=limits.RANK, label="Rank", flag="--rank")
    lora_alpha: float = setting(16, "LoRA scaling: the update is multiplied by alpha / r.", gt=0, le=1e30)
    lora_dropout: float = setting(0.05, "Dropout probability of the experts' input during training.", ge=0, le=0.95)
    target_modules: str | list[str] = setting(
        ALL_LINEAR, "Linear layers that get experts: all-linear, a list of names, or a pattern of full names."
    )
    exclude_modules: str | list[str] | None = setting(
        None, "Linear layers that get no experts: a list of names, or a pattern of full names."
    )
    layers_to_transform: list[int] | None = setting(
        None, "Layers that get experts, by index from 0, e.g. 20,21,22; empty for all."
    )
    layers_pattern: str | list[str] | None = setting(
        None, "Which list of layers those indices are of, by name or pattern, where a model has several."
    )
    modules_to_save: list[str] | None = setting(
        None, "Modules trained and saved whole beside the experts, by the end of their names, e.g. lm_head."
    )
    bias: str = setting(
        "none",
        "Biases of the base model that are trained: none, those of layers with experts (lora_only), or all.",
        choices=("none", "lora_only", "all"),
        label="Biases",
    )
    trainable_token_indices: list[int] | dict[str, list[int]] | None = setting(
        None, "Tokens whose embeddings are trained, by id, e.g. 49152,49153.", label="Trainable tokens"
    )
    use_rslora: bool = setting(False, "Multiply the update by alpha / √r instead of alpha / r.", label="rsLoRA scaling")
    rank_pattern: dict[str, int] = setting(
        {}, "Ranks of some layers, by name or pattern, e.g. {down_proj: 16, v_proj: 4}."
    )
    alpha_pattern: dict[str, float] = setting({}, "LoRA alphas of some layers, by name or pattern.")
    params: RouterParams = field(default_factory=DynMoLEParams)

    def __post_init__(self) -> None:
        expected = params_class(self.router)
        if type(self.params) is not expected:
            raise ConfigError("adapter.params", self.params, f"a {expected.__name__} for router {self.router!r}")
        check_settings(self, "adapter")
        self._check_targets()
        counts = self.expert_counts
        if not counts or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in counts):
            raise ConfigError(
                "adapter.num_experts", self.num_experts, "a whole number of at least 1, or a list of them"
            )
        if self.router == "lora" and counts != [1]:
            self.num_experts = 1
        largest = max(self.expert_counts)
        if largest > limits.EXPERTS or len(self.expert_counts) > limits.EXPERTS:
            raise ConfigError("adapter.num_experts", self.num_experts, f"at most {limits.EXPERTS}")
        if largest * self.largest_rank > limits.RANK_TIMES_EXPERTS:
            allowed = (
                f"such that experts × rank ({largest} × {self.largest_rank}) is at most {limits.RANK_TIMES_EXPERTS}"
            )
            raise ConfigError("adapter.num_experts", self.num_experts, allowed)

    def _check_targets(self) -> None:
        for name in (
            "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save", "trainable_token_indices",
        ):  # fmt: skip
            setattr(self, name, getattr(self, name) or None)  # an empty box
        for name, targets in (("target_modules", self.target_modules), ("exclude_modules", self.exclude_modules or [])):
            if not isinstance(targets, str):
                patterns.check_names(targets, f"adapter.{name}")
            elif name == "exclude_modules" or targets.lower() != ALL_LINEAR:
                patterns.compile_pattern(targets, f"adapter.{name}")
        if any(layer < 0 for layer in self.layers_to_transform or []):
            raise ConfigError("adapter.layers_to_transform", self.layers_to_transform, "a list of numbers from 0")
        self._check_layers_pattern()
        self._check_tokens()
        if self.modules_to_save:
            patterns.check_plain(self.modules_to_save, "adapter.modules_to_save")
            self.modules_to_save = list(dict.fromkeys(self.modules_to_save))
        self._check_table("rank_pattern", self.rank_pattern, "a rank of 1", 1, limits.RANK)
        self._check_table("alpha_pattern", self.alpha_pattern, "an alpha above 0", sys.float_info.min, 1e30)

    def _check_layers_pattern(self) -> None:
        field, given = "adapter.layers_pattern", self.layers_pattern or []
        wanted = [given] if isinstance(given, str) else given
        patterns.check_names(wanted, field)
        for pattern in wanted:
            patterns.compile_pattern(pattern, field)
        if wanted and not self.layers_to_transform:
            raise ConfigError(field, given, "empty where layers_to_transform is")

    def _check_tokens(self) -> None:
        field, given = "adapter.trainable_token_indices", self.trainable_token_indices or {}
        by_module = given if isinstance(given, dict) else {"": given}
        patterns.check_plain([name for name in by_module if name], field)
        for tokens in by_module.values():
            if not tokens or min(tokens) < 0 or len(set(tokens)) < len(tokens) or len(tokens) > limits.TARGETS:
                raise ConfigError(field, tokens, f"a list of 1 to {limits.TARGETS:,} different ids from 0")

    def _check_table(self, name: str, table: Mapping[str, float], words: str, low: float, high: float) -> None:
        field = f"adapter.{name}"
        patterns.check_names(table, field)
        for key, value in table.items():
            patterns.compile_pattern(key, field)
            if not low <= value <= high:
                raise ConfigError(f"{field}.{key}", value, f"{words} to {high:g}")

    @property
    def largest_rank(self) -> int:
        """The largest rank that a projection has."""
        return max(self.r, *self.rank_pattern.values(), 1)

    def at(self, projection: str) -> AdapterConfig:
        """The settings of one projection, by its full name; the tables must be by full names too."""
        if not (self.rank_pattern or self.alpha_pattern):
            return self
        r, alpha = self.rank_pattern.get(projection, self.r), self.alpha_pattern.get(projection, self.lora_alpha)
        return dataclasses.replace(self, r=r, lora_alpha=alpha, rank_pattern={}, alpha_pattern={})

    @property
    def scaling(self) -> float:
        """What the update is multiplied by: alpha / r, with rsLoRA alpha / √r (arXiv 2312.03732)."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    @property
    def expert_counts(self) -> list[int]:
        """Experts of each group of layers, from the bottom up; one group when `num_experts` is a number."""
        return list(self.num_experts) if isinstance(self.num_experts, (list, tuple)) else [self.num_experts]

    def experts_at(self, layer: int, num_layers: int) -> int:
        """The number of experts of layer `layer` (from 0) out of `num_layers`, in equal groups as in MoLA."""
        counts = self.expert_counts
        return counts[min(layer * len(counts) // max(num_layers, 1), len(counts) - 1)]

    def experts_by_layer(self, num_layers: int) -> list[int]:
        """`experts_at` for each of `num_layers` layers."""
        return [self.experts_at(layer, num_layers) for layer in range(num_layers)]

    @classmethod
    def from_flat(cls, values: Mapping[str, Any]) -> AdapterConfig:
        """An `AdapterConfig` from the flat form of `run.yaml` and `MoleConfig`: router parameters beside the others.

        A router parameter that is None takes the router's default. Raises `InputError` for a parameter of another
        router, listing those of this one, and `ConfigError` for a value that is not allowed.
        """
        router = values.get("router", "dynmole")
        params_type = params_class(router)
        own = {item.name for item in fields(params_type)}
        shared = {item.name for item in fields(cls)} - {"params"}
        given = {key: value for key, value in values.items() if key not in shared and value is not None}
        for key in given:
            if key in own:
                continue
            if key in router_field_names():
                raise InputError(
                    f"adapter.{key} is not a setting of the router {router!r}; its settings: {', '.join(sorted(own))}.",
                    field=f"adapter.{key}",
                )
            raise unknown_setting("adapter", key, shared | own)
        params = build_settings(params_type, given, "adapter")
        rest = {key: value for key, value in values.items() if key in shared}
        return build_settings(cls, {**rest, "params": params}, "adapter")

    def to_flat(self) -> dict[str, Any]:
        """The complete flat form: every setting of the adapter and of its router."""
        values = {item.name: getattr(self, item.name) for item in fields(self) if item.name != "params"}
        return {**values, **dataclasses.asdict(self.params)}


@dataclass
class TrainingConfig:
    """The training loop's settings, named as in transformers' `TrainingArguments`."""

    max_steps: int = setting(
        32,
        "Optimizer steps; 0 trains for num_train_epochs instead.",
        ge=0,
        le=limits.STEPS,
        label="Steps",
        flag="--steps",
    )
    num_train_epochs: float = setting(
        1.0, "Passes over the training data if max_steps is 0.", gt=0, le=limits.STEPS, label="Epochs"
    )
    per_device_train_batch_size: int = setting(
        16, "Examples per device and micro-batch.", ge=1, le=limits.BATCH, label="Batch size", flag="--batch-size"
    )
    gradient_accumulation_steps: int = setting(
        1, "Micro-batches accumulated per optimizer step.", ge=1, le=limits.BATCH
    )
    learning_rate: float = setting(2e-3, "Peak learning rate.", gt=0, le=1, flag="--lr")
    lr_scheduler_type: str = setting(
        "cosine",
        "Learning rate schedule after the warm-up.",
        choices=("constant", "constant_with_warmup", "linear", "cosine"),
    )
    warmup_steps: int = setting(
        4,
        "Steps over which the learning rate rises from 0; fewer where the run itself is not longer.",
        ge=0,
        le=limits.STEPS,
    )
    weight_decay: float = setting(0.0, "Weight decay of AdamW.", ge=0, le=limits.FACTOR)
    max_grad_norm: float = setting(
        1.0, "Gradient norm above which gradients are clipped; 0 disables clipping.", ge=0, le=limits.FACTOR
    )
    gradient_checkpointing: bool = setting(False, "Recompute activations in the backward pass: less memory, slower.")
    eval_steps: int = setting(
        0, "Steps between evaluations of the held-out loss; 0 evaluates only at the end.", ge=0, le=limits.STEPS
    )
    save_steps: int = setting(
        20, "Steps between checkpoints: at most this much work is lost in a crash.", ge=1, le=limits.STEPS
    )
    save_total_limit: int = setting(2, "Number of valid checkpoints to keep.", ge=1, le=limits.STEPS)
    logging_steps: int = setting(
        1, "Steps between logged events (loss, learning rate, routing).", ge=1, le=limits.STEPS
    )
    seed: int = setting(0, "Seed of the expert weights, the data order and dropout.", ge=0, le=2**32 - 1, flag="--seed")

    def __post_init__(self) -> None:
        check_settings(self, "training")


@dataclass
class RunConfig:
    """The complete configuration of a run, as in `run.yaml`.

    Attributes:
        name: the run's name; None generates one.
        group: name of a group of runs to compare, e.g. of the grid it was queued with.
    """

    name: str | None = None
    group: str | None = None
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RunConfig:
        """A `RunConfig` from the nested form. Raises `InputError` or `ConfigError` naming the setting."""
        check_sections(values)
        for key in values:
            if key not in {item.name for item in fields(cls)}:
                raise unknown_setting("", key, {item.name for item in fields(cls)})
        sections: dict[str, Any] = {
            key: build_settings(section, values.get(key, {}), key)
            for key, section in SECTIONS.items()
            if key != "adapter"
        }
        names: dict[str, Any] = {key: values.get(key) for key in ("name", "group")}
        for key, name in names.items():
            if name is not None and not isinstance(name, str):
                raise ConfigError(key, name, "text")
        return cls(**names, adapter=AdapterConfig.from_flat(values.get("adapter", {})), **sections)

    def to_dict(self) -> dict[str, Any]:
        """The complete nested form; `RunConfig.from_dict` returns an equal config from it."""
        sections = {key: dataclasses.asdict(getattr(self, key)) for key in SECTIONS if key != "adapter"}
        return {"name": self.name, "group": self.group, "model": sections["model"], "data": sections["data"],
                "adapter": self.adapter.to_flat(), "training": sections["training"]}  # fmt: skip

    @classmethod
    def load(cls, path: Path) -> RunConfig:
        """Read a YAML file. Raises `InputError` when it is missing or malformed, `ConfigError` for an invalid value."""
        return cls.from_dict(read_yaml(path))

    def to_yaml(self) -> str:
        """The YAML text of the complete config."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)


SECTIONS: dict[str, Any] = {
    "model": ModelConfig,
    "data": DataConfig,
    "adapter": AdapterConfig,
    "training": TrainingConfig,
}


def check_sections(values: Mapping[str, Any]) -> None:
    """Raise `InputError` unless `values` is a mapping whose sections are mappings."""
    if not isinstance(values, Mapping):
        raise InputError(f"{brief(values)} is not a configuration (expected sections: model, data, adapter, training).")
    for section in SECTIONS:
        if not isinstance(value := values.get(section, {}), Mapping):
            raise ConfigError(section, value, "a section of settings (lines of name: value)")


def apply_overrides(values: dict[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of the nested form with the values of `{"section.field": value}` set (or deeper: `data.columns.prompt`).

    Changing `adapter.router` drops the previous router's parameters, which the new one does not have.
    Raises `InputError` for a name outside the sections.
    """
    check_sections(values)
    result: dict[str, Any] = {key: dict(v) if isinstance(v, Mapping) else v for key, v in values.items()}
    router = overrides.get("adapter.router")
    adapter = result.get("adapter", {})
    if router is not None and router != adapter.get("router"):
        result["adapter"] = {key: v for key, v in adapter.items() if key not in router_field_names()}
    for dotted, value in overrides.items():
        section, _, rest = dotted.partition(".")
        if section not in SECTIONS or not rest:
            raise unknown_setting("", dotted, {f"{name}.…" for name in SECTIONS})
        target = result.setdefault(section, {})
        *parents, last = rest.split(".")
        for parent in parents:
            inner = target.get(parent) or {}
            if not isinstance(inner, Mapping):
                raise InputError(f"{dotted} is not a setting: {parent} is {brief(inner)}.", field=dotted)
            target[parent] = target = dict(inner)  # a copy: the caller's values stay as they are
        target[last] = value
    return result
