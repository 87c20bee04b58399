"""What a run is: the settings of model, data, adapter and training, their bounds, and their YAML form.

Every setting is declared once, here, as a dataclass field made by `setting(...)`. The command line's flags,
the form in the browser, `run.yaml`, `MoleConfig` and the documentation all follow from these fields.
No torch: the command line and the studio must start before it is loaded.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from mole.config.fields import build_settings, check_settings, setting, unknown_setting
from mole.config.router_params import DynMoLEParams, RouterParams, params_class, router_field_names
from mole.config.yaml_loader import read_yaml
from mole.core import limits
from mole.core.errors import ConfigError, InputError, brief


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
        "Number format of the base model; auto takes bfloat16 where the device is fast at it.",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    device: str = setting("auto", "auto, cpu, mps, cuda or cuda:N; auto takes the GPU when there is one.")
    quantization: str = setting(
        "none",
        "Keep the frozen base in 8 or 4 bits (bitsandbytes): less memory, slightly less exact; the experts stay exact.",
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
    """The examples to learn from, and those held out."""

    path: str = setting("", "JSON, JSONL, CSV or Parquet file, or a hub id.", label="Training data", flag="--data")
    eval_path: str | None = setting(None, "Held-out file; empty holds out a fraction of the training data.")
    eval_fraction: float = setting(0.02, "Share of the rows held out when there is no held-out file.", ge=0, le=0.5)
    max_length: int = setting(
        512, "Longest example in tokens; longer prompts lose their oldest part.", ge=8, le=limits.LENGTH
    )
    columns: dict[str, str] = setting(
        {}, "Your column names where they differ, e.g. {prompt: question, completion: reply}."
    )

    def __post_init__(self) -> None:
        check_settings(self, "data")


@dataclass
class AdapterConfig:
    """The mixture of LoRA experts: what is shared by all methods, and the chosen router's own parameters."""

    router: str = setting("dynmole", "Routing method.", flag="--router")
    num_experts: int | list[int] = setting(
        8, "LoRA experts per projection; a list spreads over equal groups of layers (MoLA: 2,4,6,8).", flag="--experts"
    )
    r: int = setting(8, "Rank of each expert.", ge=1, le=limits.RANK, label="Rank", flag="--rank")
    lora_alpha: float = setting(16, "LoRA scale: each update is multiplied by alpha / r.", gt=0, le=1e30)
    lora_dropout: float = setting(0.05, "Dropout on the experts' input while training.", ge=0, le=0.95)
    target_modules: str | list[str] = setting("all-linear", "Projections that get experts: all-linear, or names.")
    params: RouterParams = field(default_factory=DynMoLEParams)

    def __post_init__(self) -> None:
        expected = params_class(self.router)
        if type(self.params) is not expected:
            raise ConfigError("adapter.params", self.params, f"a {expected.__name__} for router {self.router!r}")
        check_settings(self, "adapter")
        counts = self.expert_counts
        if not counts or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in counts):
            raise ConfigError(
                "adapter.num_experts", self.num_experts, "a whole number of at least 1, or a list of such"
            )
        if self.router == "lora" and counts != [1]:
            self.num_experts = 1
        most = max(self.expert_counts)
        if most > limits.EXPERTS or len(self.expert_counts) > limits.EXPERTS:
            raise ConfigError("adapter.num_experts", self.num_experts, f"at most {limits.EXPERTS}")
        if most * self.r > limits.RANK_TIMES_EXPERTS:
            allowed = f"such that experts × rank ({most} × {self.r}) is at most {limits.RANK_TIMES_EXPERTS}"
            raise ConfigError("adapter.num_experts", self.num_experts, allowed)

    @property
    def expert_counts(self) -> list[int]:
        """Experts per group of layers, from the bottom up; one group when `num_experts` is a number."""
        return list(self.num_experts) if isinstance(self.num_experts, (list, tuple)) else [self.num_experts]

    def experts_at(self, layer: int, num_layers: int) -> int:
        """Experts of a layer (from 0) of `num_layers`: equal groups of layers, as MoLA allocates them."""
        counts = self.expert_counts
        return counts[min(layer * len(counts) // max(num_layers, 1), len(counts) - 1)]

    def experts_by_layer(self, num_layers: int) -> list[int]:
        """`experts_at` of every layer of a model of so many."""
        return [self.experts_at(layer, num_layers) for layer in range(num_layers)]

    @classmethod
    def from_flat(cls, values: Mapping[str, Any]) -> AdapterConfig:
        """Make one from the flat form of `run.yaml` and `MoleConfig`, router parameters beside the rest.

        A router parameter that is None keeps the router's default. Raises `ConfigError` when a parameter
        belongs to another router, naming those of this one.
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
                    f"adapter.{key} is not a setting of the router {router!r}; its settings are: "
                    f"{', '.join(sorted(own))}.",
                    field=f"adapter.{key}",
                )
            raise unknown_setting("adapter", key, shared | own)
        params = build_settings(params_type, given, "adapter")
        rest = {key: value for key, value in values.items() if key in shared}
        return build_settings(cls, {**rest, "params": params}, "adapter")

    def to_flat(self) -> dict[str, Any]:
        """The flat form, complete: every setting of the adapter and of its router."""
        values = {item.name: getattr(self, item.name) for item in fields(self) if item.name != "params"}
        return {**values, **dataclasses.asdict(self.params)}


@dataclass
class TrainingConfig:
    """How to train; the names are those of transformers' `TrainingArguments`."""

    max_steps: int = setting(
        32, "Optimizer steps; 0 trains num_train_epochs instead.", ge=0, label="Steps", flag="--steps"
    )
    num_train_epochs: float = setting(1.0, "Passes over the data when max_steps is 0.", gt=0, label="Epochs")
    per_device_train_batch_size: int = setting(
        16, "Examples per step and device.", ge=1, le=limits.BATCH, label="Batch size", flag="--batch-size"
    )
    gradient_accumulation_steps: int = setting(1, "Micro-batches per optimizer step.", ge=1, le=limits.BATCH)
    learning_rate: float = setting(2e-3, "Peak learning rate.", gt=0, le=1, flag="--lr")
    lr_scheduler_type: str = setting(
        "cosine",
        "Course of the learning rate after warm-up.",
        choices=("constant", "constant_with_warmup", "linear", "cosine"),
    )
    warmup_steps: int = setting(4, "Steps in which the learning rate rises from 0.", ge=0)
    weight_decay: float = setting(0.0, "AdamW's weight decay.", ge=0)
    max_grad_norm: float = setting(1.0, "Gradients are clipped to this norm; 0 switches clipping off.", ge=0)
    gradient_checkpointing: bool = setting(False, "Recompute activations in the backward pass: less memory, more time.")
    eval_steps: int = setting(0, "Evaluate the held-out loss every so many steps; 0 only at the end.", ge=0)
    save_steps: int = setting(20, "Write a checkpoint every so many steps: the most that a crash can lose.", ge=1)
    save_total_limit: int = setting(2, "Good checkpoints to keep.", ge=1)
    logging_steps: int = setting(1, "Write an event every so many steps.", ge=1)
    seed: int = setting(
        0, "Seed of everything random: weights, order of the data, dropout.", ge=0, le=2**32 - 1, flag="--seed"
    )

    def __post_init__(self) -> None:
        check_settings(self, "training")


@dataclass
class RunConfig:
    """A whole run, as `run.yaml` holds it."""

    name: str | None = None
    group: str | None = None
    """The runs it was queued with, to be compared: a name under the same rules."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RunConfig:
        """Make one from the nested form. Raises `ConfigError` that names the setting, never a traceback's worth."""
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
        """The complete nested form; `RunConfig.from_dict` gives an equal config back."""
        sections = {key: dataclasses.asdict(getattr(self, key)) for key in SECTIONS if key != "adapter"}
        return {"name": self.name, "group": self.group, "model": sections["model"], "data": sections["data"],
                "adapter": self.adapter.to_flat(), "training": sections["training"]}  # fmt: skip

    @classmethod
    def load(cls, path: Path) -> RunConfig:
        """Read a YAML file. Raises `InputError` when it is missing or not YAML, `ConfigError` for a bad setting."""
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
    """See that the nested form is one: settings by name, in sections. Raises `InputError`."""
    if not isinstance(values, Mapping):
        raise InputError(f"{brief(values)} is no config (expected sections model, data, adapter, training).")
    for section in SECTIONS:
        if not isinstance(value := values.get(section, {}), Mapping):
            raise ConfigError(section, value, "a section of settings (name: value lines)")


def apply_overrides(values: dict[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of the nested form with `{"section.field": value}` laid over it (`data.columns.prompt` reaches deeper).

    Changing `adapter.router` drops the former router's own parameters, which would not fit the new one.
    Raises `InputError` for a name without a section.
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
            target[parent] = target = dict(inner)  # of the caller's values nothing changes
        target[last] = value
    return result
