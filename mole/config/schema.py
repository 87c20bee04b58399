"""The configuration of a run: the sections model, data, adapter and training of `run.yaml`, and `RunConfig`.

Every setting is declared once, as a dataclass field made by `setting(...)`. The command line's flags, the form in the
browser, `run.yaml`, `MoleConfig` and the documentation follow from these fields. No torch: the command line and the
studio start before it is loaded.

The nested form of a configuration is `{"model": {"name": …}, "adapter": {"router": …}, …}`, as in `run.yaml`; the
dotted form of a setting is `adapter.router`.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from mole.config.adapter_config import AdapterConfig
from mole.config.data_sources import SETTING, DataSource, parse_sources
from mole.config.fields import build_settings, check_settings, setting, unknown_setting
from mole.config.router_params import router_field_names
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

    path: str | list[Any] = setting(
        "",
        "JSON, JSONL, CSV, Parquet or text file, or a hub id; or a list of several, as paths or {path, weight, "
        "columns, name, split}. A weight of 2 shows each row of a file twice per epoch, 0.5 a random half of them.",
        label="Training data",
        flag="--data",
        parse=parse_sources,
    )
    name: str | None = setting(
        None, "Configuration of a hub data set; in a list, name it with each data set.", label="Hub configuration"
    )
    split: str | None = setting(
        None, "Split of a hub data set; train if empty. In a list, name it with each data set.", label="Hub split"
    )
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
        for name in ("name", "split"):
            if isinstance(self.path, list) and getattr(self, name):
                raise ConfigError(
                    f"data.{name}", getattr(self, name), f"empty where {SETTING} is a list", "Give it in the list."
                )

    @property
    def label(self) -> str:
        """The training data in words, e.g. `a.jsonl, b.csv`."""
        return ", ".join(source.label for source in self.sources)

    @property
    def sources(self) -> list[DataSource]:
        """The files and data sets of `path`, none if it is empty; an entry without columns of its own has `columns`."""
        if isinstance(self.path, str):
            return [DataSource(self.path, 1.0, self.columns, self.name, self.split)] if self.path else []
        given = [{"path": entry} if isinstance(entry, str) else entry for entry in self.path]
        return [
            DataSource(**{"columns": self.columns, **entry}, field=f"{SETTING}.{number}")
            for number, entry in enumerate(given, start=1)
        ]


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
    lr_restarts: list[int] | None = setting(
        None,
        "Steps after which warm-up and schedule begin again, e.g. 40, 60; mole runs continue adds one.",
        label="LR restarts",
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
        steps = [0, *(self.lr_restarts or []), self.max_steps or limits.STEPS]
        if any(later <= earlier for earlier, later in itertools.pairwise(steps)):
            allowed = "steps from 1 on, each larger than the one before and smaller than training.max_steps"
            raise ConfigError("training.lr_restarts", self.lr_restarts, allowed)


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
