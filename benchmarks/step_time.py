"""A training step beside one of PEFT's LoRA with as many parameters.

Forward with labels and the routers' losses, and backward, of SmolLM2-135M with adapters on all seven projections.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from common import DTYPES, EQUAL, ROUTERS, Figure, awake, base, in_turns, main, ratio, with_experts, with_lora

GOALS = {"float32": "<= 1.00", "bfloat16": "<= 1.05"}


def text_loss(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The loss over all tokens, the routers' own in it."""
    return model(input_ids=ids, attention_mask=mask, labels=ids).loss


def step(model: Any, ids: torch.Tensor, loss: Callable[..., torch.Tensor] = text_loss) -> Callable[[], float]:
    """A step's forward and backward; the optimizer's part is the same for the same parameters."""
    model.train()
    mask = torch.ones_like(ids)

    def run() -> float:
        for parameter in model.parameters():
            parameter.grad = None
        begun = time.perf_counter()
        loss(model, ids, mask).backward()
        return time.perf_counter() - begun

    return run


def measure(options: argparse.Namespace) -> Iterator[Figure]:
    """Each router and LoRA by turns, so that no more than a step lies between what is compared."""
    dtype, layers = DTYPES[options.dtype], options.layers
    ids = torch.randint(0, 49_000, (4, options.length))
    lora = step(awake(with_lora(base(dtype, layers))), ids)
    for router in options.routers.split(","):
        mixture = step(awake(with_experts(base(dtype, layers), router)), ids)
        seconds = in_turns({"ours": mixture, "lora": lora}, options.rounds)
        here, there = (statistics.median(seconds[name]) for name in ("ours", "lora"))
        about = f"{here:.3f} s, LoRA r {EQUAL} {there:.3f} s"
        yield ratio(f"{router}, {options.dtype}", seconds["ours"], seconds["lora"], GOALS[options.dtype], about)


if __name__ == "__main__":
    main(__doc__ or "", measure, routers=",".join(ROUTERS), dtype="float32", layers=10, length=128, rounds=6)
