"""Statistics of the routing of a training step, for the event log of a run."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mole.core.limits import DEAD_SHARE
from mole.mixture.losses import column_widths, token_means
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
    names = [layer_index(sums.name) for sums in log.sums]
    layers = sorted({*names})
    experts = max(sums.router.num_experts for sums in log.sums)
    with torch.no_grad():
        order, rows = projection_means(log.sums, experts)
    # (layers, E + 2), means over the projections
    index = torch.tensor([layers.index(names[place]) for place in order])
    table = torch.zeros(len(layers), experts + 2).index_add_(0, index, rows)
    table /= index.bincount()[:, None]
    total = table[:, :-2].sum(-1, keepdim=True)
    load = (table[:, :-2] / torch.where(total > 0, total, torch.ones_like(total))).tolist()
    used_once = ((total[:, 0] - 1).abs() <= 1e-6) & ((table[:, -1] - 1).abs() <= 1e-6)
    by_layer = experts_by_layer(log.sums)
    counts = [by_layer[layer] for layer in layers]
    return {
        "layers": len(layers),
        "experts": experts,
        "load": rounded(load),
        "entropy": rounded(table[:, -2].tolist()),
        "active": rounded(table[:, -1].tolist()),
        "dead": [
            sum(share < DEAD_SHARE / count for share in row[:count]) for row, count in zip(load, counts, strict=True)
        ],
        "certain": [place for place, once in enumerate(used_once.tolist()) if once and counts[place] > 1],
    }


def projection_means(projections: list[RoutingSums], experts: int) -> tuple[list[int], Tensor]:
    """Means over tokens of the load (`experts` columns), the entropy and the active experts of each projection.

    Projections whose sums have the same columns are computed together, and each device is copied from once.

    Returns:
        The places of the projections in the order of the rows, and `(projections, experts + 2)` on the CPU.
    """
    groups: dict[tuple[Any, ...], list[int]] = defaultdict(list)
    for place, (_, router, values) in enumerate(projections):
        groups[(values.device, values.dtype, *column_widths(router).items())].append(place)
    tables: dict[torch.device, list[Tensor]] = defaultdict(list)
    for places in groups.values():
        router = projections[places[0]].router
        means = token_means(router, torch.stack([projections[place].values for place in places]))
        load = F.pad(means["weights"], (0, experts - router.num_experts))
        tables[load.device].append(torch.cat([load, means["entropy"], means["active"]], -1).float())
    # groups of one device follow one another, as they do in `order`
    found = sorted(groups, key=lambda key: list(tables).index(key[0]))
    order = [place for key in found for place in groups[key]]
    return order, torch.cat([torch.cat(parts).cpu() for parts in tables.values()])


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
