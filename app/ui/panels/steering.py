"""Routing overrides: what can be changed in the routing of the next reply, for the chosen adapter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gradio as gr

from app.services.steering_options import steering_options
from app.views.steering import steering_view


@dataclass
class SteeringPanel:
    """The components; `shown` are the outputs of `show_steering`."""

    box: gr.Accordion
    view: gr.HTML

    @property
    def shown(self) -> list[Any]:
        return [self.box, self.view]


def build_steering() -> SteeringPanel:
    """Create the panel in the current layout block; hidden while there is nothing to override."""
    with gr.Accordion(
        "Routing overrides", open=False, visible=False, elem_classes="accordion-card", elem_id="steering"
    ) as box:
        view = steering_view(value=None, elem_id="steering-view")
    return SteeringPanel(box, view)


def show_steering(target: str) -> list[Any]:
    """The panel for a target, as trained, for `shown`."""
    value = steering_options(target)
    return [gr.Accordion(visible=value is not None), value]
