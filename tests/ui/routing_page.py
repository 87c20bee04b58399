"""A page with nothing but the routing view, fed with generated deltas: `python routing_page.py PORT TOKENS`."""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from app.routing_view import REELS, Reel, routing_view

import gradio as gr  # isort: skip

LAYERS, EXPERTS, PROMPT = 32, 16, 4
HOSTILE = " <img src=x onerror=alert(1)>"


def filmed(tokens: int) -> Reel:
    """A reel of random routing; its sixth token is HTML."""
    chance = random.Random(0)
    reel = REELS.new(router="dynmole", layers=LAYERS, experts=EXPERTS, counts=[EXPERTS] * LAYERS, prompt=PROMPT)
    for index in range(tokens):
        text = HOSTILE if index == PROMPT + 1 else f" t{index}"
        entropy, active = chance.randbytes(LAYERS), chance.randbytes(LAYERS)
        reel.extend([text], chance.randbytes(LAYERS * EXPERTS), entropy, active)
    return reel


def play(tokens: int, losing: bool = False) -> Iterator[dict[str, Any]]:
    """The deltas of a reel, token by token at 40 a second; `losing` leaves out every other one."""
    reel = filmed(tokens)
    for end in range(PROMPT, tokens + 1):
        part = Reel(reel.meta, reel.tokens[:end], reel.weights[: end * LAYERS * EXPERTS], reel.entropy[: end * LAYERS])
        part.active = reel.active[: end * LAYERS]
        if not losing or end % 2:
            yield part.since(0 if end == PROMPT else end - 1)
        time.sleep(1 / 40)


if __name__ == "__main__":
    port, tokens = int(sys.argv[1]), int(sys.argv[2])
    with gr.Blocks(analytics_enabled=False) as page:
        view = routing_view(elem_id="routing-view")
        gr.Button("Play", elem_id="play").click(lambda: (yield from play(tokens)), None, view, show_progress="hidden")
        gr.Button("Lose", elem_id="lose").click(lambda: (yield from play(40, True)), None, view, show_progress="hidden")
    theme = gr.themes.Base(font="sans-serif", font_mono="monospace")
    page.launch(server_port=port, ssr_mode=False, quiet=True, theme=theme)
