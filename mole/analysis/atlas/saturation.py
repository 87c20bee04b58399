"""Saturation: how early in its training a run's routers chose the experts that they choose at its end."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mole.analysis.atlas.recorder import BatchRecorder
from mole.analysis.atlas.segments import TokenRow
from mole.core import checkpoint
from mole.mixture.trace import active_routers
from mole.models.loading import Base, Loaded, attach

MOST_CHECKPOINTS = 12
"""Checkpoints that are looked at, spread evenly over the run."""


def top_experts(weights: Tensor, k: int) -> Tensor:
    """Which experts are among a token's k strongest, and used at all: `weights (…, E)` → `(…, E)`, bool.

    Of equal weights the expert with the lower number goes first.
    """
    order = weights.sort(dim=-1, descending=True, stable=True).indices[..., :k]
    chosen = torch.zeros_like(weights, dtype=torch.bool).scatter_(-1, order, True)
    return chosen & (weights > 0)


def saturation_of(then: Tensor, final: Tensor) -> Tensor:
    """The share of the final experts that were chosen then already, `(tokens, projections, E)` each → `(projections,)`.

    Muennighoff et al. 2024, "OLMoE", section 5: (1/N) Σ |E(then) ∩ E(final)| / k, with k = |E(final)|, the number of
    experts chosen at the end, which in the paper is constant. Tokens that use no expert at the end have no part in it.
    """
    size = final.sum(-1)
    both = (then & final).sum(-1)
    known = size > 0
    share = torch.where(known, both / size.clamp(min=1), torch.zeros_like(both, dtype=torch.float32)).double()
    return share.sum(0) / known.sum(0).clamp(min=1)


def numbers_of_experts(loaded: Loaded, experts: int) -> list[int]:
    """The k for which saturation is measured: 1, and the method's top k; for other methods 2."""
    params = active_routers(loaded.model)[0][1].params
    return sorted({1, min(int(getattr(params, "top_k", None) or 2), experts)})


def spread(steps: Sequence[tuple[int, Path]], most: int = MOST_CHECKPOINTS) -> list[tuple[int, Path]]:
    """At most so many checkpoints, the first and the last among them."""
    if len(steps) <= most:
        return list(steps)
    return [steps[round(place * (len(steps) - 1) / (most - 1))] for place in range(most)]


def run_checkpoints(loaded: Loaded) -> list[tuple[int, Path]]:
    """The checkpoints of the run whose final adapter is loaded, oldest first; none for other targets."""
    folder = loaded.adapter_dir
    if folder is None or folder.name != "adapter" or not (folder.parent / "run.yaml").is_file():
        return []
    return sorted(checkpoint.steps(folder.parent / "checkpoints"))


@contextmanager
def with_adapter(loaded: Loaded, folder: Path, name: str) -> Iterator[None]:
    """Use another adapter of the same base model inside the `with` block."""
    model = loaded.model
    before = model.active_adapter
    base = Base(model.get_base_model(), loaded.tokenizer, loaded.base, model.device, model.dtype)
    attach(base, folder, onto=model, adapter=name)
    try:
        model.set_adapter(name, inference_mode=True)
        yield
    finally:
        model.set_adapter(before, inference_mode=True)
        model.delete_adapter(name)


def measure_saturation(loaded: Loaded, rows: Sequence[TokenRow], batches: Sequence[slice], report: Any) -> Any:
    """Saturation over the checkpoints of a run on some rows; None for a target without checkpoints.

    Args:
        loaded: the run's final adapter.
        rows: the sample.
        batches: which of `rows` fit into a batch together.
        report: `report(done, total)`, called after each checkpoint.

    Returns:
        `steps`, and `by_k`: for each k, as text, [checkpoint][projection].
    """
    steps = spread(run_checkpoints(loaded))
    if not steps:
        return None
    numbers: list[int] = []

    def chosen() -> list[list[Tensor]]:
        """The chosen experts, [k][batch]."""
        recorder = BatchRecorder(loaded)
        numbers[:] = numbers_of_experts(loaded, recorder.experts)
        with recorder.recording():
            routed = [recorder.route([row.ids for row in rows[batch]]).weights for batch in batches]
        return [[top_experts(weights, k) for weights in routed] for k in numbers]

    final = chosen()
    by_k: dict[str, list[Tensor]] = {str(k): [] for k in numbers}
    for done, (step, folder) in enumerate(steps, start=1):
        with with_adapter(loaded, folder, f"step{step}"):
            then = chosen()
        for k, ours, theirs in zip(numbers, then, final, strict=True):
            by_k[str(k)].append(saturation_of(torch.cat(ours), torch.cat(theirs)))
        report(done, len(steps))
    return {"steps": [step for step, _ in steps], "by_k": {k: torch.stack(values) for k, values in by_k.items()}}
