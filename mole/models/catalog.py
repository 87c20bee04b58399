"""The catalogue of base models: size, licence, whether one is on this machine, whether it fits.

Uses neither network nor torch: well-known models are listed by hand, the rest is read from local files.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

from mole.config import ModelConfig
from mole.core.devices import cpu_is_fast_at_bfloat16, found_device, total_on_cpu
from mole.core.errors import ModelError
from mole.core.gpus import gpu_of
from mole.core.paths import local_path, models_dir
from mole.core.text import bytes_text, count_text
from mole.models import sizes
from mole.models.gguf import EMBEDDED
from mole.models.sources import HUB_ID, cached_from_hub, resolve

RUNTIME = 1e9
"""Bytes used by libraries and the device's runtime, in addition to any model."""


@dataclass(frozen=True)
class Entry:
    """A base model in the catalogue.

    Attributes:
        name: the value for `model.name`.
        kind: embedded, hub, folder or gguf.
        parameters: number of weights, shared ones counted once; 0 if unknown.
        size: bytes on disk or to download; 0 if unknown.
        licence: its name; empty if unknown.
        gated: whether its terms must be accepted on the hub before downloading.
        cached: whether it is on this machine.
    """

    name: str
    kind: str = "hub"
    parameters: int = 0
    size: int = 0
    licence: str = ""
    gated: bool = False
    cached: bool = False

    @property
    def title(self) -> str:
        """Its short name: the last part of the hub id or path."""
        return Path(self.name).name

    @property
    def label(self) -> str:
        """Name, parameters, size, licence and whether it is downloaded, on one line."""
        size = f"{bytes_text(self.size)} {'here' if self.cached else 'to download'}" if self.size else "here"
        parts = [self.title, count_text(self.parameters), size, self.licence]
        return " · ".join(part for part in parts if part)


def known(name: str, parameters: int, licence: str, size: int = 0, gated: bool = False) -> Entry:
    """A hub model with bfloat16 weights; `size` if its files hold more than its parameters."""
    return Entry(name, "hub", parameters, size or 2 * parameters, licence, gated)


APACHE = "Apache-2.0"
KNOWN = (
    known("HuggingFaceTB/SmolLM2-360M-Instruct", 361_821_120, APACHE),
    known("HuggingFaceTB/SmolLM2-1.7B-Instruct", 1_711_376_384, APACHE),
    known("HuggingFaceTB/SmolLM3-3B", 3_075_098_624, APACHE),
    known("Qwen/Qwen3-0.6B", 596_049_920, APACHE, size=1_503_264_768),
    known("Qwen/Qwen3-1.7B", 1_720_574_976, APACHE, size=4_063_479_808),
    known("Qwen/Qwen3-4B", 4_022_468_096, APACHE),
    known("Qwen/Qwen3-8B", 8_190_735_360, APACHE),
    known("meta-llama/Llama-3.2-1B-Instruct", 1_235_814_400, "Llama 3.2 Community", gated=True),
    known("meta-llama/Llama-3.2-3B-Instruct", 3_212_749_824, "Llama 3.2 Community", gated=True),
    known("meta-llama/Llama-3.1-8B-Instruct", 8_030_261_248, "Llama 3.1 Community", gated=True),
    known("google/gemma-3-270m-it", 268_098_176, "Gemma", gated=True),
    known("google/gemma-3-1b-it", 999_885_952, "Gemma", gated=True),
    known("microsoft/Phi-4-mini-instruct", 3_836_021_760, "MIT"),
    known("allenai/OLMo-2-0425-1B-Instruct", 1_484_916_736, APACHE),
    known("mistralai/Mistral-7B-Instruct-v0.3", 7_248_023_552, APACHE),
)
"""Well-known open models; parameters according to their configs, sizes as stored on the hub."""


def models() -> list[Entry]:
    """The whole catalogue: the embedded model, others on this machine, then well-known ones by size."""
    by_name = {entry.name: entry for entry in KNOWN}
    here = [look(name) for name in [EMBEDDED, *converted(), *downloaded()]]
    rest = [entry for entry in by_name.values() if entry.name not in {found.name for found in here}]
    return [*here, *sorted(rest, key=lambda entry: entry.parameters)]


def converted() -> list[str]:
    """Folders of `.gguf` models that were converted before."""
    folders = sorted(config.parent for config in models_dir().glob("[!.]*/config.json"))
    return [str(folder) for folder in folders if folder.name != EMBEDDED]


def downloaded() -> list[str]:
    """Ids of the models that are complete in the hub's cache."""
    from huggingface_hub import constants

    folders = sorted(Path(constants.HF_HUB_CACHE).glob("models--*"))
    names = ["/".join(folder.name.split("--")[1:]) for folder in folders]
    return [name for name in names if HUB_ID.fullmatch(name) and cached_from_hub(name)]


