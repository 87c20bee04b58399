"""Loading: base models (see `mole.models.sources` for where they come from), and adapters on top of them."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import os
import platform
from dataclasses import dataclass
from pathlib import Path
from threading import RLock
from typing import TYPE_CHECKING, Any

from mole.config import ModelConfig, RunConfig
from mole.core import checkpoint
from mole.core.errors import ConfigError, ModelError, RunError
from mole.data.readers import local_path, one_line
from mole.models.adapter_files import AdapterFiles, read_adapter_config
from mole.models.gguf import EMBEDDED, convert_embedded, models_dir, quiet
from mole.models.sources import Source, list_models, local_folder, pull, resolve

if TYPE_CHECKING:
    import torch

    from mole.runs.run import Run

__all__ = [
    "EMBEDDED", "Base", "Loaded", "Source", "attach", "convert_embedded", "list_models", "load_base", "load_target",
    "load_tokenizer", "locate", "models_dir", "pick_device", "pick_dtype", "pull", "resolve",
]  # fmt: skip

TEMPLATE_FILE = "chat_template.jinja"
IMPORTING = RLock()
"""Held while transformers or what builds on it is first imported beside other threads: it resolves its names lazily,
and of two threads that do so at once one sees a half-imported module."""


def import_ahead() -> None:
    """Import what a first model needs and transformers puts off until then: two of its three seconds."""
    with IMPORTING:
        from peft import AutoPeftModelForCausalLM  # noqa: F401
        from transformers import LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: F401


@dataclass
class Base:
    """A loaded base model in eval mode, with its tokenizer."""

    model: Any
    tokenizer: Any
    name: str
    device: torch.device
    dtype: torch.dtype
    folder: Path | None = None
    """Where its files are."""


@dataclass
class Loaded:
    """What chat and evaluation work with: a base model, with or without an adapter.

    Attributes:
        name: the target as it was asked for.
        base: the base model's name.
        router: the adapter's routing method; `"none"` for the base alone and for adapters that do not route.
        adapter_dir: the adapter's folder, None for the base alone.
        notice: what the user should know (a chat template that is not the base's), or None.
    """

    model: Any
    tokenizer: Any
    name: str
    base: str
    router: str = "none"
    adapter_dir: Path | None = None
    notice: str | None = None


# ---------------------------------------------------------------------------------------------------------
# Base models


def pick_device(device: str = "auto") -> torch.device:
    """The device of that name; `auto` takes a GPU when there is one. Raises `ConfigError` when it is not there."""
    import torch

    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    chosen = torch.device(device)
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise ConfigError("model.device", device, f"auto or a device that is there ({devices()})")
    if chosen.type == "mps" and not torch.backends.mps.is_available():
        raise ConfigError("model.device", device, f"auto or a device that is there ({devices()})")
    return chosen


def devices() -> str:
    """The devices of this machine, as a phrase."""
    import torch

    names = ["cpu", *(f"cuda:{number}" for number in range(torch.cuda.device_count()))]
    return ", ".join([*names, "mps"] if torch.backends.mps.is_available() else names)


def pick_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """The dtype of that name; `auto` takes bfloat16 where the device is fast at it, float16 on other CUDA GPUs."""
    import torch

    if dtype != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[dtype]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if device.type == "cpu" and cpu_is_fast_at_bfloat16():
        return torch.bfloat16
    return torch.float32


def cpu_is_fast_at_bfloat16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether the CPU multiplies bfloat16 matrices in hardware (AMX, AVX512-BF16, Arm's BF16); False if unknown."""
    fast = {"amx_bf16", "avx512_bf16"} if platform.machine() in ("x86_64", "AMD64") else {"bf16"}
    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return False
    flags = next((line for line in lines if line.lower().startswith(("flags", "features"))), "")
    return bool(fast & set(flags.split()))


def load_base(config: ModelConfig) -> Base:
    """Load a base model and its tokenizer; fetched or converted first where needed.

    Code that comes with a model is never run and pickled weights are never read. Raises `ModelError` when the model
    cannot be found or loaded, `ConfigError` for a device that is not there.
    """
    from transformers import AutoModelForCausalLM

    from mole.mixture.quantised import limit_packing

    device = pick_device(config.device)
    dtype = pick_dtype(config.dtype, device)
    source = resolve(config.name)
    quantised = quantisation(config, device, dtype)
    folder = local_folder(source, progress=True)
    tokenizer = load_tokenizer(config.name, folder)
    try:
        with quiet():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=dtype,
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                output_loading_info=True,
                **quantised,
            )
        model, report = loaded
        model = (model if quantised else model.to(device)).eval()
        if quantised:
            limit_packing(model)
    except Exception as error:
        raise ModelError(f"The model {config.name} cannot be loaded: {reason(error)}.") from error
    if report["missing_keys"]:
        raise ModelError(f"The model {config.name} is incomplete: it has no weights for {min(report['missing_keys'])}.")
    if source.kind == "hub":  # not the cache's path: adapters keep this name of their base
        model.name_or_path = model.config._name_or_path = config.name
    return Base(model, tokenizer, config.name, device, dtype, folder)


