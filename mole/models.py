"""Loading: base models (see `mole.sources` for where they come from), and adapters on top of them."""

from __future__ import annotations

import dataclasses
import json
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mole import checkpoint
from mole.config import ModelConfig, RunConfig
from mole.convert import EMBEDDED, convert_embedded, models_dir, quiet
from mole.errors import ConfigError, ModelError, RunError
from mole.formats import one_line
from mole.sources import Source, list_models, local_folder, pull, resolve

if TYPE_CHECKING:
    import torch

__all__ = [
    "EMBEDDED", "Base", "Loaded", "Source", "attach", "convert_embedded", "list_models", "load_base", "load_target",
    "load_tokenizer", "locate", "models_dir", "pick_device", "pick_dtype", "pull", "resolve",
]  # fmt: skip

TEMPLATE_FILE = "chat_template.jinja"


@dataclass
class Base:
    """A loaded base model in eval mode, with its tokenizer."""

    model: Any
    tokenizer: Any
    name: str
    device: torch.device
    dtype: torch.dtype


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

    device = pick_device(config.device)
    dtype = pick_dtype(config.dtype, device)
    source = resolve(config.name)
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
            )
        model, report = loaded
        model = model.to(device).eval()
    except Exception as error:
        raise ModelError(f"The model {config.name} cannot be loaded: {reason(error)}.") from error
    if report["missing_keys"]:
        raise ModelError(f"The model {config.name} is incomplete: it has no weights for {min(report['missing_keys'])}.")
    if source.kind == "hub":  # not the cache's path: adapters keep this name of their base
        model.name_or_path = model.config._name_or_path = config.name
    return Base(model, tokenizer, config.name, device, dtype)


def reason(error: Exception) -> str:
    """Why loading failed, on one line."""
    return "it needs code of its own, which is never run" if "trust_remote_code" in str(error) else one_line(error)


def load_tokenizer(name: str, folder: Path | None = None) -> Any:
    """The fast tokenizer of a base model, with a padding token. Raises `ModelError` when it cannot be had."""
    from transformers import AutoTokenizer

    folder = folder or local_folder(resolve(name), progress=True)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:
        raise ModelError(f"The tokenizer of {name} cannot be loaded: {reason(error)}.") from error
    if tokenizer.eos_token is None:
        raise ModelError(f"The tokenizer of {name} has no end-of-text token: an answer would never end.")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


# ---------------------------------------------------------------------------------------------------------
# Targets: a run's name, an adapter folder, or base:MODEL


def load_target(target: str, model: ModelConfig | None = None) -> Loaded:
    """Load what a command's TARGET names: a run, an adapter folder, or `base:MODEL`.

    Args:
        target: the run's name, the adapter's folder, or `base:` and a base model.
        model: dtype and device to use; its name is not looked at.

    Raises `RunError`, `ModelError`, `ConfigError`, or `CheckpointError` for an adapter whose files have changed.
    """
    base_name, adapter_dir = locate(target)
    base = load_base(dataclasses.replace(model or ModelConfig(), name=base_name))
    return attach(base, adapter_dir, target) if adapter_dir else Loaded(base.model, base.tokenizer, target, base_name)


def locate(target: str) -> tuple[str, Path | None]:
    """The base model's name and the adapter's folder (None for `base:MODEL`) of a target, without loading them.

    Raises `RunError` or `ModelError` when there is no such run, folder, or finished adapter.
    """
    if target.startswith("base:"):
        return target.removeprefix("base:") or EMBEDDED, None
    from mole import runs

    try:
        run = runs.get(target)
    except RunError as error:
        folder = Path(target).expanduser()
        if (folder / "adapter_config.json").is_file():
            return base_of(folder), folder
        if (folder / "adapter" / "adapter_config.json").is_file():
            return base_of(folder / "adapter"), folder / "adapter"
        if folder.is_dir():
            raise ModelError(f"The folder {target} holds no adapter: it has no adapter_config.json.") from None
        known = ", ".join(run.name for run in runs.list_runs()[-5:]) or "none yet"
        raise ModelError(
            f"There is no run and no adapter folder {target!r}; runs: {known}. For a base model: base:{target}"
            if "/" not in target and "\\" not in target
            else f"There is no adapter folder {target}."
        ) from error
    if not (run.adapter_dir / "adapter_config.json").is_file():
        advice = {
            "queued": "it waits for its device",
            "running": "wait until it has finished",
            "failed": f"see `mole runs show {run.name}`",
        }.get(run.state, f"go on with `mole runs resume {run.name}`")
        raise RunError(f"The run {run.name} is {run.state} and has no adapter yet: {advice}.")
    return run.config.model.name, run.adapter_dir


def base_of(folder: Path) -> str:
    """The base model of an adapter folder: its run's when it lies in one, else PEFT's note. Raises `ModelError`."""
    if (folder.parent / "run.yaml").is_file():
        return RunConfig.load(folder.parent / "run.yaml").model.name
    name = read_adapter_config(folder).get("base_model_name_or_path")
    if not name:
        raise ModelError(f"{folder}/adapter_config.json does not say its base model (base_model_name_or_path).")
    # The embedded model is noted by its folder, which is another one on another machine.
    return EMBEDDED if Path(name).name == EMBEDDED and not Path(name).is_dir() else str(name)


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """The content of an adapter's `adapter_config.json`. Raises `ModelError` when it is not JSON."""
    try:
        values = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder}/adapter_config.json cannot be read: {one_line(error)}.") from None
    return values if isinstance(values, dict) else {}


def attach(base: Base, folder: Path, name: str | None = None) -> Loaded:
    """Put the adapter in `folder`, of ours or another PEFT method, on a base model, which it changes in place.

    The chat template kept with the adapter is used; `Loaded.notice` says when the base's own differs.
    Raises `ModelError` when the adapter cannot be loaded, `CheckpointError` when its files have changed.
    """
    import mole.tuner  # noqa: F401  makes PEFT know our adapters

    from peft import PeftModel  # isort: skip

    from mole.data import chat_template

    if not (folder / "adapter_model.safetensors").is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        why = "only pickled weights, which can run code; save it again as safetensors" if pickled else "no weights"
        raise ModelError(f"The adapter in {folder} has {why} (adapter_model.safetensors).")
    if (folder / checkpoint.MANIFEST).is_file():
        checkpoint.verify(folder)
    settings = read_adapter_config(folder)
    try:
        model = PeftModel.from_pretrained(base.model, str(folder), torch_device=str(base.device)).eval()
    except Exception as error:
        raise ModelError(f"The adapter in {folder} does not load on {base.name}: {one_line(error)}.") from error
    notice, own = None, chat_template(base.tokenizer)
    if (folder / TEMPLATE_FILE).is_file():
        base.tokenizer.chat_template = (folder / TEMPLATE_FILE).read_text(encoding="utf-8")
        if base.tokenizer.chat_template.strip() != own.strip():
            notice = f"The chat template kept with the adapter is used; the one of {base.name} differs from it."
    router = settings.get("router") or "none"
    return Loaded(model, base.tokenizer, name or str(folder), base.name, router, folder, notice)
