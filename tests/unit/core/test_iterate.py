"""A generator over what a function gives in a thread of its own."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable

import pytest

from mole.core.threads import iterate


def test_the_two_take_turns() -> None:
    order: list[str] = []

    def work(give: Callable[[int], None]) -> None:
        for number in range(3):
            order.append(f"make {number}")
            give(number)

    for number in iterate(work, "numbers"):
        order.append(f"use {number}")
    assert order == ["make 0", "use 0", "make 1", "use 1", "make 2", "use 2"]


def test_what_it_raises_is_raised_here_after_what_it_gave() -> None:
    def work(give: Callable[[int], None]) -> None:
        give(1)
        raise ValueError("no more")

    numbers = iterate(work, "numbers")
    assert next(numbers) == 1
    with pytest.raises(ValueError, match="no more"):
        next(numbers)
    assert not [thread for thread in threading.enumerate() if thread.name == "numbers"]


@pytest.mark.parametrize("how", ["close", "throw"])
def test_closing_it_ends_the_thread_and_leaves_its_with_blocks(how: str) -> None:
    left: list[str] = []

    def work(give: Callable[[int], None]) -> None:
        try:
            for number in range(10):
                give(number)
        finally:
            left.append(threading.current_thread().name)

    numbers = iterate(work, "numbers")
    assert [next(numbers), next(numbers)] == [0, 1]
    if how == "close":
        numbers.close()  # type: ignore[attr-defined]
    else:
        with pytest.raises(KeyboardInterrupt):
            numbers.throw(KeyboardInterrupt)  # type: ignore[attr-defined]
    assert left == ["numbers"]
    assert not [thread for thread in threading.enumerate() if thread.name == "numbers"]


def test_it_sees_the_callers_context() -> None:
    variable = contextvars.ContextVar("variable", default="")
    variable.set("here")
    assert list(iterate(lambda give: give(variable.get()), "context")) == ["here"]
