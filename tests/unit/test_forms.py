"""The form follows the config: every setting is there, and its command line starts the same run."""

from __future__ import annotations

import dataclasses
import shlex
from typing import Any

import gradio as gr
import pytest

from app import forms
from app.tabs import train
from mole import cli, commands
from mole.config import ROUTERS, SECTIONS, RunConfig
from mole.errors import InputError


@pytest.fixture(scope="module")
def form() -> forms.RunForm:
    with gr.Blocks(analytics_enabled=False):
        return train.build().form


def values_of(form: forms.RunForm, **changed: Any) -> list[Any]:
    """What the page sends: the components' values, some of them changed (by element id without `field-`)."""
    return [changed.get(made.elem_id.removeprefix("field-").replace("-", "_"), made.value) for made in form.inputs]


def test_every_setting_of_a_run_has_its_field(form: forms.RunForm) -> None:
    settings = {
        f"{section}.{item.name}"
        for section, owner in SECTIONS.items()
        for item in dataclasses.fields(owner)
        if "spec" in item.metadata
    }
    assert set(form.shared) == settings | {"name"}
    for router, params in ROUTERS.items():
        assert set(form.own[router]) == {item.name for item in dataclasses.fields(params)}


def test_an_untouched_form_is_the_default_config(form: forms.RunForm) -> None:
    config = form.config(values_of(form))
    default = RunConfig()
    assert config.adapter == default.adapter and config.training == default.training and config.model == default.model


@pytest.mark.parametrize(
    "changed",
    [
        {"adapter_router": "adamole", "adapter_adamole_max_threshold": 0.2, "training_learning_rate": 1.25e-4},
        {"adapter_num_experts": "2,4,6,8", "adapter_target_modules": "q_proj, v_proj", "name": "a-b"},
        {"data_columns": "{prompt: my question, completion: reply}", "adapter_dynmole_inclusive_top_p": True},
        {"adapter_router": "lora", "training_max_steps": 0, "training_num_train_epochs": 2, "model_device": "cpu"},
    ],
)
def test_the_command_starts_the_same_run(form: forms.RunForm, changed: dict[str, Any]) -> None:
    config = form.config(values_of(form, **changed))
    words = shlex.split(forms.command(config).replace("\\\n", " "))
    assert words[:1] == ["mole"]
    assert RunConfig.from_dict(commands.train_settings(cli.parser().parse_args(words[1:]))) == config


@pytest.mark.parametrize(
    ("changed", "field"),
    [
        ({"adapter_num_experts": "0"}, "field-adapter-num_experts"),
        ({"adapter_dynmole_top_p": 1.5}, "field-adapter-dynmole-top_p"),
        ({"training_learning_rate": None}, "field-training-learning_rate"),
        ({"data_columns": "no mapping"}, "field-data-columns"),
    ],
)
def test_an_error_finds_its_field(form: forms.RunForm, changed: dict[str, Any], field: str) -> None:
    values = values_of(form, **changed)
    with pytest.raises(InputError) as wrong:
        form.config(values)
    assert train.said(form, tuple(values), wrong.value)["field"] == field
