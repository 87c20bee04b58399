"""Loads base models (`mole.models.sources` finds them), and adapters on top of them."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mole.config import ModelConfig
from mole.core import files
from mole.core.devices import pick_device, pick_dtype, restrict_to
from mole.core.errors import ConfigError, ModelError
from mole.core.gpus import borrows_gpus
from mole.core.text import one_line
from mole.models.adapter_files import AdapterFiles, our_type
from mole.models.gguf import quiet
from mole.models.peft_patterns import resolve_patterns
from mole.models.sources import local_folder, resolve
from mole.models.tokenizer_guard import check_tokenizer_files, guard, panics_as_errors

if TYPE_CHECKING:
    import torch

    from mole.mixture.routing_map import RoutingMap


STATES = ("past_key_values", "cache_params", "state")
"""What models name the state that they keep between tokens, as an argument and in their output."""
TEMPLATE_FILE = "chat_template.jinja"
MAX_TEMPLATE = 1 << 20
"""Longest chat template that is read, in characters; the longest on the hub have some twenty thousand."""


def import_ahead() -> None:
    """Import what transformers defers until the first model is loaded: two of that load's three seconds."""
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
    """The folder of its files."""


@dataclass
class Loaded:
    """A base model with or without an adapter, as used by chat and evaluation.

    Attributes:
        name: the target as requested.
        base: the base model's name.
        router: the adapter's routing method; `"none"` for the base model alone and for adapters without routing.
        adapter_dir: the adapter's folder; None for the base model alone.
        notice: a message for the user (a chat template other than the base model's), or None.
        routing_map: the map that the routing view takes hues from, see `mole.chat.reference`; None without one.
        routing_mapped: whether it was fitted, with or without success.
    """

    model: Any
    tokenizer: Any
    name: str
    base: str
    router: str = "none"
    adapter_dir: Path | None = None
    notice: str | None = None
    routing_map: RoutingMap | None = None
    routing_mapped: bool = False

    def add_notice(self, notice: str | None) -> None:
        """Put a further message for the user before those that there are."""
        self.notice = " ".join(filter(None, [notice, self.notice])) or None


# ---------------------------------------------------------------------------------------------------------
# Base models


def on_its_gpu(config: ModelConfig) -> ModelConfig:
    """The config for this process, which sees no GPU but the one that the config names from now on."""
    return dataclasses.replace(config, device=restrict_to(config.device))


def load_base(config: ModelConfig) -> Base:
    """Load a base model and its tokenizer, downloading or converting it first if needed.

    Code that comes with a model is never run, and pickled weights are never read.

    Raises:
        ModelError: the model cannot be found or loaded.
        ConfigError: the device does not exist.
    """
    from transformers import AutoModelForCausalLM

    from mole.mixture.quantised import limit_packing

    device = pick_device(config.device)
    dtype = pick_dtype(config.dtype, device)
    source = resolve(config.name)
    placed = placement(config, device, dtype)
    folder = local_folder(source, progress=True)
    check_continues_text(read_config(folder), config.name)
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
                **placed,
            )
        model, report = loaded
        model = (model if placed else model.to(device)).eval()
        if config.quantization != "none":
            limit_packing(model)
    except Exception as error:
        raise ModelError(f"The model {config.name} cannot be loaded: {reason(error)}.") from error
    if report["missing_keys"]:
        raise ModelError(f"The model {config.name} is incomplete: it has no weights for {min(report['missing_keys'])}.")
    if source.kind == "hub":  # not the cache's path: adapters store this name of their base model
        model.name_or_path = model.config._name_or_path = config.name
    return Base(model, tokenizer, config.name, device, dtype, folder)


def read_config(folder: Path) -> Any:
    """The transformers config of a model; None if it cannot be read: loading the model says why."""
    from transformers import AutoConfig

    try:
        with quiet():
            return AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception:
        return None


def check_continues_text(config: Any, name: str) -> None:
    """Raise `ModelError` if models with this transformers config do not continue text, token by token."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    if config is None or not hasattr(config, "model_type") or hasattr(config, "auto_map"):
        return
    kind = config.model_type
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ModelError(
            f"The model {name} ({kind}) is not a language model that continues text, which training, chat and "
            "evaluation need. In Python, MoleConfig adapts it."
        )
    model: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    if inspect.signature(model.forward).parameters.keys().isdisjoint(STATES):
        raise ModelError(
            f"The model {name} ({kind}) keeps nothing between tokens that it reads, which chat needs. In Python, "
            "MoleConfig adapts it."
        )


def placement(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Arguments of `from_pretrained` that say where the weights go, and that they have 8 or 4 bits.

    Raises `ConfigError` if bitsandbytes is not installed or does not support the device.
    """
    # Trainer compares this name with its own, which has a number, to see whether the model is on several devices.
    place = f"cuda:{device.index or 0}" if device.type == "cuda" else str(device)
    if config.quantization == "none" and borrows_gpus():
        return {}  # `spaces` shows a GPU to this thread only, and transformers reads in several
    if config.quantization == "none":
        # On a GPU each weight goes there as it is read: the whole model need not fit into RAM.
        return {"device_map": {"": place}} if device.type == "cuda" else {}
    if problem := why_not_quantised(device.type):
        raise ConfigError("model.quantization", config.quantization, *problem)
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
    return {"quantization_config": settings, "device_map": {"": place}}


