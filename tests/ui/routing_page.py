"""A page with nothing but routing views, fed with generated deltas: `python routing_page.py PORT TOKENS`."""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from app.services.routing_stream import ROUTING_RECORDS, RoutingRecord
from app.views.routing import routing_view

import gradio as gr  # isort: skip

LAYERS, EXPERTS, PROMPT = 32, 16, 4
HOSTILE = " <img src=x onerror=alert(1)>"
PROJECTIONS = ["q_proj", "k_proj", "v_proj"]
EARLIER = "earlier"


def recorded(tokens: int, layers: int = LAYERS, experts: int = EXPERTS, seed: int = 0, **meta: Any) -> RoutingRecord:
    """A record of random routing, a layer's weights the mean of its projections'; its sixth token is HTML."""
    chance = random.Random(seed)
    record = ROUTING_RECORDS.new(
        names=PROJECTIONS * layers,
        layer_of=[layer for layer in range(layers) for _ in PROJECTIONS],
        router="dynmole", layers=layers, experts=experts, counts=[experts] * layers, prompt=PROMPT, threshold=0.8,
        about=f"dynmole on chance · {experts} experts · {layers} layers", **meta,
    )  # fmt: skip
    for index in range(tokens):
        text = HOSTILE if index == PROMPT + 1 else f" t{index}"
        parts = [[chance.randbytes(experts) for _ in PROJECTIONS] for _ in range(layers)]
        weights = bytes(round(sum(column) / len(column)) for layer in parts for column in zip(*layer, strict=True))
        packed = b"".join(row for layer in parts for row in layer)
        record.extend(
            [text], weights, chance.randbytes(layers), chance.randbytes(layers),
            strongest=chance.randbytes(1), hues=bytes([32 * index % 256, 255]), projections=packed,
        )  # fmt: skip
    return record


def until(record: RoutingRecord, end: int) -> RoutingRecord:
    """The record as it was after its first `end` tokens."""
    layers, experts = record.meta["layers"], record.meta["experts"]
    part = RoutingRecord(record.meta, tokens=record.tokens[:end], weights=record.weights[: end * layers * experts])
    part.strongest, part.hues = record.strongest[:end], record.hues[: 2 * end]
    part.entropy, part.active = record.entropy[: end * layers], record.active[: end * layers]
    return part


def play(tokens: int, losing: bool = False) -> Iterator[dict[str, Any]]:
    """The deltas of a record, token by token at 40 a second; `losing` leaves out every other one."""
    record = recorded(tokens)
    for end in range(PROMPT, tokens + 1):
        if not losing or end % 2:
            yield until(record, end).since(0 if end == PROMPT else end - 1)
        time.sleep(1 / 40)


def at_once(tokens: int) -> dict[str, Any]:
    """A whole reply in one delta, to be compared with an earlier one."""
    before = recorded(tokens, 4, 3, seed=1)
    words = {"against": before.meta["id"], "against_label": "the first try", "finished": True}
    return recorded(tokens, 4, 3, **words).since(0)


def long_reply(tokens: int) -> Iterator[dict[str, Any]]:
    """A long reply that is nearly there, then its last tokens one by one."""
    record = recorded(tokens, 8, 8)
    for end in range(tokens - 60, tokens + 1):
        yield until(record, end).since(0 if end == tokens - 60 else end - 1)
        time.sleep(1 / 40)


if __name__ == "__main__":
    port, tokens = int(sys.argv[1]), int(sys.argv[2])
    with gr.Blocks(analytics_enabled=False) as page:
        view = routing_view(elem_id="routing-view")
        gr.Button("Play", elem_id="play").click(lambda: (yield from play(tokens)), None, view, show_progress="hidden")
        gr.Button("Lose", elem_id="lose").click(lambda: (yield from play(40, True)), None, view, show_progress="hidden")
        gr.Button("Long", elem_id="long").click(
            lambda: (yield from long_reply(1500)), None, view, show_progress="hidden"
        )
        second = routing_view(elem_id="second-view")
        small = routing_view(compact=True, elem_id="small-view")
        gr.Button("Twice", elem_id="twice").click(
            lambda: [at_once(24)] * 3, None, [view, second, small], show_progress="hidden"
        )
    theme = gr.themes.Base(font="sans-serif", font_mono="monospace")
    page.launch(server_port=port, ssr_mode=False, quiet=True, theme=theme)
