"""The routing view: which experts handled each token of a reply, drawn while the reply is generated.

One `gr.HTML` with a constant template. Its value is what `RoutingRecord.since` returns, so that only new tokens are
sent; the weights of single projections are fetched when a layer is opened.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from app.services.routing_stream import fetch_projections, fetch_routing
from app.views.component import component

HERE = Path(__file__).parent
PARTS = ("data", "routing", "timeline", "layer", "table", "hands")


def routing_view(compact: bool = False, **given: Any) -> gr.HTML:
    """The component; any number of them can stand on one page.

    Args:
        compact: heatmap of the whole reply and a line in words only, to stand in a narrow column.
        given: further arguments of `gr.HTML`.
    """
    if compact:
        template = (HERE / "routing.html").read_text(encoding="utf-8")
        given["html_template"] = template.replace('class="routing"', 'class="routing compact"')
    return component(HERE, "routing", *PARTS, server_functions=[fetch_routing, fetch_projections], **given)
