"""The one chat model in memory: loaded on first use, switched, unloaded. torch is imported here, inside functions only.

One reply at a time: two streams on one model would record each other's routing.
"""

from __future__ import annotations

import gc
import importlib
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from threading import Lock, Thread
from typing import TYPE_CHECKING, Any

from app.routing_view import REELS, Reel
from mole.config import AdapterConfig

if TYPE_CHECKING:
    from mole.chat import Step
    from mole.models import Loaded

NO_ROUTING = "This is the base model without an adapter: it has no experts, so there is no routing to show."
ONE_EXPERT = "This adapter is plain LoRA: one expert a layer, always used, so there is no routing to show."
NOT_OURS = "This adapter has no router, so there is no routing to show."


@dataclass(frozen=True)
class Saying:
    """One moment of a reply: its text and reel so far, the number of its tokens, and the seconds since the prompt."""

    text: str
    reel: Reel
    count: int
    seconds: float
    finished: bool


class Engine:
    """Holds at most one loaded target; safe to call from any thread."""

    def __init__(self) -> None:
        # Not an RLock: a reply is a generator whose steps the server runs in any of its threads.
        self._using = Lock()
        self._loaded: Loaded | None = None
        self._key: tuple[Any, ...] | None = None

    def holds(self, target: str) -> bool:
        """Whether the target is in memory, as it is on disk now. Raises `MoleError` when there is no such target."""
        return self._key == key_of(target)

    def unload(self) -> None:
        """Give the memory back, once the reply that is being written is done."""
        with self._using:
            self._unload()

    def warm_up(self) -> None:
        """Import what a first reply needs, in the background, while the message is being typed."""
        if "mole.chat" not in sys.modules:
            Thread(target=importlib.import_module, args=("mole.chat",), name="warm-up", daemon=True).start()

    def _unload(self) -> None:
        self._loaded = self._key = None
        gc.collect()
        torch = sys.modules.get("torch")  # never the first to import it
        if torch is not None and torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _load(self, target: str) -> Loaded:
        """The loaded target; what was there before is given back first."""
        key = key_of(target)
        if self._loaded is None or self._key != key:
            self._unload()
            from mole.models import load_target

            self._loaded = load_target(target)
            self._key = key
        return self._loaded

    def say(
        self, target: str, messages: list[dict[str, str]], settings: dict[str, Any], should_stop: Callable[[], bool]
    ) -> Iterator[Saying]:
        """Answer a conversation, a `Saying` a token; `settings` are those of `mole.chat.ChatSettings`.

        Raises `MoleError`: what is wrong with the target, the settings or the conversation.
        """
        with self._using:
            from mole.chat import ChatSettings, stream

            loaded = self._load(target)
            reel: Reel | None = None
            begun, count = time.monotonic(), 0
            for step in stream(loaded, messages, ChatSettings(**settings), should_stop=should_stop):
                if reel is None:
                    reel, begun = new_reel(loaded, step), time.monotonic()
                else:
                    count += len(step.tokens)
                film(reel, step)
                reel.meta["finished"] = step.finished
                yield Saying(step.text, reel, count, time.monotonic() - begun, step.finished)


def key_of(target: str) -> tuple[Any, ...]:
    """What a target stands for on disk now; a run trained anew under the same name has another key."""
    from mole.models import locate

    base, folder = locate(target)
    stamp = (folder / "adapter_config.json").stat().st_mtime_ns if folder else 0
    return base, folder, stamp


def new_reel(loaded: Loaded, step: Step) -> Reel:
    """An empty reel for a reply of this model."""
    layers, experts = (step.trace.layers, step.trace.experts) if step.trace else (0, 0)
    meta: dict[str, Any] = {"prompt": step.prompt_tokens, "router": loaded.router, "about": about(loaded)}
    if experts < 2:
        note = NO_ROUTING if loaded.adapter_dir is None else ONE_EXPERT if loaded.router == "lora" else NOT_OURS
        return REELS.new(note=note, **meta)
    counts, threshold = shape(loaded.adapter_dir, layers, experts)
    meta["about"] += f" · {experts} experts · {layers} layers"
    return REELS.new(layers=layers, experts=experts, counts=counts, threshold=threshold, **meta)


def about(loaded: Loaded) -> str:
    """A loaded target in a few words."""
    base = Path(loaded.base).name
    return f"{base}, base model" if loaded.adapter_dir is None else f"{loaded.router} on {base}"


def shape(folder: Path | None, layers: int, experts: int) -> tuple[list[int], float | None]:
    """Experts by layer, and the entropy threshold where the method has one, as the adapter's own config says."""
    from mole.models import read_adapter_config

    values = read_adapter_config(folder) if folder else {}
    allocation = AdapterConfig(num_experts=values.get("num_experts", experts))
    threshold = values.get("entropy_threshold") if values.get("router") == "dynmole" else None
    return [allocation.experts_at(layer, layers) for layer in range(layers)], threshold


def film(reel: Reel, step: Step) -> None:
    """Add a step's tokens and routing to the reel, as bytes."""
    experts = reel.meta["experts"]
    if step.routing is None or not experts or not step.tokens:
        return

    import torch

    def bytes_of(values: torch.Tensor) -> bytes:
        return values.clamp(0, 1).mul(255).round().to(torch.uint8).numpy().tobytes()

    delta = step.routing
    texts = [text for _, text in step.tokens]
    reel.extend(texts, bytes_of(delta.weights), bytes_of(delta.entropy), bytes_of(delta.active / experts))


ENGINE = Engine()


class Stops:
    """Which conversations were asked to stop, by the browser session they belong to."""

    def __init__(self) -> None:
        self._asked: set[str] = set()
        self._lock = Lock()

    def ask(self, session: str) -> None:
        with self._lock:
            self._asked.add(session)

    def clear(self, session: str) -> None:
        with self._lock:
            self._asked.discard(session)

    def asked(self, session: str) -> bool:
        with self._lock:
            return session in self._asked


STOPS = Stops()
