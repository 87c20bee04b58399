"""Reels: the routing of the last replies as bytes, small enough to keep and quick to send from any token on."""

from __future__ import annotations

import base64
import secrets
from collections import OrderedDict
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

import numpy as np

KEPT_REELS = 32
KEPT_BYTES = 128 * 2**20
"""The most memory all reels take together."""


@dataclass
class Reel:
    """The routing of one reply as bytes, 0…255 for 0…1.

    Attributes:
        meta: what the page needs to draw: router, experts, layers, experts by layer, number of prompt tokens.
        names: the adapted projections, by the names they have inside a layer.
        layer_of: the layer of each of them, from 0.
    """

    meta: dict[str, Any]
    names: list[str] = field(default_factory=list)
    layer_of: list[int] = field(default_factory=list)
    tokens: list[str] = field(default_factory=list)
    weights: bytearray = field(default_factory=bytearray)
    entropy: bytearray = field(default_factory=bytearray)
    active: bytearray = field(default_factory=bytearray)
    limits: bytearray = field(default_factory=bytearray)
    parts: bytearray = field(default_factory=bytearray)

    @property
    def size(self) -> int:
        """Its bytes in memory."""
        return sum(map(len, (self.weights, self.entropy, self.active, self.limits, self.parts)))

    def extend(
        self, tokens: list[str], weights: bytes, entropy: bytes, active: bytes, limits: bytes = b"", parts: bytes = b""
    ) -> None:
        """Add tokens.

        Args:
            tokens: their texts.
            weights: tokens × layers × experts.
            entropy: tokens × layers.
            active: tokens × layers, the share of the experts that is active.
            limits: tokens × layers, AdaMoLE's τ(x) as a share of `meta["limit"]`; empty for other methods.
            parts: tokens × projections × experts; not kept once the memory for all reels is full.
        """
        whole = len(self.parts) == len(self.tokens) * len(self.names) * self.meta["experts"]
        if whole and self.size + len(parts) <= KEPT_BYTES:
            self.parts += parts
        self.weights += weights
        self.entropy += entropy
        self.active += active
        self.limits += limits
        self.tokens += tokens  # last: who reads meanwhile goes by the number of tokens

    def since(self, start: int) -> dict[str, Any]:
        """The delta of the tokens from `start` on."""
        layers, experts = self.meta["layers"], self.meta["experts"]
        return {
            "meta": dict(self.meta),
            "at": start,
            "tokens": self.tokens[start:],
            "weights": base64.b64encode(self.weights[start * layers * experts :]).decode(),
            "entropy": base64.b64encode(self.entropy[start * layers :]).decode(),
            "active": base64.b64encode(self.active[start * layers :]).decode(),
            "limits": base64.b64encode(self.limits[start * layers :]).decode(),
        }

    def projections(self, token: int | None) -> dict[str, Any] | None:
        """The weights of every projection for a token, or their mean over the reply → None when they are not kept.

        `weights` are projections × experts float32 of 0…1, little-endian, in base64.
        """
        width = len(self.names) * self.meta["experts"]
        first, last = (self.meta["prompt"], len(self.tokens)) if token is None else (token, token + 1)
        kept = self.parts[first * width : last * width]
        if first < 0 or last <= first or len(kept) < (last - first) * width:
            return None
        values = np.frombuffer(bytes(kept), np.uint8).reshape(-1, width).mean(0, dtype=np.float64) / 255
        packed = base64.b64encode(values.astype("<f4").tobytes()).decode()
        return {"names": self.names, "layers": self.layer_of, "weights": packed}


class Reels:
    """The last replies' reels by id, for pages that missed a delta or look closer."""

    def __init__(self, keep: int = KEPT_REELS, most: int = KEPT_BYTES) -> None:
        self._keep = keep
        self._most = most
        self._reels: OrderedDict[str, Reel] = OrderedDict()
        self._lock = Lock()

    def new(self, names: list[str] | None = None, layer_of: list[int] | None = None, **meta: Any) -> Reel:
        """A new reel with an id nobody can guess; the oldest ones are forgotten."""
        defaults = {"id": secrets.token_hex(8), "experts": 0, "layers": 0, "counts": [], "prompt": 0}
        reel = Reel({**defaults, **meta}, names or [], layer_of or [])
        with self._lock:
            self._reels[reel.meta["id"]] = reel
        self.trim()
        return reel

    def get(self, identifier: str) -> Reel | None:
        """The reel of that id, if it is still kept."""
        with self._lock:
            return self._reels.get(identifier)

    def trim(self) -> None:
        """Forget the oldest reels until number and memory are within bounds; the newest one stays."""
        with self._lock:
            total = sum(reel.size for reel in self._reels.values())
            while len(self._reels) > 1 and (len(self._reels) > self._keep or total > self._most):
                total -= self._reels.popitem(last=False)[1].size


REELS = Reels()


def routing(request: list[Any]) -> dict[str, Any] | None:
    """What a page missed: `[id, tokens it has]` → the delta from there; None for a reply that is forgotten."""
    identifier, start = request
    reel = REELS.get(str(identifier))
    return reel.since(max(0, int(start))) if reel else None


def projections(request: list[Any]) -> dict[str, Any] | None:
    """A closer look: `[id, token]` → `Reel.projections`, of the whole reply when the token is null."""
    identifier, token = request
    reel = REELS.get(str(identifier))
    return reel.projections(None if token is None else int(token)) if reel else None
