"""Presets: named configurations, built in (the papers', two by hardware) or saved by the user. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mole.config.schema import SECTIONS, RunConfig, apply_overrides, check_sections, read_yaml
from mole.core import checkpoint, limits
from mole.core.errors import InputError, RunError, writing
from mole.core.names import check_name
from mole.core.paths import home, make_folder

KEPT_SETTINGS = (
    "model.name", "model.dtype", "model.quantization", "model.device",
    "data.path", "data.name", "data.split", "data.eval_path", "data.eval_fraction", "data.columns",
)  # fmt: skip
"""Settings of the current run that a built-in preset keeps unless it sets them: a method does not choose the data."""

FFN = ["gate_proj", "up_proj", "down_proj"]
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


@dataclass(frozen=True)
class Preset:
    """A named configuration.

    Attributes:
        summary: one or two sentences on what it sets.
        paper: link to the paper the values come from, or "".
        overrides: the settings that differ from the defaults, in the nested form of `run.yaml`.
        user_saved: whether the user saved it; then it is complete, model and data included.
    """

    name: str
    title: str
    summary: str
    paper: str = ""
    overrides: dict[str, dict[str, Any]] = field(default_factory=dict)
    user_saved: bool = False

    def run_config(self, values: Mapping[str, Any]) -> RunConfig:
        """The preset's configuration, with model and data from `values` (the nested form) where it sets none.

        Raises `InputError` when either holds an invalid setting.
        """
        check_sections(values)
        nested = {section: dict(self.overrides.get(section, {})) for section in SECTIONS}
        for dotted in () if self.user_saved else KEPT_SETTINGS:
            section, _, name = dotted.partition(".")
            if name in values.get(section, {}):
                nested[section].setdefault(name, values[section][name])
        return RunConfig.from_dict(nested)


def epochs(number: float, **more: Any) -> dict[str, Any]:
    """The section `training` for `number` epochs instead of a number of steps; `more` are further settings."""
    return {"max_steps": 0, "num_train_epochs": number, **more}


BUILT_IN_PRESETS = (
    Preset(
        "cpu",
        "CPU, five minutes",
        "The small embedded model and DynMoLE: about five minutes on two cores, less on more.",
        overrides={"model": {"name": "smollm2-135m", "device": "cpu"}, "training": {"max_steps": 48}},
    ),
    Preset(
        "gpu-24gb",
        "One 24 GB GPU",
        "Qwen3-8B in 4 bits, bfloat16 compute, gradient checkpointing; 16 examples per step in micro-batches of 4.",
        overrides={
            "model": {"name": "Qwen/Qwen3-8B", "dtype": "bfloat16", "quantization": "4bit", "device": "cuda"},
            "training": epochs(
                1,
                per_device_train_batch_size=4,
                gradient_accumulation_steps=4,
                gradient_checkpointing=True,
                learning_rate=2e-4,
                warmup_steps=20,
                eval_steps=100,
                save_steps=100,
            ),
        },
    ),
    Preset(
        "dynmole",
        "DynMoLE, the authors' template",
        "6 experts of rank 24 on the feed-forward projections; learning rate 2e-4, constant, 2 epochs.",
        "https://arxiv.org/abs/2504.00661",
        {
            "data": {"max_length": 512},
            "adapter": {
                "router": "dynmole", "num_experts": 6, "r": 24, "lora_alpha": 48, "lora_dropout": 0.05,
                "target_modules": FFN, "entropy_threshold": 0.9, "entropy_index": 1.1, "entropy_type": "tsallis",
                "top_p": 0.75, "keep_top_k": 2, "inclusive_top_p": False, "entropy_loss_coef": 1e-2,
                "balance_loss_coef": 1e-3,
            },
            "training": epochs(
                2, per_device_train_batch_size=16, learning_rate=2e-4, lr_scheduler_type="constant", warmup_steps=0
            ),
        },
    ),
    Preset(
        "adamole",
        "AdaMoLE, the paper's settings",
        "8 experts of rank 4 on the attention projections, thresholds up to 1/8; learning rate 1e-4, 2 epochs.",
        "https://arxiv.org/abs/2405.00361",
        {
            "data": {"max_length": 256},
            "adapter": {
                "router": "adamole", "num_experts": 8, "r": 4, "lora_alpha": 16, "target_modules": ATTENTION,
                "balance_loss_coef": 1e-3,
            },
            "training": epochs(
                2, per_device_train_batch_size=16, learning_rate=1e-4, lr_scheduler_type="constant_with_warmup",
                warmup_steps=200,
            ),
        },
    ),
    Preset(
        "mola",
        "MoLA 2-4-6-8",
        "Top-2 of 2, 4, 6 and 8 experts from bottom to top layers, rank 8, all projections; learning rate 3e-4.",
        "https://arxiv.org/abs/2402.08562",
        {
            "adapter": {
                "router": "topk", "top_k": 2, "num_experts": [2, 4, 6, 8], "r": 8, "lora_alpha": 16,
                "lora_dropout": 0.05, "target_modules": "all-linear", "balance_loss_coef": 1e-3,
            },
            "training": epochs(2, learning_rate=3e-4, lr_scheduler_type="linear", warmup_steps=100),
        },
    ),
    Preset(
        "loramoe",
        "LoRAMoE",
        "8 experts of rank 4, alpha 32; every token uses all of them, weighted by the router.",
        "https://arxiv.org/abs/2312.09979",
        {
            "adapter": {"router": "dense", "num_experts": 8, "r": 4, "lora_alpha": 32},
            "training": epochs(2, learning_rate=2e-4),
        },
    ),
    Preset(
        "ldmole",
        "LD-MoLE",
        "8 experts of rank 8 on all projections, dropout 0.1; the number of active experts per token is learned. "
        "Learning rate 1e-4, weight decay 0.1, balance loss 1.",
        "https://arxiv.org/abs/2509.25684",
        {
            "adapter": {
                "router": "sparsegen", "num_experts": 8, "r": 8, "lora_alpha": 16, "lora_dropout": 0.1,
                "target_modules": "all-linear", "lambda_hidden": 64, "lambda_activation": "relu",
                "balance_loss_coef": 1.0,
            },
            "training": epochs(2, learning_rate=1e-4, weight_decay=0.1),
        },
    ),
    Preset(
        "lora",
        "LoRA, the baseline",
        "One expert of rank 64, as many parameters as eight of rank 8; no router.",
        "https://arxiv.org/abs/2106.09685",
        {
            "adapter": {"router": "lora", "num_experts": 1, "r": 64, "lora_alpha": 128, "target_modules": "all-linear"},
            "training": epochs(2, learning_rate=2e-4),
        },
    ),
)  # fmt: skip


def all_presets() -> list[Preset]:
    """The built-in presets, then those the user saved, by name."""
    return [*BUILT_IN_PRESETS, *saved_presets()]


def find_preset(name: str) -> Preset:
    """The built-in or saved preset of that name. Raises `InputError` listing the available ones."""
    presets = all_presets()
    for preset in presets:
        if preset.name == name:
            return preset
    known = ", ".join(preset.name for preset in presets)
    raise InputError(f"There is no preset {name!r}; available: {known}.", field="preset")


def merge_preset(preset: Preset, values: Mapping[str, Any]) -> dict[str, Any]:
    """The preset's settings with those of `values` (the nested form, of a config file) over them."""
    flat = {
        f"{section}.{key}": value
        for section in SECTIONS
        if isinstance(values.get(section), Mapping)
        for key, value in values[section].items()
    }
    rest = {key: value for key, value in values.items() if not (key in SECTIONS and isinstance(value, Mapping))}
    return {**apply_overrides(dict(preset.overrides), flat), **rest}


