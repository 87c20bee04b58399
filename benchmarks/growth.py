"""What more experts and higher ranks cost: a training step for E = 1 … 64 at one rank, and r = 4 … 64 at one E.

Beside each stands PEFT's LoRA of rank E·r. After each series comes the slope of a straight line through its steps over
E·r, ours divided by LoRA's. The last series is top-2 routing with all experts computed, divided by the chosen ones
alone: above 1 the grouped product is the quicker one. The steps are those of the decoder's layers: the logits, the same
in all, are left out but for the last token's, since their time would hide what grows.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch
from common import Figure, awake, base, figure, in_turns, main, ratio, with_experts, with_lora
from step_time import step

from mole import MoleConfig, auxiliary_loss
from mole.mixture import fused_adapters

SERIES = {
    "E": [(experts, 8) for experts in (1, 2, 4, 8, 16, 32, 64)],
    "r": [(8, rank) for rank in (4, 8, 16, 32, 64)],
}


ROUTED = (8, 16, 32, 64, 128)
"""Numbers of experts of rank 8 of which a token chooses two."""


def loss_of_layers(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """One that all layers have a part in, without logits but the last token's; the routers' own where there are any."""
    loss = model(input_ids=ids, attention_mask=mask, logits_to_keep=1).logits.square().mean()
    routed = isinstance(model.peft_config["default"], MoleConfig)
    return loss + auxiliary_loss(model) if routed else loss


def slope(sizes: list[int], seconds: list[float]) -> float:
    """Of the straight line nearest to the points."""
    return statistics.linear_regression(sizes, seconds).slope


def measure(options: argparse.Namespace) -> Iterator[Figure]:
    """Both series, each size interleaved with its LoRA."""
    ids = torch.randint(0, 49_000, (4, options.length))
    for letter, shapes in SERIES.items():
        ours: list[list[float]] = []
        theirs: list[list[float]] = []
        for experts, rank in shapes:
            given = {"top_k": 1} if experts == 1 and options.router == "topk" else {}
            mixture = awake(
                with_experts(base(layers=options.layers), options.router, num_experts=experts, r=rank, **given)
            )
            lora = awake(with_lora(base(layers=options.layers), experts * rank))
            seconds = in_turns(
                {"ours": step(mixture, ids, loss_of_layers), "lora": step(lora, ids, loss_of_layers)}, options.rounds
            )
            ours.append(seconds["ours"])
            theirs.append(seconds["lora"])
            here, there = (statistics.median(seconds[name]) for name in ("ours", "lora"))
            about = f"{here:.3f} s, LoRA r {experts * rank} {there:.3f} s"
            yield ratio(f"{options.router}, E = {experts}, r = {rank}", ours[-1], theirs[-1], about=about)
        sizes = [experts * rank for experts, rank in shapes]
        slopes = [
            slope(sizes, list(mine)) / slope(sizes, list(its))
            for mine, its in zip(zip(*ours, strict=True), zip(*theirs, strict=True), strict=True)
        ]
        yield figure(f"slope over {letter}, ours / LoRA", slopes, "<= 1.05")
    for experts in ROUTED:
        yield taken_over(awake(with_experts(base(layers=options.layers), "topk", num_experts=experts)), ids, options)


def taken_over(model: Any, ids: torch.Tensor, options: argparse.Namespace) -> Figure:
    """All experts computed over the chosen ones alone, both by order; and which of them is taken by itself."""
    own = fused_adapters.grouped_is_faster
    took: set[bool] = set()

    def by_order(grouped: bool) -> Callable[[], float]:
        def run() -> float:
            def by_hand(*given: Any) -> bool:
                took.add(own(*given))
                return grouped

            fused_adapters.grouped_is_faster = by_hand
            try:
                return step(model, ids, loss_of_layers)()
            finally:
                fused_adapters.grouped_is_faster = own

        return run

    seconds = in_turns({"all": by_order(False), "chosen": by_order(True)}, options.rounds)
    experts = model.peft_config["default"].num_experts
    everywhere = {(True,): "the chosen ones", (False,): "all"}.get(tuple(took), "both, by projection")
    return ratio(
        f"topk, E = {experts}, r = 8: all / chosen", seconds["all"], seconds["chosen"], about=f"takes {everywhere}"
    )


if __name__ == "__main__":
    main(__doc__ or "", measure, router="dynmole", layers=3, length=128, rounds=5)
