"""A reply's routing as bytes, small enough to keep and to send to the page while the reply is generated.

torch is imported inside `append_step` only.
"""

from __future__ import annotations

import base64
import re
import secrets
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np

from mole.config import AdapterConfig

if TYPE_CHECKING:
    import torch

    from mole.chat.generate import Step
    from mole.mixture.steering import Steering
    from mole.models.loading import Loaded

KEPT_RECORDS = 32
KEPT_BYTES = 128 * 2**20
"""The most memory that all records take together."""
NO_ADAPTER = "This is the base model without an adapter: it has no experts, so there is no routing to show."
ONE_EXPERT = "This adapter is plain LoRA: one expert per layer, always used, so there is no routing to show."
NO_ROUTER = "This adapter has no router, so there is no routing to show."


@dataclass
class RoutingRecord:
    """The routing of one reply as bytes, 0…255 for 0…1.

    Attributes:
        meta: what the page needs to draw it: router, experts, layers, experts of each layer, number of prompt tokens.
        names: the adapted projections, by the names they have inside a layer.
        layer_of: the layer of each projection, counted from 0.
        tokens: the texts of the tokens; the byte arrays below have one row per token.
        weights: tokens × layers × experts.
        entropy: tokens × layers.
        active: tokens × layers, the share of the experts that is active.
        thresholds: tokens × layers, AdaMoLE's τ(x) as a share of `meta["limit"]`; empty for other methods.
        projections: tokens × projections × experts; shorter once the memory of all records is used up.
    """

    meta: dict[str, Any]
    names: list[str] = field(default_factory=list)
    layer_of: list[int] = field(default_factory=list)
    tokens: list[str] = field(default_factory=list)
    weights: bytearray = field(default_factory=bytearray)
    entropy: bytearray = field(default_factory=bytearray)
    active: bytearray = field(default_factory=bytearray)
    thresholds: bytearray = field(default_factory=bytearray)
    projections: bytearray = field(default_factory=bytearray)

    @property
    def size(self) -> int:
        """Bytes in memory."""
        return sum(map(len, (self.weights, self.entropy, self.active, self.thresholds, self.projections)))

    def extend(
        self,
        tokens: list[str],
        weights: bytes,
        entropy: bytes,
        active: bytes,
        thresholds: bytes = b"",
        projections: bytes = b"",
    ) -> None:
        """Append tokens; the arguments have the layout of the attributes."""
        complete = len(self.projections) == len(self.tokens) * len(self.names) * self.meta["experts"]
        if complete and self.size + len(projections) <= KEPT_BYTES:
            self.projections += projections
        self.weights += weights
        self.entropy += entropy
        self.active += active
        self.thresholds += thresholds
        self.tokens += tokens  # last, because readers in other threads go by the number of tokens

    def since(self, start: int) -> dict[str, Any]:
        """The tokens from number `start` on, as the routing view takes them."""
        layers, experts = self.meta["layers"], self.meta["experts"]
        return {
            "meta": dict(self.meta),
            "at": start,
            "tokens": self.tokens[start:],
            "weights": encoded(self.weights[start * layers * experts :]),
            "entropy": encoded(self.entropy[start * layers :]),
            "active": encoded(self.active[start * layers :]),
            "limits": encoded(self.thresholds[start * layers :]),
        }

    def projection_weights(self, token: int | None) -> dict[str, Any] | None:
        """The weights of every projection for one token, or the mean over the reply; None when they are not kept.

        `weights` are projections × experts, float32 in 0…1, little-endian, in base64.
        """
        width = len(self.names) * self.meta["experts"]
        first, last = (self.meta["prompt"], len(self.tokens)) if token is None else (token, token + 1)
        kept = self.projections[first * width : last * width]
        if first < 0 or last <= first or len(kept) < (last - first) * width:
            return None
        values = np.frombuffer(bytes(kept), np.uint8).reshape(-1, width).mean(0, dtype=np.float64) / 255
        return {"names": self.names, "layers": self.layer_of, "weights": encoded(values.astype("<f4").tobytes())}


def encoded(data: bytes | bytearray) -> str:
    """Bytes as base64 text."""
    return base64.b64encode(data).decode()


class RoutingRecords:
    """The records of the last replies by id, for pages that missed an update or open a layer; safe across threads."""

    def __init__(self, max_records: int = KEPT_RECORDS, max_bytes: int = KEPT_BYTES) -> None:
        self._max_records = max_records
        self._max_bytes = max_bytes
        self._records: OrderedDict[str, RoutingRecord] = OrderedDict()
        self._lock = Lock()

    def new(self, names: list[str] | None = None, layer_of: list[int] | None = None, **meta: Any) -> RoutingRecord:
        """A new record under a random id that cannot be guessed; the oldest records are dropped."""
        defaults = {"id": secrets.token_hex(8), "experts": 0, "layers": 0, "counts": [], "prompt": 0}
        record = RoutingRecord({**defaults, **meta}, names or [], layer_of or [])
        with self._lock:
            self._records[record.meta["id"]] = record
        self.trim()
        return record

    def get(self, identifier: str) -> RoutingRecord | None:
        """The record with this id, if it is still kept."""
        with self._lock:
            return self._records.get(identifier)

    def trim(self) -> None:
        """Drop the oldest records until number and memory are within bounds; the newest one stays."""
        with self._lock:
            total = sum(record.size for record in self._records.values())
            while len(self._records) > 1 and (len(self._records) > self._max_records or total > self._max_bytes):
                total -= self._records.popitem(last=False)[1].size


