"""Functions that get a GPU for a call, on a Hugging Face Space with ZeroGPU. No torch.

There the package `spaces` shows this process a GPU that is not there: what is put on `cuda` in the main thread before
the page is served waits on the disk. Each call of a decorated function gets a fork of this process with a real GPU and
those weights on it. It ends with the call: what it loads or changes is gone, but for what it returns or yields.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar

from mole.core.gpus import on_zerogpu

Function = TypeVar("Function", bound=Callable[..., Any])
LONGEST = 120
"""Seconds of a call at most: as many as ZeroGPU gives an anonymous visitor a day."""


def gpu(duration: Callable[..., float]) -> Callable[[Function], Function]:
    """A decorator that gives a function, or a generator, a GPU for each call; elsewhere it returns the function itself.

    Arguments and results are pickled. The visitor whose request is handled in the caller's context pays for the call.
    Closing a generator ends the call at its next value. When there is no GPU to be had, it raises `gradio.Error`.

    Args:
        duration: called with the function's arguments; the seconds that the call may take, at most `LONGEST` of which
            are asked for. Shorter calls are let in earlier.
    """
    if not on_zerogpu():
        return lambda function: function
    import spaces

    def seconds(*given: Any) -> int:
        return min(LONGEST, math.ceil(duration(*given)))

    decorator: Callable[[Function], Function] = spaces.GPU(duration=seconds)
    return decorator
