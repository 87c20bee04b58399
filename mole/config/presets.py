"""Presets: whole set-ups by name, the papers', two for a kind of machine, and one's own. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mole.config.schema import SECTIONS, RunConfig, apply_overrides, check_sections, read_yaml
from mole.core import checkpoint, limits
from mole.core.errors import InputError, RunError, writing
from mole.core.paths import check_name, home

KEPT_SETTINGS = (
    "model.name", "model.dtype", "model.quantization", "model.device",
    "data.path", "data.eval_path", "data.eval_fraction", "data.columns",
)  # fmt: skip
"""What a preset leaves as it is, unless it says so: whose model and data is not a method's business."""

FFN = ["gate_proj", "up_proj", "down_proj"]
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


@dataclass(frozen=True)
class Preset:
    """A set-up: the settings in `overrides` (the nested form of `run.yaml`), all others at their defaults."""

    name: str
    title: str
    summary: str
    paper: str = ""
    overrides: dict[str, dict[str, Any]] = field(default_factory=dict)
    user_saved: bool = False
    """Whether somebody saved it: then it is complete, model and data too."""

    def run_config(self, values: Mapping[str, Any]) -> RunConfig:
        """The run of this preset, with the model and the data of `values` (a nested form) where it has none.

        Raises `InputError` when those, or a preset of one's own, cannot be used.
        """
        check_sections(values)
        nested = {section: dict(self.overrides.get(section, {})) for section in SECTIONS}
        for dotted in () if self.user_saved else KEPT_SETTINGS:
            section, _, name = dotted.partition(".")
            if name in values.get(section, {}):
                nested[section].setdefault(name, values[section][name])
        return RunConfig.from_dict(nested)


def epochs(number: float, **more: Any) -> dict[str, Any]:
    """Training over the data so many times, rather than for a number of steps."""
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
        "Qwen3-8B in 4 bits, computing in bfloat16, with gradient checkpointing; 16 examples a step in parts of 4.",
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
        "AdaMoLE, the paper's set-up",
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
        "Top-2 of 2, 4, 6 and 8 experts from the bottom layers up, rank 8, all projections; learning rate 3e-4.",
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
        "8 experts of rank 4, alpha 32, all of them on every token, weighted by the router.",
        "https://arxiv.org/abs/2312.09979",
        {
            "adapter": {"router": "dense", "num_experts": 8, "r": 4, "lora_alpha": 32},
            "training": epochs(2, learning_rate=2e-4),
        },
    ),
    Preset(
        "ldmole",
        "LD-MoLE",
        "8 experts of rank 8 on all projections, dropout 0.1; how many answer a token is learnt (sparsegen).",
        "https://arxiv.org/abs/2509.25684",
        {
            "adapter": {
                "router": "sparsegen", "num_experts": 8, "r": 8, "lora_alpha": 16, "lora_dropout": 0.1,
                "target_modules": "all-linear",
            },
            "training": epochs(2, learning_rate=2e-4),
        },
    ),
    Preset(
        "lora",
        "LoRA, the base line",
        "One expert of rank 64: as many parameters as eight of rank 8, and no router.",
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
    """The preset of that name, built in or one's own. Raises `InputError` naming those there are."""
    presets = all_presets()
    for preset in presets:
        if preset.name == name:
            return preset
    known = ", ".join(preset.name for preset in presets)
    raise InputError(f"There is no preset {name!r}; there is: {known}.", field="preset")


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
# One's own: `$MOLE_HOME/presets/NAME.yaml`, in the form of `run.yaml`


def presets_dir() -> Path:
    """Where one's own presets are."""
    return home() / "presets"


def saved_presets() -> list[Preset]:
    """One's own presets, by name; files that hold no settings are passed over."""
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
    """Keep a config as a preset of one's own; one of that name is replaced. Raises `RunError` for a bad name."""
    path, text = preset_path(name), config.to_yaml()
    path.parent.mkdir(parents=True, exist_ok=True)
    if len(text.encode()) > limits.PRESET_BYTES:
        raise RunError(f"These settings take more than {limits.PRESET_BYTES >> 10} KB as a preset.", field="preset")
    if not path.exists() and len(list(presets_dir().glob("*.yaml"))) >= limits.PRESETS:
        raise RunError(
            f"{limits.PRESETS} presets of yours are kept already, which is the most; delete one.", field="preset"
        )
    checkpoint.write_file(path, lambda aside: aside.write_text(text, encoding="utf-8"))
    return find_preset(name)


@writing()
def delete_preset(name: str) -> None:
    """Delete a preset of one's own. Raises `RunError` when there is none."""
    path = preset_path(name)
    if not path.is_file():
        raise RunError(f"There is no preset of yours called {name!r}.", field="preset")
    path.unlink()


def preset_path(name: str) -> Path:
    """The file of one's own preset. Raises `RunError` when it may not be called so."""
    check_name(name, "preset", "preset")
    if any(preset.name == name for preset in BUILT_IN_PRESETS):
        raise RunError(f"{name!r} is a preset that is built in; choose another name.", field="preset")
    return presets_dir() / f"{name}.yaml"
