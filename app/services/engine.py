"""The chat's models in a process of their own: asked for replies, ended when it hangs or its memory is needed.

One reply at a time: two streams on one base model would switch each other's adapter and record each other's routing.
On a Space with ZeroGPU each reply has a process for itself (`app.services.gpu_replies`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from threading import Lock, Thread
from typing import Any, Protocol

from app.services import device_policy
from app.services.gpu_replies import GpuCall
from app.services.routing_stream import ROUTING_RECORDS, RoutingRecord
from mole.chat.messages import STOP, Opened, Part, ReplyJob, Stage
from mole.core.child import DONE, Child, ChildExited, Failed
from mole.core.errors import ModelError
from mole.core.gpus import on_zerogpu
from mole.mixture.steering import AS_TRAINED, Steering

WATCH_SECONDS = 1.0
POLL_SECONDS = 0.1
"""Between two looks at whether a reply is to be stopped."""
LIMITS = {Stage.STARTING: 300.0, Stage.LOADING: 3600.0, Stage.ENCODING: 30.0, Stage.GENERATING: 600.0}
"""Seconds without a message, by stage: a model may have to be downloaded, and a long prompt to be read."""
STOP_LIMITS = {Stage.STARTING: 60.0, Stage.LOADING: 10.0, Stage.ENCODING: 2.0, Stage.GENERATING: 60.0}
"""The same for a reply that is to stop. Then the process is ended, and the models it has are loaded again."""
HANGS = {
    Stage.STARTING: "The process of the model does not start",
    Stage.LOADING: "The model takes too long to load",
    Stage.ENCODING: "The model's chat template or tokenizer does not come to an end with this conversation",
    Stage.GENERATING: "The model takes too long for a step",
}


@dataclass(frozen=True)
class PartialReply:
    """A reply as far as it is generated.

    Attributes:
        text: the reply so far.
        record: its routing so far, for the page.
        count: number of its tokens.
        seconds: since the prompt was read.
        finished: whether this is the last part.
        notice: what the person should know about the model, or None.
        trace: the routing as `mole chat --trace` writes it, in the last part if asked for; else None.
    """

    text: str
    record: RoutingRecord
    count: int
    seconds: float
    finished: bool
    notice: str | None
    trace: dict[str, Any] | None


class Transport(Protocol):
    """What brings a `ReplyJob` to the models and their messages back: a `Child`, or a `GpuCall`."""

    def start(self) -> None:
        """Be ready for a job soon."""

    def send(self, message: Any) -> None:
        """Send a job, or `STOP`. Raises `ChildExited`."""

    def receive(self, seconds: float) -> Any:
        """The next message, of which `DONE` or a `Failed` is the last; None for none in time. Raises `ChildExited`."""

    def kill(self) -> None:
        """Give up what is being done."""


class Engine:
    """The process of the chat's models, and whose turn it is to use it; safe to call from any thread.

    Args:
        connect: makes a transport for one reply, which then need not wait for others; without it they share a process.
    """

    def __init__(self, connect: Callable[[], Transport] | None = None) -> None:
        self._connect = connect
        # Not an RLock: a reply is a generator, and the server runs its steps in different threads.
        self._in_use = Lock()
        self._child = Child("mole.chat.process")
        self._watcher: Thread | None = None
        self._gpu_insisted = False
        """Whether the last reply was to be computed on the GPU although a run trains there."""

    def warm_up(self) -> None:
        """Start the process, which imports what a first reply needs while the message is being typed."""
        if self._connect is None:
            self._child.start()

    def unload(self) -> None:
        """Release the memory of all models, once the reply being generated is complete."""
        with self._in_use:
            self._child.kill()

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
        with_trace: bool = False,
    ) -> Iterator[PartialReply | Stage]:
        """Generate the reply to a conversation: its stages as they begin, then one `PartialReply` per token.

        When it is stopped before its turn there is nothing.

        Args:
            target: what answers, see `mole.runs.targets.locate`.
            messages: the conversation, each with `role` and `content`.
            settings: those of `mole.chat.ChatSettings`, by name.
            should_stop: asked all the time; returning true ends the reply.
            steering: routing overrides for this reply.
            against: id of an earlier routing record to show the difference from.
            device: as in `model.device`.
            with_trace: whether the last part has the whole routing.

        Raises `MoleError`: what is wrong with the target, the settings or the conversation, too little memory, or a
        model that does not come to an end.
        """
        with self._turn(should_stop) as transport:
            if transport is None:
                return
            self._gpu_insisted = device == "auto" and bool(device_policy.competing_run())
            job = ReplyJob(target, messages, settings, steering.to_dict(), device, with_trace)
            with closing(self._messages(transport, job, should_stop)) as received:  # before the next one's turn
                yield from self._parts(received, against)

    @contextmanager
    def _turn(self, should_stop: Callable[[], bool]) -> Iterator[Transport | None]:
        """What the reply is sent through, once it is its turn; None when it is stopped before."""
        if self._connect is not None:
            yield self._connect()
            return
        while not self._in_use.acquire(timeout=0.2):
            if should_stop():
                yield None
                return
        try:
            yield self._child
        finally:
            self._in_use.release()

    def _parts(self, messages: Iterable[Any], against: str | None) -> Iterator[PartialReply | Stage]:
        """The reply from the process's messages; its record grows with them."""
        opened: Opened | None = None
        record, read = RoutingRecord({}), 0
        for message in messages:
            if isinstance(message, Stage):
                yield message
            elif isinstance(message, Opened):
                opened, record = message, ROUTING_RECORDS.new(**message.routing, against=against)
                if opened.on_gpu and self._connect is None:
                    self._watch_gpu()
            elif isinstance(message, Part) and opened is not None:
                read += message.tokens
                if message.routing:
                    record.extend(**message.routing)
                    ROUTING_RECORDS.trim()
                record.meta["finished"] = message.finished
                count = max(read - opened.prompt_tokens, 0)
                yield PartialReply(
                    message.text, record, count, message.seconds, message.finished, opened.notice, message.trace
                )

    def _messages(
        self, transport: Transport, job: ReplyJob, should_stop: Callable[[], bool]
    ) -> Generator[Any, None, None]:
        """The process's messages about a reply. However this ends, the process is ready for the next one, or gone."""
        stage, stopping, ended, expired = Stage.STARTING, False, False, False
        try:
            transport.start()
            transport.send(job)
            heard = time.monotonic()
            while not ended:
                if not stopping and should_stop():
                    transport.send(STOP)
                    stopping, heard = True, time.monotonic()
                message = transport.receive(POLL_SECONDS)
                if message is None:
                    expired = time.monotonic() > heard + (STOP_LIMITS if stopping else LIMITS)[stage]
                    if expired and not stopping:
                        raise ModelError(f"{HANGS[stage]} ({LIMITS[stage]:.0f} s). Choose another model.")
                    if expired:
                        return
                    continue
                stage = message if isinstance(message, Stage) else stage
                ended = message == DONE or isinstance(message, Failed)
                if isinstance(message, Failed):
                    raise message.error
                yield message
                heard = heard if stopping else time.monotonic()
        except ChildExited as error:
            raise ModelError(f"The model had to be given up: {error}. The next reply starts it again.") from None
        finally:
            if not ended:
                end_reply(transport, 0 if expired else STOP_LIMITS[stage])

    def _watch_gpu(self) -> None:
        """Release the GPU's memory as soon as a run starts to train there, even while no one chats."""
        if self._watcher is None or not self._watcher.is_alive():
            self._watcher = Thread(target=self._yield_gpu, name="yield-gpu", daemon=True)
            self._watcher.start()

    def _yield_gpu(self) -> None:
        while self._child.alive:
            time.sleep(WATCH_SECONDS)
            if not self._gpu_insisted and device_policy.competing_run() and self._in_use.acquire(blocking=False):
                try:
                    self._child.kill()
                finally:
                    self._in_use.release()


def end_reply(transport: Transport, patience: float) -> None:
    """End the reply that is still generated, and the process if that takes more than `patience` seconds."""
    end = time.monotonic() + patience
    try:
        transport.send(STOP)
        while time.monotonic() < end:
            message = transport.receive(POLL_SECONDS)
            if message == DONE or isinstance(message, Failed):
                return
    except ChildExited:
        pass
    transport.kill()


ENGINE = Engine(GpuCall if on_zerogpu() else None)


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
