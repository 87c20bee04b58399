"""The routing view: which experts handled each token of a reply, drawn while the reply is generated.

Its value is what `RoutingRecord.since` returns, so that only new tokens are sent; the weights of single projections are
fetched when a layer is opened.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from app.services.routing_stream import fetch_projections, fetch_router, fetch_routing, fetch_similar
from app.views.component import view

HERE = Path(__file__).parent
PARTS = ("data", "hues", "routing", "timeline", "layer", "table", "interactions")


def routing_view(compact: bool = False, **options: Any) -> gr.HTML:
    """The component; any number of them can be on one page.

    Args:
        compact: only the heatmap of the whole reply and a summary, for a narrow column.
        options: further arguments of `gr.HTML`.
    """
    if compact:
        template = (HERE / "routing.html").read_text(encoding="utf-8")
        options["html_template"] = template.replace('class="routing"', 'class="routing compact"')
    functions = [fetch_routing, fetch_projections, fetch_router, fetch_similar]
    return view(HERE, "routing", *PARTS, canvas=True, server_functions=functions, **options)
