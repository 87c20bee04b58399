"""Replies on a Space with ZeroGPU: each in a call that gets a GPU, with the models that were put there at the start.

Loading it imports no torch.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from contextvars import copy_context
from queue import Empty, SimpleQueue
from threading import Event, Thread
from typing import TYPE_CHECKING, Any

import gradio as gr

from app.services.zerogpu import gpu
from mole.chat.messages import STOP, ReplyJob
from mole.config import ModelConfig
from mole.core.child import DONE, Failed
from mole.core.errors import ModelError, MoleError
from mole.core.threads import iterate

if TYPE_CHECKING:
    from mole.chat.process import ReplyGenerator

START_SECONDS = 10.0
"""Of a call: until the first token is there."""
SECONDS_PER_TOKEN = 0.05
LOADING_SECONDS = 30.0
"""More for a target that is not there from the start: its call loads it."""

MODELS: list[ReplyGenerator] = []
"""The one generator, with the models that were loaded at the start."""
LOADED: set[str] = set()
"""The targets among them."""


def load_models(targets: Sequence[str]) -> None:
    """Put the models that most visitors chat with on the GPU: in the main thread, before the page is served.

    What cannot be loaded is told in the log, and to the visitor who asks for it.
    """
    from mole.chat.process import ReplyGenerator
    from mole.models.loading import import_ahead

    import_ahead()
    MODELS[:] = [ReplyGenerator(own_process=False)]
    for target in targets:
        try:
            with MODELS[0].cache.use(target, ModelConfig()):
                LOADED.add(target)
        except MoleError as error:
            print(f"{target} is not loaded: {error}", flush=True)


def seconds_of(job: ReplyJob) -> float:
    """How long the call for a reply may take."""
    loading = 0.0 if job.target in LOADED else LOADING_SECONDS
    return START_SECONDS + loading + SECONDS_PER_TOKEN * job.settings.get("max_new_tokens", 0)


class Yielded:
    """Receives a reply in the fork: what it is sent is what the call yields."""

    def __init__(self, give: Callable[[Any], None]) -> None:
        self.send = give

    def poll(self) -> bool:
        """Never: whoever wants no more closes the generator."""
        return False


@gpu(seconds_of)
def generate(job: ReplyJob) -> Iterator[Any]:
    """The messages of `ReplyGenerator.answer`, and a `Failed` for an error."""
    import torch

    torch.set_num_threads(1)  # the threads that the forked process had are gone, and waiting for them would be for ever
    try:
        yield from iterate(lambda give: MODELS[0].answer(job, Yielded(give)), "reply")
    except Exception as error:
        yield Failed(error)


class GpuCall:
    """The call for one reply, as `Engine` talks to its process. The visitor in whose handler it is sent pays for it.

    The call goes on in a thread of its own: waiting for a GPU, or for a model, need not hold up who wants to stop.
    """

    def __init__(self) -> None:
        self._received: SimpleQueue[Any] = SimpleQueue()
        self._unwanted = Event()

    def start(self) -> None:
        """Nothing: the platform starts it."""

    def send(self, message: Any) -> None:
        """Begin with a `ReplyJob`; `STOP` ends it at its next message."""
        if message == STOP:
            self._unwanted.set()
        else:
            run = copy_context().run  # with the visitor's request
            Thread(target=run, args=(self._call, message), name="gpu-call", daemon=True).start()

    def receive(self, seconds: float) -> Any:
        """The next message; None for none in time."""
        try:
            return self._received.get(timeout=seconds)
        except Empty:
            return None

    def kill(self) -> None:
        """End the call at its next message; the platform ends it when its time is up."""
        self._unwanted.set()

    def _call(self, job: ReplyJob) -> None:
        last: Any = DONE
        try:
            with closing(generate(job)) as messages:  # type: ignore[type-var]
                for message in messages:
                    self._received.put(message)
                    if self._unwanted.is_set():
                        break
        except gr.Error as error:
            last = Failed(ModelError(refusal(error, seconds_of(job))))
        except Exception as error:
            last = Failed(error)
        self._received.put(last)


def refusal(error: gr.Error, seconds: float) -> str:
    """Why `spaces` gave no GPU, or took it away, on one line without markup."""
    if "aborted" in str(error.message):
        return (
            f"The GPU was taken away before the reply was complete: it took more than {seconds:.0f} s, or too much "
            "memory. Ask for fewer new tokens."
        )
    text = " ".join(re.sub(r"<[^>]*>", " ", str(error.message)).split())
    return f"{error.title}: {text}" if error.title and error.title != "Error" else text
