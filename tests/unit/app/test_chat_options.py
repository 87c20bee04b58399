"""The options of a reply follow from its settings."""

from __future__ import annotations

import dataclasses

import gradio as gr
import pytest

from app.ui.panels.chat_options import LENGTH, ChatOptions, build_chat_options, chosen_settings
from mole.chat.settings import ChatSettings
from mole.core.errors import ConfigError


@pytest.fixture(scope="module")
def options() -> ChatOptions:
    with gr.Blocks(analytics_enabled=False):
        return build_chat_options()


def test_every_setting_has_its_component_and_its_default(options: ChatOptions) -> None:
    assert list(options.settings) == [item.name for item in dataclasses.fields(ChatSettings)]
    system, *values = (component.value for component in options.inputs)
    assert not system
    assert chosen_settings(values) == dataclasses.asdict(ChatSettings(max_new_tokens=LENGTH))


def test_a_value_reaches_the_setting_of_its_name_and_an_empty_box_is_the_default(options: ChatOptions) -> None:
    _, *values = (component.value for component in options.inputs)
    named = dict(zip(options.settings, values, strict=True))
    named |= {"top_k": 20, "stop_strings": "###\n\n[User]: \\n", "seed": None, "enable_thinking": True}
    chosen = chosen_settings(list(named.values()))
    assert (chosen["top_k"], chosen["seed"], chosen["enable_thinking"]) == (20, 0, True)
    assert chosen["stop_strings"] == ["###", "[User]: \n"]
    with pytest.raises(ConfigError, match="min_p is 2"):
        chosen_settings(list((named | {"min_p": 2}).values()))
