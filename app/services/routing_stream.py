"""Puts a reply's routing on a reel for the page. torch is imported here inside functions only."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app.services.routing_records import REELS, Reel
from mole.config import AdapterConfig

if TYPE_CHECKING:
    import torch

    from mole.chat.generate import Step
    from mole.mixture.steering import Steering
    from mole.models.loading import Loaded

NO_ROUTING = "This is the base model without an adapter: it has no experts, so there is no routing to show."
ONE_EXPERT = "This adapter is plain LoRA: one expert a layer, always used, so there is no routing to show."
NOT_OURS = "This adapter has no router, so there is no routing to show."


def new_reel(loaded: Loaded, step: Step, steering: Steering | None = None, against: str | None = None) -> Reel:
    """An empty reel for a reply of this model.

    Args:
        loaded: the model that answers.
        step: the reply's first step.
        steering: what was changed for this reply.
        against: the id of an earlier reel to show the difference from.
    """
    trace = step.trace
    meta: dict[str, Any] = {"prompt": step.prompt_tokens, "router": loaded.router, "about": about(loaded)}
    if trace is None or trace.experts < 2:
        note = NO_ROUTING if loaded.adapter_dir is None else ONE_EXPERT if loaded.router == "lora" else NOT_OURS
        return REELS.new(note=note, **meta)
    meta["about"] += f" · {trace.experts} experts · {trace.layers} layers"
    meta |= {"layers": trace.layers, "experts": trace.experts, "against": against}
    meta |= shape(loaded.adapter_dir, trace.layers, trace.experts, steering)
    return REELS.new(names=names_in_layer(trace.modules), layer_of=trace.layer_of, **meta)


def about(loaded: Loaded) -> str:
    """A loaded target in a few words."""
    base = Path(loaded.base).name
    return f"{base}, base model" if loaded.adapter_dir is None else f"{loaded.router} on {base}"


def shape(folder: Path | None, layers: int, experts: int, steering: Steering | None) -> dict[str, Any]:
    """What the adapter's own config says, as `steering` changed it for this reply.

    Returns:
        `counts`: experts by layer; `even`: the weight of each when all that take part share evenly, by layer; `muted`:
        the experts that take no part; `threshold`: DynMoLE's entropy threshold; `limit`: AdaMoLE's largest τ. The last
        two are None for other methods.
    """
    from mole.models.adapter_files import read_adapter_config

    values = read_adapter_config(folder) if folder else {}
    allocation = AdapterConfig(num_experts=values.get("num_experts", experts))
    counts = allocation.experts_by_layer(layers)
    router = values.get("router")
    values = {**values, **(steering.settings if steering else {})}
    among = [steering.among(count) if steering else range(count) for count in counts]
    return {
        "counts": counts,
        "even": [1 / max(len(chosen), 1) for chosen in among],
        "muted": sorted(set(range(experts)) - set().union(*among)),
        "threshold": values.get("entropy_threshold") if router == "dynmole" else None,
        "limit": (values.get("max_threshold") or 1 / min(counts)) if router == "adamole" else None,
    }


def names_in_layer(modules: list[str]) -> list[str]:
    """What projections are called inside their layer: the last word of the name where that tells them apart."""
    inside = [re.sub(r"^.*?\.\d+\.", "", f".{name}").lstrip(".") for name in modules]
    whole: dict[str, set[str]] = {}
    for name in inside:
        whole.setdefault(name.rsplit(".", 1)[-1], set()).add(name)
    return [name if len(whole[name.rsplit(".", 1)[-1]]) > 1 else name.rsplit(".", 1)[-1] for name in inside]


def film(reel: Reel, step: Step) -> None:
    """Add a step's tokens and routing to the reel, as bytes."""
    delta, experts = step.routing, reel.meta["experts"]
    if delta is None or not experts or not step.tokens:
        return

    import torch

    def bytes_of(values: torch.Tensor, full: float = 1.0) -> bytes:
        return values.mul(255 / full).clamp(0, 255).round().to(torch.uint8).numpy().tobytes()

    limit = reel.meta["limit"]
    reel.extend(
        [text for _, text in step.tokens],
        weights=bytes_of(delta.weights),
        entropy=bytes_of(delta.entropy),
        active=bytes_of(delta.active, experts),
        limits=b"" if limit is None or delta.threshold is None else bytes_of(delta.threshold, limit),
        parts=bytes_of(delta.projections),
    )
    REELS.trim()
