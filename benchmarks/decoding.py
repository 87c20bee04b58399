"""Decoding beside the bare base: tokens a second of one reply, greedy, with a cache.

The goal is to be better than an unmerged LoRA of equal size; the recorder may cost one in twenty.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from common import DTYPES, EQUAL, ROUTERS, Figure, awake, base, in_turns, main, ratio, with_experts, with_lora

from mole import record_routing

PROMPT = 32


def decode(model: Any, ids: torch.Tensor, tokens: int, recorded: bool = False) -> Callable[[], float]:
    """So many tokens after a prompt, which is not counted."""
    model.eval()

    def run() -> float:
        with torch.inference_mode(), record_routing(model) if recorded else nullcontext():
            out = model(input_ids=ids, use_cache=True)
            token = out.logits[:, -1:].argmax(-1)
            begun = time.perf_counter()
            for _ in range(tokens):
                out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
                token = out.logits[:, -1:].argmax(-1)
            return time.perf_counter() - begun

    return run


def measure(options: argparse.Namespace) -> Iterator[Figure]:
    """PEFT's LoRA and each router beside the base, by turns, so that a few replies lie between what is compared."""
    dtype, ids = DTYPES[options.dtype], torch.randint(0, 49_000, (1, PROMPT))
    bare = decode(base(dtype, options.layers), ids, options.tokens)

    def speed(seconds: list[float]) -> str:
        return f"{options.tokens / statistics.median(seconds):.1f} tokens/s"

    for rank in (8, EQUAL):
        lora = decode(awake(with_lora(base(dtype, options.layers), rank)), ids, options.tokens)
        seconds = in_turns({"base": bare, "lora": lora}, options.rounds)
        about = f"{speed(seconds['lora'])}, base {speed(seconds['base'])}"
        yield ratio(f"PEFT LoRA r {rank}, unmerged / base", seconds["base"], seconds["lora"], about=about)
    for router in options.routers.split(","):
        model = awake(with_experts(base(dtype, options.layers), router))
        silent = decode(model, ids, options.tokens)
        recorded = decode(model, ids, options.tokens, recorded=True)
        seconds = in_turns({"base": bare, "silent": silent, "recorded": recorded}, options.rounds)
        about = f"{speed(seconds['silent'])}, base {speed(seconds['base'])}"
        yield ratio(f"{router} / base", seconds["base"], seconds["silent"], ">= 0.65", about)
        about = speed(seconds["recorded"])
        yield ratio(f"{router}, recorded / not", seconds["silent"], seconds["recorded"], ">= 0.95", about)


if __name__ == "__main__":
    main(__doc__ or "", measure, routers=",".join(ROUTERS), dtype="float32", layers=30, tokens=8, rounds=5)
