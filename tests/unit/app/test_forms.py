"""The form follows the config: every setting is there, and its command line starts the same run."""

from __future__ import annotations

import dataclasses
import shlex
from typing import Any

import gradio as gr
import pytest

from app.ui import forms
from app.ui.panels import more_files
from app.ui.tabs import train
from mole.cli import parser
from mole.cli.commands.train import train_settings
from mole.config import ROUTERS, SECTIONS, RunConfig
from mole.core.errors import InputError


@pytest.fixture(scope="module")
def form() -> forms.RunForm:
    with gr.Blocks(analytics_enabled=False):
        return train.build_train_tab(gr.State([])).form


def values_of(form: forms.RunForm, **changed: Any) -> list[Any]:
    """What the page sends: the components' values, some of them changed (by element id without `field-`)."""
    return [changed.get(made.elem_id.removeprefix("field-").replace("-", "_"), made.value) for made in form.inputs]


@pytest.mark.parametrize("chosen", [None, True, False])
def test_a_flag_may_be_left_open(form: forms.RunForm, chosen: bool | None) -> None:
    config = RunConfig.from_dict({"data": {"path": "x.jsonl", "enable_thinking": chosen}})
    assert form.config(form.fill(config)).data.enable_thinking is chosen


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
        {"adapter_layers_to_transform": "1", "adapter_layers_pattern": "layers", "adapter_modules_to_save": "lm_head"},
        {"adapter_bias": "lora_only", "adapter_trainable_token_indices": "{embed_tokens: [3, 4]}"},
        {"adapter_trainable_token_indices": "3", "adapter_exclude_modules": "[v_proj]"},
        {"adapter_router": "lora", "training_max_steps": 0, "training_num_train_epochs": 2, "model_device": "cpu"},
        {"data_path": "owner/name", "data_name": "easy", "data_split": "test"},
        {"data_path": "[a.jsonl, 'b, c.csv']"},
        {"data_path": "[a.jsonl, {path: b.csv, weight: 0.5, columns: {prompt: q}}, {path: o/n, split: test}]"},
    ],
)
def test_the_command_starts_the_same_run(form: forms.RunForm, changed: dict[str, Any]) -> None:
    config = form.config(values_of(form, **changed))
    words = shlex.split(forms.command_line(config).replace("\\\n", " "))
    assert words[:1] == ["mole"]
    assert RunConfig.from_dict(train_settings(parser.build_parser().parse_args(words[1:]))) == config


@pytest.mark.parametrize(
    ("changed", "field"),
    [
        ({"adapter_num_experts": "0"}, "field-adapter-num_experts"),
        ({"adapter_dynmole_top_p": 1.5}, "field-adapter-dynmole-top_p"),
        ({"training_learning_rate": None}, "field-training-learning_rate"),
        ({"data_columns": "no mapping"}, "field-data-columns"),
        ({"data_path_3": "b.csv", "data_path_3_weight": 0}, "field-data-path-3-weight"),
        ({"data_path_2": "a.csv", "data_path_3": "b.csv", "data_path_3_columns": "x"}, "field-data-path-3-columns"),
        ({"data_path_2": "a.csv", "data_path_1_weight": -1}, "field-data-path-1-weight"),
    ],
)
def test_an_error_finds_its_field(form: forms.RunForm, changed: dict[str, Any], field: str) -> None:
    values = values_of(form, **changed)
    with pytest.raises(InputError) as wrong:
        form.config(values)
    assert form.problem_of(values, wrong.value)["field"] == field


@pytest.mark.parametrize(
    "adapter",
    [
        {"router": "adamole", "max_threshold": 0.2, "num_experts": [2, 4, 6, 8]},
        {"router": "topk", "top_k": 3, "target_modules": ["q_proj"], "num_experts": [4]},
        {"router": "lora", "target_modules": ["q_proj", "v_proj"]},
    ],
)
def test_a_config_put_into_the_form_comes_out_again(form: forms.RunForm, adapter: dict[str, Any]) -> None:
    data = {"columns": {"prompt": "my question", "completion": "reply"}, "eval_path": "held out.jsonl"}
    config = RunConfig.from_dict({"name": "again", "adapter": adapter, "data": data, "model": {"dtype": "float32"}})
    assert form.config(form.fill(config)) == config
    words = shlex.split(forms.command_line(config).replace("\\\n", " "))
    assert RunConfig.from_dict(train_settings(parser.build_parser().parse_args(words[1:]))) == config


@pytest.mark.parametrize(
    ("data", "rows"),
    [
        ({"path": ["a.jsonl", {"path": "b, c.csv", "weight": 0.5}, "o/n:easy:test"]}, 2),
        ({"path": [{"path": "a", "weight": 2}, {"path": "b", "columns": {"text": "t"}}]}, 1),
        ({"path": ["a", {"path": "b", "columns": {}}], "columns": {"text": "t"}, "eval_path": "c"}, 1),
        ({"path": [{"path": "o/n", "split": "test"}, "b"]}, 1),
        ({"path": ["a", {"path": "o/n", "split": "test"}]}, 0),  # no row shows that: the list stays text
        ({"path": ["a", "b"], "columns": {"text": "t"}}, 0),
        ({"path": [{"path": "a", "weight": 2}]}, 0),
        ({"path": list("abcdefg")}, 0),
    ],
)
def test_several_files_put_into_the_form_come_out_again(form: forms.RunForm, data: dict[str, Any], rows: int) -> None:
    config = RunConfig.from_dict({"data": data})
    values = form.fill(config)
    assert form.config(values) == config
    assert form.further is not None
    assert sum(bool(path) for path in values[-len(form.further.inputs) + 1 :: 3]) == rows
    words = shlex.split(forms.command_line(config).replace("\\\n", " "))
    assert RunConfig.from_dict(train_settings(parser.build_parser().parse_args(words[1:]))) == config


def test_rows_move_up_when_a_file_is_removed() -> None:
    values = ["a", 1, "", "b", 2, "{text: t}", "c", 0.5, ""] + ["", 1.0, ""] * 2
    kept = more_files.remover(1)(3, *values)
    assert kept[:15] == ["a", 1, "", "c", 0.5, "", *["", 1.0, ""] * 3]
    shown, *_ = kept[15:]
    assert shown == 2
    assert more_files.visibility(0, "", "", "x", "", "")[0] == 3
    assert more_files.visibility(9, *[""] * 5)[0] == 5


def test_a_form_filled_anew_keeps_nothing_of_another_router(form: forms.RunForm) -> None:
    values = form.fill(RunConfig.from_dict({"adapter": {"router": "topk", "top_k": 5}}))
    inputs = dict(zip((made.elem_id for made in form.inputs), values, strict=True))
    assert inputs["field-adapter-topk-top_k"] == 5 and inputs["field-adapter-dynmole-keep_top_k"] == 2
