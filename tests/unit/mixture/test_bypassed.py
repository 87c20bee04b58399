"""Projections whose weights the base model reads or changes without calling them get no adapter to be trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from adapting import layers_of, logits, settings, shake
from architectures import build
from peft import PeftModel, get_peft_model

from mole.core.errors import ConfigError
from mole.mixture import bypassed


@pytest.mark.parametrize(
    ("arch", "targets", "named"),
    [
        ("mamba", ["in_proj", "dt_proj"], r"dt_proj, since a state-space model reads its weights"),
        ("mamba2", ["out_proj"], r"out_proj, since a state-space model"),
        ("bamba", r".*mamba\..*_proj", r"mamba\.out_proj, since a state-space model"),
        ("rwkv", ["key", "output"], r"attention\.output, since RWKV rescales"),
        ("phimoe", r".*\.router", r"router, since a PhimoeTopKRouter returns"),
    ],
)
def test_naming_one_is_refused_in_one_line(arch: str, targets: Any, named: str) -> None:
    model = build(arch)
    with pytest.raises(ConfigError, match=rf"adapter.target_modules is .*without .*{named}.*all-linear leaves it out"):
        get_peft_model(model, settings(target_modules=targets))
    assert not layers_of(model)


def test_all_linear_leaves_them_out_and_says_so() -> None:
    with pytest.warns(UserWarning, match="all-linear leaves out dt_proj, out_proj, x_proj: a state-space model reads"):
        model = get_peft_model(build("mamba"), settings())
    assert {layer.name.rpartition(".")[2] for layer in layers_of(model)} == {"in_proj"}


def test_a_second_adapter_leaves_them_out_too() -> None:
    model = get_peft_model(build("jamba"), settings())
    model.add_adapter("other", settings("topk"))
    assert all(set(layer.routers) == {"default", "other"} for layer in layers_of(model))


def test_those_that_are_excluded_anyway_are_not_refused() -> None:
    """Bamba's attention has projections of such names too."""
    values = {"target_modules": r".*\.(in|out|q)_proj", "exclude_modules": ["mamba.out_proj"]}
    model = get_peft_model(build("bamba"), settings(**values))
    assert [layer.name for layer in layers_of(model)] == [
        "model.layers.0.mamba.in_proj", "model.layers.1.self_attn.q_proj",
    ]  # fmt: skip


def test_an_attention_layer_keeps_its_out_proj() -> None:
    model = get_peft_model(build("opt"), settings(target_modules=["out_proj"]))
    assert len(layers_of(model)) == 2


def test_an_adapter_that_has_them_already_still_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Earlier versions trained them, and without fused kernels, or in evaluation, they compute what they should."""
    with monkeypatch.context() as patch:
        patch.setattr("mole.mixture.model.bypassed_projections", lambda model: {})
        model = get_peft_model(build("mamba2"), settings(target_modules=["in_proj", "out_proj"])).eval()
    shake(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build("mamba2"), tmp_path).eval()
    assert len(layers_of(loaded)) == 4 and torch.equal(logits(loaded), logits(model))
    with pytest.raises(ConfigError, match="out_proj"):
        PeftModel.from_pretrained(build("mamba2"), tmp_path, is_trainable=True)


def test_ordinary_models_have_none() -> None:
    assert not any(map(bypassed.bypassed_projections, map(build, ("llama", "gpt2", "falcon", "qwen3_next", "t5"))))
