"""Several chat targets in memory at once: a base model is loaded once, adapters of ours share it.

Adapters of other PEFT methods get a base of their own. When memory runs short the target that was used longest ago goes
first. Whoever uses a shelf lets one target answer at a time: the adapters of one base are switched.
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
from mole.core.errors import MoleError
from mole.models import sizes
from mole.models.adapter_files import WEIGHTS, our_type, read_adapter_config
from mole.models.loading import Base, Loaded, attach, load_base, locate, pick_device, pick_dtype

MARGIN = 1.25
"""What must be free, as a multiple of a model's weights: attention caches and buffers need room too."""


@dataclass
class Home:
    """A base model in memory and the PEFT model around it, once it has an adapter."""

    base: Base
    peft: Any = None
    names: dict[tuple[Any, ...], str] = field(default_factory=dict)
    """PEFT's name of each target's adapter; None of them for the base alone."""
    made: int = 0

    def add(self, key: tuple[Any, ...], folder: Path | None, target: str) -> Loaded:
        """Load a target's adapter, if it has one."""
        if folder is None:
            return Loaded(self.base.model, self.base.tokenizer, target, self.base.name)
        self.made += 1
        name = f"adapter{self.made}"
        loaded = attach(self.base, folder, target, onto=self.peft, adapter=name)
        self.peft, self.names[key] = loaded.model, name
        return loaded

    def remove(self, key: tuple[Any, ...]) -> None:
        """Give a target's adapter back."""
        name = self.names.pop(key, None)
        if name and self.names:
            self.peft.delete_adapter(name)
        elif name:  # PEFT wants an adapter as long as there is a PEFT model
            self.base.model, self.peft = self.peft.unload(), None

    def choose(self, key: tuple[Any, ...]) -> AbstractContextManager[Any]:
        """Let this target's adapter act, or none, inside the `with` block."""
        if key in self.names:
            self.peft.set_adapter(self.names[key], inference_mode=True)
            return nullcontext()
        return self.peft.disable_adapter() if self.peft is not None else nullcontext()


class Shelf:
    """The targets in memory, the one used longest ago first.

    Args:
        free: bytes free on a device, None when that cannot be told.
    """

    def __init__(self, free: Callable[[torch.device], int | None] = sizes.free) -> None:
        self._free = free
        self._homes: dict[tuple[Any, ...], Home] = {}
        self._targets: OrderedDict[tuple[Any, ...], tuple[tuple[Any, ...], Loaded]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._targets)

    @property
    def bases(self) -> int:
        """How many base models are in memory."""
        return len(self._homes)

    def holds(self, target: str, config: ModelConfig | None = None) -> bool:
        """Whether the target is in memory, as it is on disk now. Raises `MoleError` when there is no such target."""
        return places_of(target, config or ModelConfig())[0] in self._targets

    def on(self, device: str) -> bool:
        """Whether anything is on a kind of device (`cuda`, `cpu`)."""
        return any(home.base.device.type == device for home in list(self._homes.values()))

    @contextmanager
    def use(self, target: str, config: ModelConfig | None = None) -> Iterator[Loaded]:
        """The target, loaded first where needed, with its adapter the active one inside the `with` block.

        `config` says dtype and device; its name is not looked at. Raises what `mole.models.loading.load_target` raises.
        """
        config = config or ModelConfig()
        key, place = places_of(target, config)
        if key not in self._targets:
            self._targets[key] = (place, self._load(target, config, key, place))
        self._targets.move_to_end(key)
        with self._homes[place].choose(key):
            yield self._targets[key][1]

    def clear(self, device: str = "") -> None:
        """Give back what is on a kind of device (`cuda`, `cpu`), or everything."""
        for key, (place, _) in list(self._targets.items()):
            if self._homes[place].base.device.type.startswith(device):
                self._drop(key)
        empty_caches()

    def _load(self, target: str, config: ModelConfig, key: tuple[Any, ...], place: tuple[Any, ...]) -> Loaded:
        base_name, folder = locate(target)
        named = dataclasses.replace(config, name=base_name)
        home = self._homes.get(place)
        self._make_room(pick_device(config.device), needed(named, folder, with_base=home is None), place)
        home = self._homes.get(place) or Home(load_base(named))
        try:
            loaded = home.add(key, folder, target)
        except MoleError:
            for other in [other for other, (standing, _) in self._targets.items() if standing == place]:
                self._drop(other)  # it may have got halfway into the base, which is loaded afresh next time
            raise
        self._homes[place] = home
        return loaded

    def _make_room(self, device: torch.device, need: int, keep: tuple[Any, ...]) -> None:
        """Drop targets, other bases' first and the one used longest ago first, until `need` bytes are free."""
        others = [key for key, (place, _) in self._targets.items() if place != keep]
        same = [key for key, (place, _) in self._targets.items() if place == keep]
        for key in [*others, *same[:-1]]:
            free = self._free(device)
            if free is None or free >= need * MARGIN:
                return
            self._drop(key)
            empty_caches()

    def _drop(self, key: tuple[Any, ...]) -> None:
        place, _ = self._targets.pop(key)
        self._homes[place].remove(key)
        if all(other != place for other, _ in self._targets.values()):
            del self._homes[place]


def places_of(target: str, config: ModelConfig) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Keys of a target as it is on disk now, and of the base it stands on; a run trained anew has another one."""
    base, folder = locate(target)
    device = pick_device(config.device)
    place: tuple[Any, ...] = (base, str(pick_dtype(config.dtype, device)), str(device))
    if folder is None:
        return place, place
    stamp = (str(folder), (folder / "adapter_config.json").stat().st_mtime_ns)
    ours = read_adapter_config(folder).get("peft_type") == our_type()
    return (*place, *stamp), place if ours else (*place, *stamp)


def needed(config: ModelConfig, folder: Path | None, with_base: bool) -> int:
    """Bytes that the weights of a base model and an adapter take; 0 for what is not on this machine yet."""
    dtype = pick_dtype(config.dtype, pick_device(config.device))
    weights = sizes.parameters(sizes.files_of(config.name)) * dtype.itemsize if with_base else 0
    return weights + (sizes.parameters([folder / WEIGHTS]) * 4 if folder else 0)


def empty_caches() -> None:
    """Give freed memory back to the system and the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
