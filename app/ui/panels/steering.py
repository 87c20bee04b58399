"""Under your hand: what can be changed in the routing of the next reply, for the adapter that is chosen."""

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
    """Make the panel where we stand in the layout; hidden as long as there is nothing to steer."""
    with gr.Accordion(
        "Under your hand", open=False, visible=False, elem_classes="accordion-card", elem_id="steering"
    ) as box:
        view = steering_view(value=None, elem_id="steering-view")
    return SteeringPanel(box, view)


def show_steering(target: str) -> list[Any]:
    """The panel for a target, as trained, for `shown`."""
    value = steering_options(target)
    return [gr.Accordion(visible=value is not None), value]