ROUTING_RECORDS = RoutingRecords()


# ---------------------------------------------------------------------------------------------------------
# From the model to a record


def open_record(
    loaded: Loaded, step: Step, steering: Steering | None = None, against: str | None = None
) -> RoutingRecord:
    """An empty record for a reply.

    Args:
        loaded: the model that generates it.
        step: the first step of the reply.
        steering: the routing overrides of this reply.
        against: id of an earlier record to show the difference from.
    """
    trace = step.trace
    meta: dict[str, Any] = {"prompt": step.prompt_tokens, "router": loaded.router, "about": model_summary(loaded)}
    if trace is None or trace.experts < 2:
        note = NO_ADAPTER if loaded.adapter_dir is None else ONE_EXPERT if loaded.router == "lora" else NO_ROUTER
        return ROUTING_RECORDS.new(note=note, **meta)
    meta["about"] += f" · {trace.experts} experts · {trace.layers} layers"
    meta |= {"layers": trace.layers, "experts": trace.experts, "against": against}
    meta |= routing_shape(loaded.adapter_dir, trace.layers, trace.experts, steering)
    return ROUTING_RECORDS.new(names=short_names(trace.modules), layer_of=trace.layer_of, **meta)


def model_summary(loaded: Loaded) -> str:
    """A loaded target in a few words."""
    base = Path(loaded.base).name
    return f"{base}, base model" if loaded.adapter_dir is None else f"{loaded.router} on {base}"


def routing_shape(folder: Path | None, layers: int, experts: int, steering: Steering | None) -> dict[str, Any]:
    """What the adapter's config says about its routing, with this reply's overrides.

    Returns:
        `counts`: experts of each layer; `even`: the weight of each expert when all that take part share evenly, by
        layer; `muted`: the experts that take no part; `threshold`: DynMoLE's entropy threshold; `limit`: AdaMoLE's
        largest τ. The last two are None for other methods.
    """
    from mole.models.adapter_files import read_adapter_config

    values = read_adapter_config(folder) if folder else {}
    allocation = AdapterConfig(num_experts=values.get("num_experts", experts))
    counts = allocation.experts_by_layer(layers)
    router = values.get("router")
    values = {**values, **(steering.settings if steering else {})}
    among = [steering.allowed_experts(count) if steering else range(count) for count in counts]
    return {
        "counts": counts,
        "even": [1 / max(len(allowed), 1) for allowed in among],
        "muted": sorted(set(range(experts)) - set().union(*among)),
        "threshold": values.get("entropy_threshold") if router == "dynmole" else None,
        "limit": (values.get("max_threshold") or 1 / min(counts)) if router == "adamole" else None,
    }


def short_names(modules: list[str]) -> list[str]:
    """The names of projections inside their layer: the last part of the name where it is unambiguous."""
    inside = [re.sub(r"^.*?\.\d+\.", "", f".{name}").lstrip(".") for name in modules]
    by_last_part: dict[str, set[str]] = {}
    for name in inside:
        by_last_part.setdefault(name.rsplit(".", 1)[-1], set()).add(name)
    return [name if len(by_last_part[last := name.rsplit(".", 1)[-1]]) > 1 else last for name in inside]


def append_step(record: RoutingRecord, step: Step) -> None:
    """Append a step's tokens and their routing to the record, as bytes."""
    delta, experts = step.routing, record.meta["experts"]
    if delta is None or not experts or not step.tokens:
        return

    import torch

    def bytes_of(values: torch.Tensor, full: float = 1.0) -> bytes:
        return values.mul(255 / full).clamp(0, 255).round().to(torch.uint8).numpy().tobytes()

    limit = record.meta["limit"]
    record.extend(
        [text for _, text in step.tokens],
        weights=bytes_of(delta.weights),
        entropy=bytes_of(delta.entropy),
        active=bytes_of(delta.active, experts),
        thresholds=b"" if limit is None or delta.threshold is None else bytes_of(delta.threshold, limit),
        projections=bytes_of(delta.projections),
    )
    ROUTING_RECORDS.trim()


# ---------------------------------------------------------------------------------------------------------
# What the page asks for


def fetch_routing(request: list[Any]) -> dict[str, Any] | None:
    """`[id, start]` → the record's tokens from number `start` on; None for a record that is no longer kept."""
    identifier, start = request
    record = ROUTING_RECORDS.get(str(identifier))
    return record.since(max(0, int(start))) if record else None


def fetch_projections(request: list[Any]) -> dict[str, Any] | None:
    """`[id, token]` → `RoutingRecord.projection_weights`, of the whole reply when the token is null."""
    identifier, token = request
    record = ROUTING_RECORDS.get(str(identifier))
    return record.projection_weights(None if token is None else int(token)) if record else None