def look(name: str) -> Entry:
    """The entry of a model, without asking the hub. Raises `ModelError` for a path that holds no model."""
    name = name.strip()
    if not name:
        raise ModelError("model.name is empty; give a hub id, a folder, a .gguf file or smollm2-135m.")
    if name == EMBEDDED:
        ready = sizes.files_of(EMBEDDED)
        size = sum(file.stat().st_size for file in ready)
        return Entry(EMBEDDED, "embedded", 134_515_008, size, APACHE, cached=bool(ready))
    path = local_path(name)
    if os.path.exists(path) or not HUB_ID.fullmatch(name) or path.suffix.lower() == ".gguf":
        source = resolve(name)  # a path, so the hub is not asked
        if source.kind == "gguf":
            return Entry(name, "gguf", 0, Path(source.location).stat().st_size, cached=True)
        return with_files(Entry(name, "folder"))
    return with_files(next((entry for entry in KNOWN if entry.name == name), Entry(name)))


def with_files(entry: Entry) -> Entry:
    """The entry, completed from the model's local files if there are any."""
    files = sizes.files_of(entry.name)
    if not files:
        return entry
    counted = entry.parameters or sizes.parameters(files)
    return replace(entry, parameters=counted, size=sum(file.stat().st_size for file in files), cached=True)


# ---------------------------------------------------------------------------------------------------------
# Does it fit?


@dataclass(frozen=True)
class Fit:
    """A rough verdict (`fits`, `tight`, `too large` or `unknown`) and a sentence with its figures."""

    verdict: str
    words: str


@dataclass(frozen=True)
class Device:
    """The device a model would be trained on: its name, memory in bytes, and bytes per weight."""

    name: str
    memory: int
    bytes_per_weight: int


def fits(entry: Entry, config: ModelConfig | None = None) -> Fit:
    """Estimate whether an adapter of a model can be trained on this machine; the preflight is more exact.

    Rule of thumb: twice the weights is comfortable; 1.25 times is enough with a small batch and gradient
    checkpointing.
    """
    if not entry.parameters:
        return Fit("unknown", "How much memory it needs is not known until it is downloaded.")
    device = training_device(config or ModelConfig())
    weights = entry.parameters * device.bytes_per_weight
    comfortable, least = 2 * weights + RUNTIME, 1.25 * weights + RUNTIME
    needs = f"{bytes_text(weights)} of weights as {8 * device.bytes_per_weight}-bit numbers on {device.name}"
    has = f"with {bytes_text(device.memory)}"
    if comfortable <= device.memory:
        return Fit("fits", f"Fits: {needs} {has}.")
    if least <= device.memory:
        return Fit("tight", f"Tight: {needs} {has}: take small batches and gradient checkpointing.")
    return Fit("too large", f"Too large: {needs} {has}; training it takes at least {bytes_text(least)}.")


def training_device(config: ModelConfig) -> Device:
    """The device a run would train on, as `mole.models.loading` picks it, without torch."""
    device = found_device(config.device)
    gpu = gpu_of(device) if device.startswith("cuda") else None
    if gpu:
        return Device(gpu.name, gpu.memory, 4 if config.dtype == "float32" else 2)
    half = config.dtype in ("bfloat16", "float16") or (config.dtype == "auto" and cpu_is_fast_at_bfloat16())
    return Device("this machine's CPU", total_on_cpu(), 2 if half else 4)


# ---------------------------------------------------------------------------------------------------------
# Descriptions


def about(name: str, config: ModelConfig | None = None) -> tuple[str, str]:
    """Describe a model in a line or two, with the verdict of `fits`. Raises `ModelError` as `look` does."""
    entry = look(name)
    fit = fits(entry, config)
    return " ".join(filter(None, (f"{facts(entry)}.", fit.words, advice(entry)))), fit.verdict


def facts(entry: Entry) -> str:
    """Its kind, parameters, size and licence, separated by commas."""
    kinds = {
        "embedded": "SmolLM2-135M-Instruct, which comes with MoLE Studio",
        "folder": "A folder on this machine",
        "gguf": "A GGUF file",
        "hub": f"{entry.name} on the Hugging Face hub",
    }
    weights = f"{count_text(entry.parameters)} parameters" if entry.parameters else ""
    licence = f"{entry.licence} licence" if entry.licence else ""
    return ", ".join(filter(None, (kinds[entry.kind], weights, bytes_text(entry.size) if entry.size else "", licence)))


def advice(entry: Entry) -> str:
    """What happens, or what to do, before it can be trained."""
    if entry.cached:
        return "It is converted once when it is first used." if entry.kind == "gguf" else "It is here, ready to load."
    if entry.kind == "embedded":
        return "It is converted when it is first used (half a minute)."
    if entry.gated:
        return f"Accept its terms at https://huggingface.co/{entry.name} and log in with `hf auth login` first."
    known_size = "It is downloaded when it is first used."
    return known_size if entry.size else "Not on this machine: the hub is asked for it when the run starts."
