"""The live routing component: what the routers did for every token of a reply, drawn while it is written.

One `gr.HTML` with a constant template. Its value is a delta (see `Reel.since`), so what travels is the new tokens only.
"""

from __future__ import annotations

import base64
import secrets
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

import gradio as gr

HERE = Path(__file__).parent
KEPT_REELS = 32


def script(*parts: Path) -> str:
    """The JavaScript of a component: the shared drawing kit, and its own files."""
    return "\n".join(path.read_text(encoding="utf-8") for path in (HERE / "kit.js", *parts))


@dataclass
class Reel:
    """The routing of one reply as bytes, 0…255 for 0…1: small enough to keep, quick to send from any token on.

    Attributes:
        meta: what the page needs to draw: router, experts, layers, experts by layer, number of prompt tokens.
    """

    meta: dict[str, Any]
    tokens: list[str] = field(default_factory=list)
    weights: bytearray = field(default_factory=bytearray)
    entropy: bytearray = field(default_factory=bytearray)
    active: bytearray = field(default_factory=bytearray)

    def extend(self, tokens: list[str], weights: bytes, entropy: bytes, active: bytes) -> None:
        """Add tokens: weights (tokens × layers × experts bytes), entropy and active share (tokens × layers bytes)."""
        self.weights += weights
        self.entropy += entropy
        self.active += active
        self.tokens += tokens

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
        }


class Reels:
    """The last replies' reels by id, for pages that missed a delta."""

    def __init__(self, keep: int = KEPT_REELS) -> None:
        self._keep = keep
        self._reels: OrderedDict[str, Reel] = OrderedDict()
        self._lock = Lock()

    def new(self, **meta: Any) -> Reel:
        """A new reel with an id nobody can guess; the oldest one is forgotten."""
        reel = Reel({"id": secrets.token_hex(8), "experts": 0, "layers": 0, "counts": [], "prompt": 0, **meta})
        with self._lock:
            self._reels[reel.meta["id"]] = reel
            while len(self._reels) > self._keep:
                self._reels.popitem(last=False)
        return reel

    def get(self, identifier: str) -> Reel | None:
        """The reel of that id, if it is still kept."""
        with self._lock:
            return self._reels.get(identifier)


REELS = Reels()


def routing(request: list[Any]) -> dict[str, Any] | None:
    """What a page missed: `[id, tokens it has]` → the delta from there; None for a reply that is forgotten."""
    identifier, start = request
    reel = REELS.get(str(identifier))
    return reel.since(max(0, int(start))) if reel else None


def routing_view(**given: Any) -> gr.HTML:
    """The component; `given` are further arguments of `gr.HTML`."""
    return gr.HTML(
        html_template=(HERE / "routing.html").read_text(encoding="utf-8"),
        css_template=(HERE / "routing.css").read_text(encoding="utf-8"),
        js_on_load=script(HERE / "routing.js"),
        server_functions=[routing],
        apply_default_css=False,
        container=False,
        **given,
    )
