"""The Chat tab's options: a system prompt, and the settings of a reply."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import gradio as gr
from gradio.components import Component

from app.ui.forms import help_of, label_of, setting_component
from mole.chat.settings import ChatSettings
from mole.core import limits
from mole.core.gpus import on_zerogpu

SETTINGS = {item.name: item for item in dataclasses.fields(ChatSettings)}
STOP_HELP = r"Texts that end the reply, one a line; \n is a line break."
LENGTH = 128
"""Maximum length of a reply, until the person sets it: a page is read while it is written."""


@dataclass
class ChatOptions:
    """The components: `system`, and one for each of the `ChatSettings`."""

    system: gr.Textbox
    settings: dict[str, Component]
    free: gr.Button

    @property
    def inputs(self) -> list[Component]:
        """The system prompt, and what `chosen_settings` takes."""
        return [self.system, *(self.settings[name] for name in SETTINGS)]


def build_chat_options() -> ChatOptions:
    """Create the options in the current layout block."""
    made: dict[str, Component] = {}

    def add(name: str, **options: Any) -> None:
        made[name] = setting_component(ChatSettings, SETTINGS[name], elem_id=f"chat-{name}", **options)

    def add_slider(name: str, low: float, high: float, step: float, value: float) -> None:
        item = SETTINGS[name]
        made[name] = gr.Slider(
            low, high, value=value, step=step, label=label_of(item), info=help_of(item), buttons=[],
            elem_id=f"chat-{name}",
        )  # fmt: skip

    with gr.Accordion("Options", open=False, elem_classes="accordion-card", elem_id="chat-options"):
        system = gr.Textbox(label="System prompt", info="Leave empty for the model's default.", lines=2)
        with gr.Row():
            add_slider("max_new_tokens", 1, limits.NEW_TOKENS, 1, LENGTH)
            add_slider("temperature", 0, 2, 0.05, 0.0)
        with gr.Row():
            add_slider("top_p", 0.05, 1, 0.05, 1.0)
            add("seed")
        with gr.Accordion("More", open=False, elem_classes="accordion-card", elem_id="chat-more"):
            with gr.Row():
                add("top_k")
                add("min_p")
            with gr.Row():
                add("repetition_penalty")
                made["stop_strings"] = gr.Textbox(
                    label=label_of(SETTINGS["stop_strings"]), info=STOP_HELP, lines=1, max_lines=4,
                    elem_id="chat-stop_strings",
                )  # fmt: skip
            add("enable_thinking")
        with gr.Row(elem_classes="buttons"):
            free = gr.Button("Unload models", size="md", visible=not on_zerogpu(), elem_id="chat-unload")
    return ChatOptions(system, made, free)


def chosen_settings(values: list[Any]) -> dict[str, Any]:
    """The `ChatSettings` with the values of the components, by name; an empty box leaves the default.

    Raises `ConfigError` for a value that is not allowed.
    """
    given = {name: value for name, value in zip(SETTINGS, values, strict=True) if value not in (None, "")}
    if isinstance(lines := given.get("stop_strings"), str):
        given["stop_strings"] = [line.replace(r"\n", "\n") for line in lines.splitlines() if line]
    return dataclasses.asdict(ChatSettings.from_dict(given))
