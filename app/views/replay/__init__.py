"""A conversation with its routing as one HTML file, which opens without a server and loads nothing.

It holds the scripts of the routing view and what the view would fetch from the studio, so that all of it works.
"""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from app.services.conversation import Turn
from app.services.routing_stream import RoutingRecord, encoded
from app.views.component import BASICS, CANVAS, read_texts
from app.views.routing import HERE as ROUTING
from app.views.routing import PARTS

HERE = Path(__file__).parent
PROJECTION_BYTES = 1_350_000
"""Bytes of the weights of single projections in a file; of a longer reply they are left out, so that it has 2 MB."""


@dataclass(frozen=True)
class ReplayedReply:
    """A conversation whose last reply is shown with its routing.

    Attributes:
        title: who answered.
        turns: the conversation; the routing is that of all its tokens, as the model read and wrote them last.
        record: the routing.
        system: the system prompt; empty for none.
    """

    title: str
    turns: Sequence[Turn]
    record: RoutingRecord
    system: str = ""


def replay_page(replies: Sequence[ReplayedReply]) -> str:
    """The page of one reply, or of several that are set side by side.

    Texts of the conversation stand in it as JSON, in which nothing ends the element they are in; the scripts write them
    as text only.
    """
    left = PROJECTION_BYTES
    values = []
    for reply in replies:
        values.append(replay_value(reply, left))
        left -= len(values[-1]["projections"]) * 3 // 4
    scripts = read_texts(*BASICS, *CANVAS, *(ROUTING / f"{part}.js" for part in PARTS))
    parts = {
        "TITLE": html.escape(", ".join(reply.title for reply in replies)),
        "STYLE": read_texts(HERE / "replay.css"),
        "VIEW_STYLE": read_texts(ROUTING / "routing.css"),
        "VIEW": read_texts(ROUTING / "routing.html"),
        "VIEW_SCRIPT": scripts,
        "SCRIPT": read_texts(HERE / "replay.js"),
        "DATA": json.dumps(values).replace("<", "\\u003c"),
    }
    head, *rest = read_texts(HERE / "replay.html").split("{{")
    pieces = (piece.partition("}}") for piece in rest)
    return head + "".join(parts[name] + after for name, _, after in pieces)


def replay_value(reply: ReplayedReply, most: int) -> dict[str, Any]:
    """A reply as the page's script takes it, with the weights of single projections in at most so many bytes."""
    record = reply.record
    value = record.since(0)
    value["meta"] = {**value["meta"], "finished": True, "against": None}
    return {
        "title": reply.title,
        "system": reply.system,
        "turns": [asdict(turn) for turn in reply.turns],
        "routing": value,
        "names": record.names,
        "layers": record.layer_of,
        "projections": encoded(record.projections) if len(record.projections) <= most else "",
    }
