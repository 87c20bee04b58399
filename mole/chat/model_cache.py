"""Chat models in memory: each base model is loaded once and shared by its MoLE adapters.

Adapters of other PEFT methods, and those that change the base model's biases, get a base model of their own. When
memory runs short, the least recently used target is unloaded first. Use one target of a cache at a time: the adapters
of a base model are switched, not copied.
"""

from __future__ import annotations

import dataclasses
import gc
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mole.config import ModelConfig
from mole.core.devices import HEADROOM, free_memory, pick_device, pick_dtype
from mole.core.errors import MoleError
from mole.models import sizes
from mole.models.adapter_files import WEIGHTS, our_type, read_adapter_config
from mole.models.loading import Base, Loaded, attach, load_base
from mole.models.moved import check_base
from mole.runs.targets import as_trained, locate

Key = tuple[Any, ...]


@dataclass
class LoadedBase:
    """A base model in memory, the PEFT model around it once it has an adapter, and PEFT's name of each adapter."""

    base: Base
    peft: Any = None
    adapters: dict[Key, str] = field(default_factory=dict)
    adapters_loaded: int = 0
    """Counts up, so that an adapter's name is never used twice."""

    def add(self, key: Key, folder: Path | None, target: str) -> Loaded:
        """Load a target's adapter; `folder` is None for the base model alone."""
        if folder is None:
            return Loaded(self.base.model, self.base.tokenizer, target, self.base.name)
        self.adapters_loaded += 1
        name = f"adapter{self.adapters_loaded}"
        loaded = attach(self.base, folder, target, onto=self.peft, adapter=name)
        self.peft, self.adapters[key] = loaded.model, name
        return loaded

    def remove(self, key: Key) -> None:
        """Unload a target's adapter, if it has one."""
        name = self.adapters.pop(key, None)
        if name and self.adapters:
            self.peft.delete_adapter(name)
        elif name:  # a PEFT model needs at least one adapter
            if self.peft.peft_config[name].peft_type == our_type():
                self.peft.base_model.delete_adapter(name)  # what it trained whole would stay in the base model
            self.base.model, self.peft = self.peft.unload(), None

    def activate(self, key: Key) -> AbstractContextManager[Any]:
        """Make a target's adapter, or none, the active one inside the `with` block."""
        if key in self.adapters:
            self.peft.set_adapter(self.adapters[key], inference_mode=True)
            return nullcontext()
        return self.peft.disable_adapter() if self.peft is not None else nullcontext()


class ModelCache:
    """The targets in memory, least recently used first.

    Args:
        free: returns the bytes free on a device, None if unknown.
    """

    def __init__(self, free: Callable[[torch.device], int | None] = free_memory) -> None:
        self._free = free
        self._bases: dict[Key, LoadedBase] = {}
        self._targets: OrderedDict[Key, tuple[Key, Loaded]] = OrderedDict()
        """Target's key → its base model's key, and the model."""

    def __len__(self) -> int:
        return len(self._targets)

    def holds(self, target: str, config: ModelConfig | None = None) -> bool:
        """Whether the target is in memory in its current version. Raises `MoleError` if it does not exist."""
        config, _ = as_trained(config or ModelConfig(), locate(target)[1])
        return cache_keys(target, config)[0] in self._targets

    def uses_device(self, kind: str) -> bool:
        """Whether a model is on this kind of device (`cuda`, `cpu`)."""
        return any(loaded.base.device.type == kind for loaded in list(self._bases.values()))

    @contextmanager
    def use(self, target: str, config: ModelConfig | None = None) -> Iterator[Loaded]:
        """Load the target if needed and make its adapter the active one inside the `with` block.

        `config` sets dtype and device; its name is ignored. The base model is quantised as in training. Raises what
        `load_target` raises.
        """
        config, notice = as_trained(config or ModelConfig(), locate(target)[1])
        key, base_key = cache_keys(target, config)
        if key not in self._targets:
            self._targets[key] = (base_key, self._load(target, config, key, base_key))
            self._targets[key][1].add_notice(notice)
        self._targets.move_to_end(key)
        with self._bases[base_key].activate(key):
            yield self._targets[key][1]

    def clear(self, kind: str = "") -> None:
        """Unload everything on a kind of device (`cuda`, `cpu`), or on all devices."""
        for key in list(self._targets):  # no name may refer to a model when its memory is released
            if self._bases[self._targets[key][0]].base.device.type.startswith(kind):
                self._unload(key)
        release_memory()

    def _load(self, target: str, config: ModelConfig, key: Key, base_key: Key) -> Loaded:
        base_name, folder = locate(target)
        if folder is not None:
            check_base(base_name, f"If it has moved: mole chat {target} --base PATH.")
        named = dataclasses.replace(config, name=base_name)
        required = weight_bytes(named, folder, with_base=base_key not in self._bases)
        self._make_room(pick_device(config.device), required, base_key)
        base = self._bases.get(base_key) or LoadedBase(load_base(named))
        try:
            loaded = base.add(key, folder, target)
        except MoleError:
            # a failed adapter may have changed parts of the base: unload it, so that it is loaded again next time
            for other in [other for other, (own_base, _) in self._targets.items() if own_base == base_key]:
                self._unload(other)
            raise
        self._bases[base_key] = base
        return loaded

    def _make_room(self, device: torch.device, required: int, keep: Key) -> None:
        """Unload the least recently used targets, those of other base models first, until `required` bytes fit."""
        others = [key for key, (base_key, _) in self._targets.items() if base_key != keep]
        same = [key for key, (base_key, _) in self._targets.items() if base_key == keep]
        for key in [*others, *same[:-1]]:  # the last one keeps the base model in memory
            free = self._free(device)
            if free is None or free >= required * HEADROOM:
                return
            self._unload(key)
            release_memory()

    def _unload(self, key: Key) -> None:
        base_key, _ = self._targets.pop(key)
        if all(other != base_key for other, _ in self._targets.values()):
            del self._bases[base_key]
        else:
            self._bases[base_key].remove(key)


def cache_keys(target: str, config: ModelConfig) -> tuple[Key, Key]:
    """The keys of a target and of its base model; a run that was trained again gets another key."""
    base, folder = locate(target)
    device = pick_device(config.device)
    base_key: Key = (base, str(pick_dtype(config.dtype, device)), str(device), config.quantization)
    if folder is None:
        return base_key, base_key
    version = (str(folder), (folder / "adapter_config.json").stat().st_mtime_ns)
    settings = read_adapter_config(folder)
    shares_base = settings.get("peft_type") == our_type() and settings.get("bias", "none") == "none"
    return (*base_key, *version), base_key if shares_base else (*base_key, *version)


def weight_bytes(config: ModelConfig, folder: Path | None, with_base: bool) -> int:
    """Bytes of the weights of a base model and an adapter; 0 for a model that is not on this machine yet."""
    itemsize = pick_dtype(config.dtype, pick_device(config.device)).itemsize
    each = sizes.QUANTISED_BYTES.get(config.quantization, itemsize)
    weights = round(sizes.parameters(sizes.files_of(config.name)) * each) if with_base else 0
    return weights + (sizes.parameters([folder / WEIGHTS]) * 4 if folder else 0)


def release_memory() -> None:
    """Return freed memory to the system and the GPU."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
