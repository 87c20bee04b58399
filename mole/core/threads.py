"""A generator over what a function gives while it works in a thread of its own."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable, Iterator
from queue import SimpleQueue
from typing import Any, TypeVar

_T = TypeVar("_T")


class Abandoned(Exception):
    """Raised where a function gives something that nobody wants any more."""


def iterate(work: Callable[[Callable[[_T], None]], None], name: str) -> Iterator[_T]:
    """Call `work(give)` in a new thread, and yield what it gives.

    `give` returns when the next value is asked for, so that the two never run at once. When the generator is closed,
    `give` raises `Abandoned`, and closing waits until the thread has ended. What `work` raises is raised here.

    Args:
        work: the function; it sees the caller's context variables.
        name: of the thread.
    """
    given: SimpleQueue[tuple[str, Any]] = SimpleQueue()
    wanted: SimpleQueue[bool] = SimpleQueue()

    def give(value: _T) -> None:
        given.put(("value", value))
        if not wanted.get():
            raise Abandoned

    def run() -> None:
        try:
            work(give)
            given.put(("end", None))
        except Abandoned:
            pass
        except BaseException as error:
            given.put(("error", error))

    thread = threading.Thread(target=contextvars.copy_context().run, args=(run,), name=name, daemon=True)
    thread.start()
    try:
        while True:
            kind, value = given.get()
            if kind == "error":
                raise value
            if kind == "end":
                return
            yield value
            wanted.put(True)
    finally:
        wanted.put(False)
        thread.join()
