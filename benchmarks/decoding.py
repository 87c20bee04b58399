"""Decoding beside the bare base: tokens a second of one reply, greedy, with a cache.

The goal is to be better than an unmerged LoRA of equal size; the recorder may cost one in twenty. A mixture decodes as
in a chat: its first reply without compiled kernels, which are made then, the others with them.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from common import DTYPES, EQUAL, Figure, awake, base, in_turns, main, ratio, with_experts, with_lora

from mole import record_routing
from mole.mixture import aot_compile, decode_kernel

PROMPT = 32
USUAL = "dynmole,adamole,topk,sparsegen"
"""What the others do is part of what these do; compiling for one more takes most of a minute, the first time."""


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


def before_kernels(run: Callable[[], float]) -> Callable[[], float]:
    """The same without compiled kernels."""

    def first() -> float:
        kept = dict(decode_kernel.KERNELS)
        decode_kernel.KERNELS.clear()
        seconds = run()
        decode_kernel.KERNELS.update(kept)
        return seconds

    return first


def seconds_to_make(model: Any) -> float:
    """How long it takes until the kernels that a first reply could have used are there."""
    begun = time.perf_counter()
    thread = aot_compile.prepare_kernels(model)
    if thread is not None:
        thread.join()
    return time.perf_counter() - begun


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
        silent()
        made = f"kernels there after {seconds_to_make(model):.0f} s"
        work = {"base": bare, "silent": silent, "recorded": recorded, "first": before_kernels(silent)}
        seconds = in_turns(work, options.rounds)
        about = f"{speed(seconds['silent'])}, base {speed(seconds['base'])}; {made}"
        yield ratio(f"{router} / base", seconds["base"], seconds["silent"], ">= 0.65", about)
        yield ratio(f"{router} / base, before", seconds["base"], seconds["first"], about=speed(seconds["first"]))
        about = speed(seconds["recorded"])
        yield ratio(f"{router}, recorded / not", seconds["silent"], seconds["recorded"], ">= 0.95", about)


if __name__ == "__main__":
    main(__doc__ or "", measure, routers=USUAL, dtype="float32", layers=30, tokens=8, rounds=5)
