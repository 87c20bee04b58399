"""The live routing component: what the routers did for every token of a reply, drawn while it is written.

One `gr.HTML` with a constant template. Its value is a delta (see `Reel.since`), so what travels is the new tokens only;
what projections did stays here until somebody opens a layer.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from app.services.routing_records import projections, routing
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
    return component(HERE, "routing", *PARTS, server_functions=[routing, projections], **given)
