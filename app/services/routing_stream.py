"""A reply's routing as bytes, small enough to keep and to send to the page while the reply is generated."""

from __future__ import annotations

import base64
import secrets
from collections import OrderedDict
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

import numpy as np

KEPT_RECORDS = 32
SIMILAR = 5
"""How many similarly routed tokens the page names."""
ROWS = 2048
"""Tokens compared at a time, so that a long conversation takes little memory."""
KEPT_BYTES = 128 * 2**20
"""The most memory that all records take together."""


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
        strongest: tokens, the mean share of its router's weight that the strongest expert has.
        hues: tokens × 2, hue and distance from the centre of the map (`mole.mixture.routing_map`); empty without one.
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
    strongest: bytearray = field(default_factory=bytearray)
    hues: bytearray = field(default_factory=bytearray)
    projections: bytearray = field(default_factory=bytearray)

    @property
    def size(self) -> int:
        """Bytes in memory."""
        parts = (self.weights, self.entropy, self.active, self.thresholds, self.strongest, self.hues, self.projections)
        return sum(map(len, parts))

    def extend(
        self,
        tokens: list[str],
        weights: bytes,
        entropy: bytes,
        active: bytes,
        thresholds: bytes = b"",
        strongest: bytes = b"",
        hues: bytes = b"",
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
        self.strongest += strongest
        self.hues += hues
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
            "strongest": encoded(self.strongest[start:]),
            "hues": encoded(self.hues[2 * start :]),
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

    def names_by_layer(self) -> list[list[str]]:
        """The projections of each layer."""
        pairs = list(zip(self.names, self.layer_of, strict=True))
        return [[name for name, place in pairs if place == layer] for layer in range(self.meta["layers"])]

    def kept_projections(self) -> np.ndarray:
        """`(tokens, projections, experts)`, of the first tokens: as many as are kept."""
        width = len(self.names) * self.meta["experts"]
        count = min(len(self.projections) // width, len(self.tokens)) if width else 0
        kept = np.frombuffer(bytes(self.projections[: count * width]), np.uint8)
        return kept.reshape(count, len(self.names), self.meta["experts"])

    def router_weights(self, layer: int, name: str, start: int) -> dict[str, Any] | None:
        """The weights of one router for the tokens from number `start` on; None if there is none or they are not kept.

        `weights` are tokens × experts in bytes, in base64, `at` is `start`.
        """
        rows = [row for row, place in enumerate(self.layer_of) if place == layer and self.names[row] == name]
        if not rows:
            return None
        complete, kept = len(self.tokens), self.kept_projections()
        if len(kept) < complete:
            return None
        return {"at": start, "weights": encoded(kept[start:, rows[0]].tobytes())}

    def similar(self, token: int) -> list[list[float]] | None:
        """The tokens routed most like this one, as [number, cosine] from the most similar on; None if not kept.

        The cosine of the whole routing vectors, the weights of every expert of every projection.
        """
        kept = self.kept_projections()
        if not 0 <= token < len(kept):
            return None
        own = kept[token].ravel().astype(np.float32)
        cosine = np.zeros(len(kept), np.float32)
        for at in range(0, len(kept), ROWS):
            part = kept[at : at + ROWS].reshape(-1, own.size).astype(np.float32)
            lengths = np.linalg.norm(part, axis=1) * np.linalg.norm(own)
            cosine[at : at + ROWS] = part @ own / np.maximum(lengths, 1e-9)
        order = [int(other) for other in np.argsort(-cosine, kind="stable") if other != token]
        return [[other, round(float(cosine[other]), 4)] for other in order[:SIMILAR]]


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
        record.meta["routers"] = record.names_by_layer()
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


def fetch_router(request: list[Any]) -> dict[str, Any] | None:
    """`[id, layer, projection, start]` → `RoutingRecord.router_weights`."""
    identifier, layer, name, start = request
    record = ROUTING_RECORDS.get(str(identifier))
    return record.router_weights(int(layer), str(name), max(0, int(start))) if record else None


def fetch_similar(request: list[Any]) -> list[list[float]] | None:
    """`[id, token]` → `RoutingRecord.similar`."""
    identifier, token = request
    record = ROUTING_RECORDS.get(str(identifier))
    return record.similar(int(token)) if record else None
