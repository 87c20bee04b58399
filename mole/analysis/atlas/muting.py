"""How much each expert matters: the increase of the loss when it is muted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mole.analysis.atlas.information import DISTANCE
from mole.analysis.atlas.recorder import Projection
from mole.analysis.atlas.segments import TokenRow
from mole.data import IGNORE_INDEX, Collator
from mole.mixture.steering import AS_TRAINED, Steering, steer
from mole.models.loading import Loaded
from mole.models.logits import base_model, only_positions

SAMPLED_TOKENS = 100_000
"""Tokens that are read in all, for all experts together, at the most; but for each at least `LEAST_ROWS` rows."""
LEAST_ROWS = 4


class Muted(NamedTuple):
    """What muting an expert of a layer does to the loss.

    Attributes:
        layer, expert: which one, in all projections of the layer.
        increase: of the mean loss of a row, in nats for each learnt token; below 0 if muting it helps.
        error: standard error of that mean over rows.
        clear: whether it is more than `DISTANCE` standard errors from 0. There are hundreds of experts and few rows, so
            with two standard errors many experts would seem to matter by chance.
    """

    layer: int
    expert: int
    increase: float
    error: float
    clear: bool


def sample_size(lengths: Sequence[int], muted: int) -> int:
    """How many of the first rows, of these lengths, may be read once for each of the experts to mute."""
    read = 0
    for count, length in enumerate(lengths):
        read += length
        if read * (muted + 1) > SAMPLED_TOKENS and count >= LEAST_ROWS:
            return count
    return len(lengths)


@torch.no_grad()
def row_losses(loaded: Loaded, rows: Sequence[TokenRow]) -> Tensor:
    """The mean loss of each row's learnt tokens, in nats → `(rows,)`, in float64 on the CPU; in one forward pass."""
    batch = Collator(loaded.tokenizer.pad_token_id)([row.encoded._asdict() for row in rows])
    labels = F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORE_INDEX)
    chosen = labels != IGNORE_INDEX
    device = loaded.model.device
    inputs = {name: batch[name].to(device) for name in ("input_ids", "attention_mask")}
    positions = chosen.flatten().nonzero()[:, 0].to(device)
    with only_positions(base_model(loaded.model).get_output_embeddings(), positions):
        logits = loaded.model(**inputs, use_cache=False).logits[0].float()
    losses = F.cross_entropy(logits, labels[chosen].to(device), reduction="none").cpu().double()
    row = chosen.nonzero()[:, 0]
    return torch.zeros(len(rows), dtype=torch.float64).index_add_(0, row, losses) / chosen.sum(-1)


def measure_muting(
    loaded: Loaded,
    projections: Sequence[Projection],
    rows: Sequence[TokenRow],
    batches: Sequence[slice],
    report: Callable[[int, int], object],
) -> tuple[float, list[Muted]]:
    """Mute each expert of each layer in turn, and see what that does to the loss of some rows.

    Experts of different layers have nothing to do with each other, so one is muted in the projections of its layer
    alone: as if they did not have it, see `mole.mixture.steering`. `report(done, total)` is called after each.

    Returns:
        The mean loss of a row as trained, and what each expert does to it.
    """

    def losses(steering: Steering, only: set[str]) -> Tensor:
        with steer(loaded.model, steering, only):
            return torch.cat([row_losses(loaded, rows[batch]) for batch in batches])

    usual, found = losses(AS_TRAINED, set()), []
    wanted = experts_of_layers(projections)
    for done, (layer, expert) in enumerate(wanted, start=1):
        only = {projection.name for projection in projections if projection.layer == layer}
        more = losses(Steering(muted=frozenset({expert})), only) - usual
        error = float(more.std() / len(more) ** 0.5) if len(more) > 1 else 0.0
        increase = float(more.mean())
        found.append(Muted(layer, expert, increase, error, 0 < DISTANCE * error < abs(increase)))
        report(done, len(wanted))
    return float(usual.mean()), found


def experts_of_layers(projections: Sequence[Projection]) -> list[tuple[int, int]]:
    """All pairs of a layer and one of its experts; a layer has as many as the projection with the most."""
    most: dict[int, int] = {}
    for projection in projections:
        most[projection.layer] = max(most.get(projection.layer, 0), projection.experts)
    return [(layer, expert) for layer in sorted(most) for expert in range(most[layer])]