def why_not_quantised(kind: str) -> tuple[str, str] | None:
    """What is allowed instead of 8- or 4-bit weights on a kind of device, and the advice; None where they are."""
    if importlib.util.find_spec("bitsandbytes") is None:
        advice = "pip install 'mole-studio[gpu]' adds it."
        return "none while the package bitsandbytes is not installed", advice
    return None if kind in ("cpu", "cuda") else (f"none on {kind}", "bitsandbytes needs an NVIDIA GPU or a CPU.")


def reason(error: Exception) -> str:
    """Why loading failed, on one line."""
    return "it needs code of its own, which is never run" if "trust_remote_code" in str(error) else one_line(error)


def load_tokenizer(name: str, folder: Path | None = None) -> Any:
    """The fast tokenizer of a base model, with a padding token. Raises `ModelError` if it cannot be loaded."""
    folder = folder or local_folder(resolve(name), progress=True)
    check_tokenizer_files(folder, name)
    try:
        from transformers import AutoTokenizer

        with panics_as_errors(name):
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(f"The tokenizer of {name} cannot be loaded: {reason(error)}.") from error
    if tokenizer.eos_token is None:
        raise ModelError(f"The tokenizer of {name} has no end-of-text token: a reply would never end.")
    rows = embedding_rows(read_config(folder))
    if rows is not None and tokenizer.eos_token_id >= rows:
        raise ModelError(
            f"The tokenizer of {name} ends texts with the id {tokenizer.eos_token_id}, and the model has embeddings "
            f"for ids below {rows} only: use the tokenizer that belongs to the model."
        )
    if tokenizer.pad_token is None or (rows is not None and tokenizer.pad_token_id >= rows):
        tokenizer.pad_token = tokenizer.eos_token
    return guard(tokenizer, name, rows)


def embedding_rows(hf_config: Any) -> int | None:
    """How many tokens a model with this config has embeddings for; None if it does not say."""
    return None if hf_config is None else getattr(hf_config.get_text_config(), "vocab_size", None)


def attach(base: Base, folder: Path, name: str | None = None, onto: Any = None, adapter: str = "default") -> Loaded:
    """Load the adapter in `folder`, of MoLE or another PEFT method, onto a base model, which is modified in place.

    The chat template saved with the adapter is used; `Loaded.notice` tells if the base model's differs.

    Args:
        base: the base model.
        folder: the adapter's folder.
        name: `Loaded.name`; the folder if None.
        onto: a `PeftModel` on this base model that the adapter is added to.
        adapter: the adapter's name in PEFT.

    Raises:
        ModelError: the adapter cannot be loaded.
        CheckpointError: its files have changed since they were written.
    """
    import mole.mixture.model  # noqa: F401  registers MoLE with PEFT

    from peft import PeftModel  # isort: skip

    files = AdapterFiles.read(folder)
    # A file is read by way of pinned memory, which starts CUDA; `spaces` cannot pretend that.
    device = "cpu" if borrows_gpus() else str(base.device)
    try:
        config = files.peft_config()
        if config.peft_type != our_type():  # ours are resolved when they are added
            resolve_patterns(config, base.model if onto is None else onto.get_base_model())
        if onto is None:
            onto = PeftModel.from_pretrained(
                base.model, str(folder), adapter_name=adapter, config=config, torch_device=device
            )
        else:
            config.inference_mode = True
            onto.add_adapter(adapter, config)
            onto.load_adapter(str(folder), adapter_name=adapter, torch_device=device)
        onto.eval()
    except Exception as error:
        raise ModelError(f"The adapter in {folder} does not load on {base.name}: {one_line(error)}.") from error
    files.check_complete(onto, adapter, base.name)
    tokenizer, notice = with_template(base, folder)
    router = files.config.get("router") or "none"
    return Loaded(onto, tokenizer, name or str(folder), base.name, router, folder, notice)


def with_template(base: Base, folder: Path) -> tuple[Any, str | None]:
    """The base model's tokenizer with the chat template saved with an adapter, and a notice if they differ."""
    from mole.data import chat_template

    if not (folder / TEMPLATE_FILE).is_file():
        return base.tokenizer, None
    try:
        with open(folder / TEMPLATE_FILE, encoding="utf-8", opener=files.regular) as file:
            kept = file.read(MAX_TEMPLATE + 1)
        if len(kept) > MAX_TEMPLATE:
            raise ValueError(f"it is longer than {MAX_TEMPLATE:,} characters")
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder / TEMPLATE_FILE} cannot be read: {one_line(error)}.") from None
    notice = f"The chat template saved with the adapter is used; that of {base.name} differs."
    differs = kept.strip() != chat_template(base.tokenizer).strip()
    tokenizer = copy.copy(base.tokenizer)  # shallow: other targets on this base model keep their template
    tokenizer.chat_template = kept
    return tokenizer, notice if differs else None