# ---------------------------------------------------------------------------------------------------------
# Saved presets: `$MOLE_HOME/presets/NAME.yaml`, in the format of `run.yaml`


def presets_dir() -> Path:
    """The folder of the saved presets."""
    return home() / "presets"


def saved_presets() -> list[Preset]:
    """The saved presets, sorted by name; files without valid YAML settings are skipped."""
    found = []
    for path in sorted(presets_dir().glob("*.yaml")):
        try:
            values = read_yaml(path)
        except InputError:
            continue
        sections = {key: values[key] for key in SECTIONS if isinstance(values.get(key), Mapping)}
        adapter, model = sections.get("adapter", {}), sections.get("model", {})
        summary = f"Saved by you: {adapter.get('router', 'dynmole')} on {model.get('name', 'smollm2-135m')}."
        found.append(Preset(path.stem, path.stem, summary, overrides=sections, user_saved=True))
    return found


@writing()
def save_preset(name: str, config: RunConfig) -> Preset:
    """Save a config as a preset, replacing one of that name.

    Raises `RunError` for an invalid name, or when the limits on number or size are exceeded.
    """
    path, text = preset_path(name), config.to_yaml()
    make_folder(path.parent)
    if len(text.encode()) > limits.PRESET_BYTES:
        raise RunError(
            f"The preset would be larger than {limits.PRESET_BYTES >> 10} KB; shorten data.columns or target_modules.",
            field="preset",
        )
    if not path.exists() and len(list(presets_dir().glob("*.yaml"))) >= limits.PRESETS:
        raise RunError(
            f"There are already {limits.PRESETS} saved presets, the maximum; delete one first.", field="preset"
        )
    checkpoint.write_file(path, lambda aside: aside.write_text(text, encoding="utf-8"))
    return find_preset(name)


@writing()
def delete_preset(name: str) -> None:
    """Delete a saved preset. Raises `RunError` when there is none of that name."""
    path = preset_path(name)
    if not path.is_file():
        raise RunError(f"There is no saved preset {name!r}.", field="preset")
    path.unlink()


def preset_path(name: str) -> Path:
    """The file of a saved preset. Raises `RunError` when the name is not allowed or is that of a built-in preset."""
    name = check_name(name, "preset", "preset")
    if any(preset.name == name for preset in BUILT_IN_PRESETS):
        raise RunError(f"{name!r} is a built-in preset; choose another name.", field="preset")
    return presets_dir() / f"{name}.yaml"
