"""Statistics of the routing of a training step, for the event log of a run."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mole.core.limits import DEAD_SHARE
from mole.mixture.losses import token_means
from mole.mixture.routing_log import RoutingSums, find_log, layer_index


def layer_statistics(model: nn.Module) -> dict[str, Any] | None:
    """Load, entropy, active and dead experts of each layer, over the tokens of the last batch in training mode.

    Returns:
        `layers`, `experts`: their numbers. `load` [layer][expert]: each expert's share of the routing weights, which
        add up to 1 in a layer. `entropy`, `active` [layer]: means. `dead` [layer]: number of experts whose load is
        below `DEAD_SHARE` of an even share. `certain`: indices of the layers where every token used one of several
        experts with the weight 1, so that the loss has no gradient for the router. None if nothing was logged.
    """
    log = find_log(model)
    if log is None or not log.sums:
        return None
    experts = max(sums.router.num_experts for sums in log.sums)
    layers = sorted({layer_index(sums.name) for sums in log.sums})
    rows: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    with torch.no_grad():
        for name, router, values in log.sums:
            mean = token_means(router, values)
            load = F.pad(mean["weights"], (0, experts - router.num_experts))
            rows[layer_index(name)].append(torch.cat([load, mean["entropy"], mean["active"]]))
        # (layers, E + 2), means over the projections; the one copy from the device
        table = torch.stack([torch.stack(rows[layer]).mean(0) for layer in layers]).float().cpu()
    total = table[:, :-2].sum(-1, keepdim=True)
    load = table[:, :-2] / torch.where(total > 0, total, torch.ones_like(total))
    counts = experts_by_layer(log.sums)
    dead = [
        int((load[place, : counts[layer]] < DEAD_SHARE / counts[layer]).sum()) for place, layer in enumerate(layers)
    ]
    one = torch.ones(2)
    certain = [
        place
        for place, layer in enumerate(layers)
        if counts[layer] > 1 and torch.allclose(torch.stack([total[place, 0], table[place, -1]]), one, atol=1e-6)
    ]
    return {
        "layers": len(layers),
        "experts": experts,
        "load": rounded(load.tolist()),
        "entropy": rounded(table[:, -2].tolist()),
        "active": rounded(table[:, -1].tolist()),
        "dead": dead,
        "certain": certain,
    }


def experts_by_layer(projections: list[RoutingSums]) -> dict[int, int]:
    """The largest number of experts in the projections of each layer."""
    counts: dict[int, int] = {}
    for name, router, _ in projections:
        layer = layer_index(name)
        counts[layer] = max(counts.get(layer, 0), router.num_experts)
    return counts


def rounded(values: Any) -> Any:
    """Round nested lists of numbers to four places, enough for a plot and a third of the bytes."""
    return [rounded(value) for value in values] if isinstance(values, list) else round(values, 4)