def quantisation(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """What `from_pretrained` needs to keep the projections in 8 or 4 bits; empty for none.

    Raises `ConfigError` when bitsandbytes is not installed or does not know the device.
    """
    if config.quantization == "none":
        return {}
    if importlib.util.find_spec("bitsandbytes") is None:
        allowed = "none while the package bitsandbytes is not installed"
        raise ConfigError("model.quantization", config.quantization, allowed, "pip install 'mole-studio[gpu]' adds it.")
    if device.type not in ("cpu", "cuda"):
        advice = "bitsandbytes needs a GPU by NVIDIA, or a CPU."
        raise ConfigError("model.quantization", config.quantization, f"none on {device.type}", advice)
    from transformers import BitsAndBytesConfig

    if config.quantization == "8bit":
        settings = BitsAndBytesConfig(load_in_8bit=True)
    else:
        settings = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    return {"quantization_config": settings, "device_map": {"": str(device)}}


def reason(error: Exception) -> str:
    """Why loading failed, on one line."""
    return "it needs code of its own, which is never run" if "trust_remote_code" in str(error) else one_line(error)


def load_tokenizer(name: str, folder: Path | None = None) -> Any:
    """The fast tokenizer of a base model, with a padding token. Raises `ModelError` when it cannot be had."""
    folder = folder or local_folder(resolve(name), progress=True)
    try:
        with IMPORTING:
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:
        raise ModelError(f"The tokenizer of {name} cannot be loaded: {reason(error)}.") from error
    if tokenizer.eos_token is None:
        raise ModelError(f"The tokenizer of {name} has no end-of-text token: an answer would never end.")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


# ---------------------------------------------------------------------------------------------------------
# Targets: a run's name, RUN@STEP for a checkpoint of it, an adapter folder, or base:MODEL


def load_target(target: str, model: ModelConfig | None = None) -> Loaded:
    """Load what a command's TARGET names: a run, a run's checkpoint, an adapter folder, or `base:MODEL`.

    Args:
        target: the run's name, `RUN@STEP`, the adapter's folder, or `base:` and a base model.
        model: dtype and device to use; its name is not looked at.

    Raises `RunError`, `ModelError`, `ConfigError`, or `CheckpointError` for an adapter whose files have changed.
    """
    base_name, adapter_dir = locate(target)
    base = load_base(dataclasses.replace(model or ModelConfig(), name=base_name))
    return attach(base, adapter_dir, target) if adapter_dir else Loaded(base.model, base.tokenizer, target, base_name)


def locate(target: str) -> tuple[str, Path | None]:
    """The base model's name and the adapter's folder (None for `base:MODEL`) of a target, without loading them.

    Raises `RunError` or `ModelError` when there is no such run, checkpoint, folder, or finished adapter.
    """
    if target.startswith("base:"):
        return target.removeprefix("base:") or EMBEDDED, None
    from mole import runs

    name, at, step = target.rpartition("@")
    try:
        run = runs.get(name if at else target)
    except RunError as error:
        folder = local_path(target)
        if os.path.isfile(folder / "adapter_config.json"):
            return base_of(folder), folder
        if os.path.isfile(folder / "adapter" / "adapter_config.json"):
            return base_of(folder / "adapter"), folder / "adapter"
        if os.path.isdir(folder):
            raise ModelError(f"The folder {target} holds no adapter: it has no adapter_config.json.") from None
        known = ", ".join(run.name for run in runs.list_runs()[-5:]) or "none yet"
        raise ModelError(
            f"There is no run and no adapter folder {target!r}; runs: {known}. For a base model: base:{target}"
            if "/" not in target and "\\" not in target
            else f"There is no adapter folder {target}."
        ) from error
    if at:
        return run.config.model.name, checkpoint_of(run, step)
    if not (run.adapter_dir / "adapter_config.json").is_file():
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


def base_of(folder: Path) -> str:
    """The base model of an adapter folder: its run's when it lies in one, else PEFT's note. Raises `ModelError`."""
    run = folder.parent.parent if folder.parent.name == "checkpoints" else folder.parent
    if (run / "run.yaml").is_file():
        return RunConfig.load(run / "run.yaml").model.name
    name = read_adapter_config(folder).get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise ModelError(f"{folder}/adapter_config.json does not say its base model (base_model_name_or_path).")
    # The embedded model is noted by its folder, which is another one on another machine.
    return EMBEDDED if Path(name).name == EMBEDDED and not Path(name).is_dir() else str(name)


def attach(base: Base, folder: Path, name: str | None = None, onto: Any = None, adapter: str = "default") -> Loaded:
    """Put the adapter in `folder`, of ours or another PEFT method, on a base model, which it changes in place.

    The chat template kept with the adapter is used; `Loaded.notice` says when the base's own differs.

    Args:
        base: the base model.
        folder: the adapter.
        name: what to call the result; the folder if None.
        onto: the `PeftModel` that holds other adapters of the same kind on this base; it gets one more.
        adapter: PEFT's name for it.

    Raises `ModelError` when the adapter cannot be loaded, `CheckpointError` when its files have changed.
    """
    import mole.mixture.model  # noqa: F401  makes PEFT know our adapters

    from peft import PeftModel  # isort: skip

    files = AdapterFiles.read(folder)
    device = str(base.device)
    try:
        if onto is None:
            onto = PeftModel.from_pretrained(base.model, str(folder), adapter_name=adapter, torch_device=device).eval()
        else:
            onto.load_adapter(str(folder), adapter_name=adapter, torch_device=device)
            onto.eval()
    except Exception as error:
        raise ModelError(f"The adapter in {folder} does not load on {base.name}: {one_line(error)}.") from error
    files.check_complete(onto, adapter, base.name)
    tokenizer, notice = with_template(base, folder)
    router = files.config.get("router") or "none"
    return Loaded(onto, tokenizer, name or str(folder), base.name, router, folder, notice)


def with_template(base: Base, folder: Path) -> tuple[Any, str | None]:
    """The base's tokenizer with the chat template kept with an adapter, and a notice when that differs."""
    from mole.data.encoding import chat_template

    if not (folder / TEMPLATE_FILE).is_file():
        return base.tokenizer, None
    try:
        kept = (folder / TEMPLATE_FILE).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder / TEMPLATE_FILE} cannot be read: {one_line(error)}.") from None
    notice = f"The chat template kept with the adapter is used; the one of {base.name} differs from it."
    differs = kept.strip() != chat_template(base.tokenizer).strip()
    tokenizer = copy.copy(base.tokenizer)  # the tables are shared; other targets on this base keep their template
    tokenizer.chat_template = kept
    return tokenizer, notice if differs else None
