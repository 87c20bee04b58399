"""Peak memory of training beside PEFT's LoRA with as many parameters.

Each is a process of its own, which takes two steps with AdamW; on a CPU its largest resident size after loading is
read from Linux, on a GPU what torch allocated.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from common import DTYPES, EQUAL, Figure, awake, base, figure, main, with_experts, with_lora

LORA = "lora"


def peak(method: str, length: int, checkpointing: bool, layers: int, dtype: str, dropout: float) -> float:
    """Megabytes at the most, base model included, of training with LoRA or a router."""
    model = base(DTYPES[dtype], layers)
    model = awake(with_lora(model, dropout=dropout) if method == LORA else with_experts(model, method, dropout))
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    model.train()
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad])
    ids = torch.randint(0, 49_000, (4, length), generator=torch.Generator().manual_seed(0))
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of loading
    for _ in range(2):
        model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) / 1024


def alone(*given: object) -> float:
    """`peak` in a process of its own, whose allocator gives back at once what is no longer used."""
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(peak, *given).result()  # type: ignore[arg-type]


def measure(options: argparse.Namespace) -> Iterator[Figure]:
    """Every router against LoRA, short and long rows, with and without checkpointing."""
    for length in map(int, options.lengths.split(",")):
        for checkpointing in (False, True):
            given = length, checkpointing, options.layers, options.dtype, options.dropout
            reference = [alone(LORA, *given) for _ in range(options.rounds)]
            for router in options.routers.split(","):
                found = [alone(router, *given) for _ in range(options.rounds)]
                name = f"{router}, 4 × {length}{', checkpointing' if checkpointing else ''}"
                about = f"{statistics.median(found):.0f} MB, LoRA r {EQUAL} {statistics.median(reference):.0f} MB"
                ratios = [one / other for one, other in zip(found, reference, strict=True)]
                yield figure(name, ratios, "<= 1.02", about)


if __name__ == "__main__":
    chosen = {"dtype": "float32", "dropout": 0.0, "rounds": 1}
    main(__doc__ or "", measure, routers="dynmole,sparsegen", layers=10, lengths="128,512", **chosen)
