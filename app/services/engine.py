"""The chat models in memory: loaded on first use, switched, unloaded. torch is imported inside functions only.

One reply at a time: two streams on one base model would switch each other's adapter and record each other's routing.
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
from app.services.routing_stream import RoutingRecord, append_step, open_record
from mole.config import ModelConfig
from mole.core.errors import ModelError
from mole.mixture.steering import AS_TRAINED, Steering
from mole.models.loading import IMPORTING, import_ahead

if TYPE_CHECKING:
    from mole.chat.model_cache import ModelCache
    from mole.mixture.trace import Trace

WATCH_SECONDS = 1.0


@dataclass(frozen=True)
class PartialReply:
    """A reply as far as it is generated.

    Attributes:
        text: the reply so far.
        record: its routing so far, for the page.
        count: number of its tokens.
        seconds: since the prompt was read.
        finished: whether this is the last part.
        tokens: texts of all tokens, the prompt's too.
        trace: the routing of `tokens`; None if not recorded.
        prompt_tokens: number of the prompt's tokens.
        notice: what the person should know about the model, or None.
    """

    text: str
    record: RoutingRecord
    count: int
    seconds: float
    finished: bool
    tokens: list[str]
    trace: Trace | None
    prompt_tokens: int
    notice: str | None

    def trace_json(self) -> dict[str, Any] | None:
        """The routing as `mole chat --trace` writes it; None if not recorded."""
        return self.trace.to_dict(self.tokens, self.prompt_tokens) if self.trace is not None else None


class Engine:
    """The chat models in memory, and whose turn it is to use them; safe to call from any thread."""

    def __init__(self) -> None:
        # Not an RLock: a reply is a generator, and the server runs its steps in different threads.
        self._in_use = Lock()
        self._cache: ModelCache | None = None
        self._watcher: Thread | None = None
        self._gpu_insisted = False
        """Whether the last reply was to be computed on the GPU although a run trains there."""

    @property
    def cache(self) -> ModelCache:
        """The models in memory."""
        if self._cache is None:
            with IMPORTING:
                from mole.chat.model_cache import ModelCache

            leave_a_core()
            self._cache = ModelCache()
        return self._cache

    def holds(self, target: str, device: str = "auto") -> bool:
        """Whether the target is in memory in its current version. Raises `MoleError` if it does not exist."""
        return self.cache.holds(target, ModelConfig(device=device))

    def unload(self) -> None:
        """Release the memory of all models, once the reply being generated is complete."""
        with self._in_use:
            if self._cache is not None:
                self._cache.clear()

    def warm_up(self) -> None:
        """Import what a first reply needs, in the background, while the message is being typed."""

        def import_libraries() -> None:
            with IMPORTING:
                importlib.import_module("mole.chat.generate")
                import_ahead()

        if "mole.chat.generate" not in sys.modules:
            Thread(target=import_libraries, name="warm-up", daemon=True).start()

    def reply(
        self,
        target: str,
        messages: list[dict[str, str]],
        settings: dict[str, Any],
        should_stop: Callable[[], bool] = lambda: False,
        *,
        steering: Steering = AS_TRAINED,
        against: str | None = None,
        device: str = "auto",
    ) -> Iterator[PartialReply]:
        """Generate the reply to a conversation, one `PartialReply` per token; none when stopped before its turn.

        Args:
            target: what answers, see `mole.runs.targets.locate`.
            messages: the conversation, each with `role` and `content`.
            settings: those of `mole.chat.generate.ChatSettings`.
            should_stop: called before every token; returning true ends the reply.
            steering: routing overrides for this reply.
            against: id of an earlier routing record to show the difference from.
            device: as in `model.device`.

        Raises `MoleError`: what is wrong with the target, the settings or the conversation, or too little memory.
        """
        while not self._in_use.acquire(timeout=0.2):
            if should_stop():
                return
        try:
            self._gpu_insisted = device == "auto" and bool(device_policy.competing_run())
            yield from self._generate(target, messages, settings, should_stop, steering, against, device)
        except RuntimeError as error:
            if "out of memory" not in str(error).lower():
                raise
            self.cache.clear()
            raise ModelError(
                "There is not enough memory for this reply. Shorten the conversation, compare fewer models, or wait "
                "until a run that trains has ended."
            ) from None
        finally:
            self._in_use.release()

    def _generate(
        self, target: str, messages: list[dict[str, str]], settings: dict[str, Any], should_stop: Callable[[], bool],
        steering: Steering, against: str | None, device: str,
    ) -> Iterator[PartialReply]:  # fmt: skip
        with IMPORTING:
            from mole.chat.generate import ChatSettings, stream
            from mole.mixture.aot_compile import prepare_kernels

        chat_settings = ChatSettings(**settings)
        with self.cache.use(target, ModelConfig(device=device)) as loaded:
            if loaded.model.device.type == "cuda":
                self._watch_gpu()
            record: RoutingRecord | None = None
            tokens: list[str] = []
            started = time.monotonic()
            for step in stream(loaded, messages, chat_settings, should_stop=should_stop, steering=steering):
                tokens += [text for _, text in step.tokens]
                if record is None:
                    record, started = open_record(loaded, step, steering, against), time.monotonic()
                append_step(record, step)
                record.meta["finished"] = step.finished
                count, seconds = max(len(tokens) - step.prompt_tokens, 0), time.monotonic() - started
                yield PartialReply(
                    step.text, record, count, seconds, step.finished, tokens, step.trace, step.prompt_tokens,
                    loaded.notice,
                )  # fmt: skip
            prepare_kernels(loaded.model)

    def _watch_gpu(self) -> None:
        """Release the GPU's memory as soon as a run starts to train there, even while no one chats."""
        if self._watcher is None or not self._watcher.is_alive():
            self._watcher = Thread(target=self._yield_gpu, name="yield-gpu", daemon=True)
            self._watcher.start()

    def _yield_gpu(self) -> None:
        while self.cache.uses_device("cuda"):
            time.sleep(WATCH_SECONDS)
            if not self._gpu_insisted and device_policy.competing_run() and self._in_use.acquire(blocking=False):
                try:
                    self.cache.clear("cuda")
                finally:
                    self._in_use.release()


def leave_a_core() -> None:
    """Leave one CPU core to the page, unless the person set the number of threads (`OMP_NUM_THREADS`).

    torch's threads wait for each other by spinning: one that has to wait for the page holds up all of them, and on two
    cores a reply takes twice as long.
    """
    import torch

    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(min(torch.get_num_threads(), max((os.cpu_count() or 2) - 1, 1)))


ENGINE = Engine()


class ActiveReplies:
    """The reply that each browser session is waiting for: the one started last, until the person stops it."""

    def __init__(self) -> None:
        self._current: dict[str, object] = {}
        self._lock = Lock()

    def start(self, session: str) -> Callable[[], bool]:
        """Start a reply, which ends the session's previous one; returns a function that tells whether to stop."""
        this_reply = object()
        with self._lock:
            self._current[session] = this_reply
        return lambda: self._current.get(session) is not this_reply

    def stop(self, session: str) -> None:
        """End the session's reply after its current token."""
        with self._lock:
            self._current.pop(session, None)


ACTIVE_REPLIES = ActiveReplies()
