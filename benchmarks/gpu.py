"""On a CUDA GPU: a random Llama-2-7B shape in bfloat16, 4 × 512 tokens, beside PEFT's LoRA and a loop over experts.

    python benchmarks/gpu.py                                       # on a GPU with 40 GB or more
    python benchmarks/gpu.py --hidden 64 --layers 2 --length 32    # anywhere, to see that it works

`--profile FILE` writes a trace of one step for chrome://tracing.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from common import EQUAL, Figure, awake, figure, in_turns, main, ratio, with_experts, with_lora
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from mole.mixture.layer import MoleLinear

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def llama(hidden: int, layers: int) -> Any:
    """Llama-2-7B's shape at `hidden` = 4096 and `layers` = 32, with random weights."""
    config = LlamaConfig(
        vocab_size=32_000,
        hidden_size=hidden,
        intermediate_size=hidden * 43 // 16,
        num_attention_heads=hidden // 32 if hidden < 4096 else 32,
        num_hidden_layers=layers,
    )
    with torch.device(DEVICE):
        torch.set_default_dtype(torch.bfloat16)
        try:
            return LlamaForCausalLM(config)
        finally:
            torch.set_default_dtype(torch.float32)


def looped(layer: MoleLinear, x: Tensor) -> Tensor:
    """The same layer as a loop over its experts, as the methods' first codes had it."""
    router = layer.routers["default"]
    weights = router(x).weights.to(x.dtype)
    down, up, rank = layer.down("default"), layer.mole_studio_B["default"].weight, layer.r["default"]
    result = layer.base_layer(x)
    for expert in range(router.num_experts):
        rows = slice(expert * rank, (expert + 1) * rank)
        update = F.linear(F.linear(x, down[rows]), up[:, rows]) * layer.scaling["default"]
        result = result + update * weights[..., expert : expert + 1]
    return result


def with_loop(model: Any, router: str) -> Any:
    """Our mixture, every layer computed by `looped`."""
    model = with_experts(model, router)
    for module in model.modules():
        if isinstance(module, MoleLinear):
            module.forward = lambda x, layer=module: looped(layer, x)
    return model


def now() -> float:
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def step(model: Any, ids: Tensor) -> Callable[[], float]:
    """Forward and backward."""

    def run() -> float:
        model.train().zero_grad()
        begun = now()
        model(input_ids=ids, labels=ids).loss.backward()
        return now() - begun

    return run


def decode(model: Any, ids: Tensor, tokens: int) -> Callable[[], float]:
    """Greedy decoding with a static cache, which transformers compiles where that pays."""

    def run() -> float:
        model.eval()
        given = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
        if DEVICE == "cuda":
            given["cache_implementation"] = "static"
        begun = now()
        model.generate(input_ids=ids[:1, :32], **given)
        return now() - begun

    return run


def peak(run: Callable[[], float]) -> float:
    """Megabytes of the GPU that a step takes at the most."""
    torch.cuda.reset_peak_memory_stats()
    run()
    return torch.cuda.max_memory_allocated() / 2**20


def profiled(run: Callable[[], float], path: str) -> None:
    """A trace of one call."""
    with torch.profiler.profile() as profile:
        run()
    profile.export_chrome_trace(path)


def measure(options: argparse.Namespace) -> Iterator[Figure]:
    """One model at a time in memory beside LoRA's: seven billion parameters do not fit many times."""
    ids = torch.randint(0, 32_000, (4, options.length), device=DEVICE)

    def bare() -> Any:
        return llama(options.hidden, options.layers)

    made = {"LoRA": awake(with_lora(bare())), "ours": awake(with_experts(bare(), options.router)).to(DEVICE)}
    steps = {name: step(model, ids) for name, model in made.items()}
    seconds = in_turns(steps, options.rounds, warm=2)
    about = f"{min(seconds['ours']) * 1e3:.0f} ms, LoRA r {EQUAL} {min(seconds['LoRA']) * 1e3:.0f} ms"
    yield ratio(f"step, {options.router} / LoRA", seconds["ours"], seconds["LoRA"], "<= 0.95", about)
    if DEVICE == "cuda":
        yield figure("memory of a step, ours / LoRA", [peak(steps["ours"]) / peak(steps["LoRA"])], "<= 1.02")
    if options.profile:
        profiled(steps["ours"], options.profile)
    decoding = {"ours": decode(made["ours"], ids, options.tokens)}
    del made["LoRA"], steps["LoRA"]
    made["base"] = bare()
    decoding["base"] = decode(made["base"], ids, options.tokens)
    seconds = in_turns(decoding, options.rounds)
    yield ratio("decoding, ours / base", seconds["base"], seconds["ours"], ">= 0.80")
    del made["base"], decoding
    made["loop"] = awake(with_loop(bare(), options.router)).to(DEVICE)
    seconds = in_turns({"ours": steps["ours"], "loop": step(made["loop"], ids)}, options.rounds)
    yield ratio("step, loop over experts / ours", seconds["loop"], seconds["ours"], ">= 3.00")


if __name__ == "__main__":
    main(__doc__ or "", measure, router="dynmole", hidden=4096, layers=32, length=512, tokens=64, rounds=5, profile="")
