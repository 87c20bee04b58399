"""The chat models in memory: loaded on first use, switched, unloaded. torch is imported here, inside functions only.

One reply at a time: two streams on one base would take each other's adapter and record each other's routing.
"""

from __future__ import annotations

import importlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from threading import Lock, Thread
from typing import TYPE_CHECKING, Any

from app.services import device_policy
from app.services.routing_records import Reel
from app.services.routing_stream import film, new_reel
from mole.config import ModelConfig
from mole.core.errors import ModelError
from mole.mixture.steering import AS_TRAINED, Steering
from mole.models.loading import IMPORTING, import_ahead

if TYPE_CHECKING:
    from mole.chat.model_cache import ModelCache
    from mole.mixture.trace import Trace

WATCH_SECONDS = 1.0


@dataclass(frozen=True)
class Saying:
    """One moment of a reply.

    Attributes:
        text: the reply so far.
        reel: its routing so far, for the page.
        count: number of its tokens.
        seconds: since the prompt was read.
        finished: whether this is the last moment.
        tokens, trace, prompt: texts of all tokens, the prompt's too; their routing; how many are the prompt's.
        notice: what the person should know about the model, or None.
    """

    text: str
    reel: Reel
    count: int
    seconds: float
    finished: bool
    tokens: list[str]
    trace: Trace | None
    prompt: int
    notice: str | None

    def trace_json(self) -> dict[str, Any] | None:
        """The routing as `mole chat --trace` writes it; None where nothing was recorded."""
        return self.trace.to_dict(self.tokens, self.prompt) if self.trace is not None else None


class Engine:
    """The models in memory, and the turns they take; safe to call from any thread."""

    def __init__(self) -> None:
        # Not an RLock: a reply is a generator whose steps the server runs in any of its threads.
        self._using = Lock()
        self._cache: ModelCache | None = None
        self._watcher: Thread | None = None
        self._insists = False
        """Whether the last reply was to be on the GPU although a run trained there."""

    @property
    def cache(self) -> ModelCache:
        """What is in memory."""
        if self._cache is None:
            with IMPORTING:
                from mole.chat.model_cache import ModelCache

            leave_a_core()
            self._cache = ModelCache()
        return self._cache

    def holds(self, target: str, device: str = "auto") -> bool:
        """Whether the target is in memory, as it is on disk now. Raises `MoleError` when there is no such target."""
        return self.cache.holds(target, ModelConfig(device=device))

    def unload(self) -> None:
        """Give the memory back, once the reply that is being written is done."""
        with self._using:
            if self._cache is not None:
                self._cache.clear()

    def warm_up(self) -> None:
        """Import what a first reply needs, in the background, while the message is being typed."""

        def import_it() -> None:
            with IMPORTING:
                importlib.import_module("mole.chat.generate")
                import_ahead()

        if "mole.chat.generate" not in sys.modules:
            Thread(target=import_it, name="warm-up", daemon=True).start()

    def say(
        self,
        target: str,
        messages: list[dict[str, str]],
        settings: dict[str, Any],
        should_stop: Callable[[], bool] = lambda: False,
        *,
        steering: Steering = AS_TRAINED,
        against: str | None = None,
        device: str = "auto",
    ) -> Iterator[Saying]:
        """Answer a conversation, a `Saying` a token; none at all when stopped before its turn.

        Args:
            target: what answers, see `mole.models.runs.locate`.
            messages: the conversation.
            settings: those of `mole.chat.generate.ChatSettings`.
            should_stop: asked before every token; true ends the reply.
            steering: what is different in the routing of this reply.
            against: id of an earlier reel to show the difference from.
            device: as in `model.device`.

        Raises `MoleError`: what is wrong with the target, the settings or the conversation, or too little memory.
        """
        while not self._using.acquire(timeout=0.2):
            if should_stop():
                return
        try:
            self._insists = device == "auto" and bool(device_policy.training_on(device_policy.device()))
            yield from self._say(target, messages, settings, should_stop, steering, against, device)
        except RuntimeError as error:
            if "out of memory" not in str(error).lower():
                raise
            self.cache.clear()
            raise ModelError(
                "There is not enough memory for this reply. Shorten the conversation, compare fewer models, or wait "
                "until a run that trains has ended."
            ) from None
        finally:
            self._using.release()

    def _say(
        self, target: str, messages: list[dict[str, str]], settings: dict[str, Any], should_stop: Callable[[], bool],
        steering: Steering, against: str | None, device: str,
    ) -> Iterator[Saying]:  # fmt: skip
        with IMPORTING:
            from mole.chat.generate import ChatSettings, stream
            from mole.mixture.aot_compile import prepare

        chosen = ChatSettings(**settings)
        with self.cache.use(target, ModelConfig(device=device)) as loaded:
            if loaded.model.device.type == "cuda":
                self._watch()
            reel: Reel | None = None
            tokens: list[str] = []
            begun = time.monotonic()
            for step in stream(loaded, messages, chosen, should_stop=should_stop, steering=steering):
                tokens += [text for _, text in step.tokens]
                if reel is None:
                    reel, begun = new_reel(loaded, step, steering, against), time.monotonic()
                film(reel, step)
                reel.meta["finished"] = step.finished
                count, seconds = max(len(tokens) - step.prompt_tokens, 0), time.monotonic() - begun
                yield Saying(
                    step.text, reel, count, seconds, step.finished, tokens, step.trace, step.prompt_tokens,
                    loaded.notice,
                )  # fmt: skip
            prepare(loaded.model)

    def _watch(self) -> None:
        """Give a GPU's memory back as soon as a run begins to train there, whether or not anybody chats then."""
        if self._watcher is None or not self._watcher.is_alive():
            self._watcher = Thread(target=self._yield_gpu, name="yield-gpu", daemon=True)
            self._watcher.start()

    def _yield_gpu(self) -> None:
        while self.cache.uses_device("cuda"):
            time.sleep(WATCH_SECONDS)
            if (
                not self._insists
                and device_policy.training_on(device_policy.device())
                and self._using.acquire(blocking=False)
            ):
                try:
                    self.cache.clear("cuda")
                finally:
                    self._using.release()


def leave_a_core() -> None:
    """Leave the page a core of its own, unless the person chose how many threads there are (`OMP_NUM_THREADS`).

    torch's threads wait for each other by spinning: one that has to wait for the page holds up all, and on two cores
    a reply takes twice as long.
    """
    import torch

    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(min(torch.get_num_threads(), max((os.cpu_count() or 2) - 1, 1)))


ENGINE = Engine()


class Stops:
    """Which replies go on: of each browser session the one that was begun last, until somebody asks to stop it."""

    def __init__(self) -> None:
        self._current: dict[str, object] = {}
        self._lock = Lock()

    def begin(self, session: str) -> Callable[[], bool]:
        """Begin a reply, which ends the session's former one; gives what tells whether to stop."""
        mine = object()
        with self._lock:
            self._current[session] = mine
        return lambda: self._current.get(session) is not mine

    def ask(self, session: str) -> None:
        """End the session's reply after the token it is at."""
        with self._lock:
            self._current.pop(session, None)


STOPS = Stops()
