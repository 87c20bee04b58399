"""`MoleConfig`: every setting of every router in `adapter_config.json`, and what is refused."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from adapting import layers_of
from peft import PeftConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTuner

from mole import MoleConfig
from mole.config import ROUTERS, AdapterConfig, spec_of
from mole.core.errors import ConfigError, InputError
from mole.mixture.model import mole_config
from mole.mixture.steering import override_params

Make = Callable[..., Any]

SHARED = {
    "num_experts": [2, 4], "r": 3, "lora_alpha": 7.0, "lora_dropout": 0.2,
    "target_modules": ["model.layers.1.self_attn.q_proj"], "exclude_modules": ["model.layers.1.self_attn.k_proj"],
    "layers_to_transform": [1], "layers_pattern": ["model.layers"], "modules_to_save": ["lm_head"], "use_rslora": True,
    "bias": "lora_only", "trainable_token_indices": [7, 5],
    "rank_pattern": {"model.layers.1.self_attn.q_proj": 5}, "alpha_pattern": {"model.layers.1.self_attn.q_proj": 2.5},
    "balance_loss_coef": 0.21, "entropy_loss_coef": 0.22, "z_loss_coef": 0.23,
}  # fmt: skip


def other_value(item: dataclasses.Field[Any]) -> Any:
    """A value of a setting that is not its default."""
    if choices := spec_of(item).choices:
        return next(choice for choice in choices if choice != item.default)
    if "bool" in str(item.type):
        return not item.default
    return item.default + 1 if isinstance(item.default, int) else 0.7 * (item.default or 0.3)


@pytest.mark.parametrize("router", ROUTERS)
def test_every_setting_is_in_adapter_config_json_and_comes_back(router: str, tiny_model: Make, tmp_path: Path) -> None:
    own = {item.name: other_value(item) for item in dataclasses.fields(ROUTERS[router])}
    values = {"router": router, **own, **SHARED}
    if router == "lora":
        values["num_experts"] = 1
    defaults = AdapterConfig.from_flat({"router": router}).to_flat()
    del defaults["init_from"]  # of the run, not of the adapter
    assert set(values) == set(defaults), "a new setting of all routers needs a value in SHARED"
    changed = {name for name in values if values[name] != defaults[name]}
    assert changed == set(values) - {"router"} - ({"num_experts"} if router == "lora" else set())
    if not hasattr(BaseTuner, "_get_learnable_bias_state_dict"):  # this PEFT saves no biases
        values["bias"] = "none"
    model = get_peft_model(tiny_model("phi"), MoleConfig(task_type="CAUSAL_LM", **values))
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert {name: written[name] for name in values} == values
    assert written["peft_type"] == "MOLE_STUDIO"
    restored = PeftConfig.from_pretrained(tmp_path)
    assert {name: getattr(restored, name) for name in values} == values
    loaded = PeftModel.from_pretrained(tiny_model("phi"), tmp_path)
    for before, after in zip(layers_of(model), layers_of(loaded), strict=True):
        router_before, router_after = before.routers["default"], after.routers["default"]
        assert router_after.params == router_before.params
        assert router_after.num_experts == router_before.num_experts
        assert (after.r, after.scaling, after.dropout) == (before.r, before.scaling, before.dropout)


@pytest.mark.parametrize("router", ROUTERS)
def test_a_config_holds_the_defaults_of_its_router_in_full(router: str) -> None:
    config = MoleConfig(router=router)
    flat = AdapterConfig.from_flat({"router": router}).to_flat()
    del flat["init_from"]  # of the run, not of the adapter
    settled = {"renormalize": True} if router == "topk" else {}
    assert {name: getattr(config, name) for name in flat} == {**flat, **settled}


def test_an_adapter_config_becomes_a_peft_config_and_back() -> None:
    adapter = AdapterConfig.from_flat({"router": "adamole", "max_threshold": 0.2, "num_experts": [2, 6]})
    assert mole_config(adapter, task_type="CAUSAL_LM").adapter() == adapter


@pytest.mark.parametrize(("router", "foreign"), [("topk", {"top_p": 0.5}), ("dense", {"entropy_index": 1.5})])
def test_a_setting_of_another_router_is_refused_with_those_of_this_one(router: str, foreign: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=f"{next(iter(foreign))}.*{router}.*balance_loss_coef"):
        MoleConfig(router=router, **foreign)


def test_a_setting_nobody_has_is_refused() -> None:
    with pytest.raises((TypeError, InputError), match="top_q"):
        MoleConfig(router="topk", top_q=3)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("router", "nosuch"),
        ("num_experts", 0),
        ("num_experts", [2, 0]),
        ("r", 0),
        ("top_p", 1.5),
        ("lora_dropout", 1.0),
    ],
)
def test_a_value_outside_its_bounds_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=field):
        MoleConfig(**{"router": "dynmole", field: value})


def test_every_field_of_the_config_says_what_it_is() -> None:
    declared = {item.name for item in dataclasses.fields(AdapterConfig)} - {"params", "init_from"}
    for params in ROUTERS.values():
        declared |= {item.name for item in dataclasses.fields(params)}
    held = {item.name: item for item in dataclasses.fields(MoleConfig)}
    assert all(held[name].metadata["help"] for name in declared)


@pytest.mark.parametrize("top_k", [1, 2])
def test_a_top_k_adapter_says_whether_it_renormalises_and_one_that_does_not_say_does(
    top_k: int, tiny_model: Make, tmp_path: Path
) -> None:
    settings = {"router": "topk", "top_k": top_k, "target_modules": ["q_proj"]}
    get_peft_model(tiny_model("llama"), MoleConfig(**settings)).save_pretrained(tmp_path)
    values = json.loads((tmp_path / "adapter_config.json").read_text())
    assert values["renormalize"] is (top_k > 1)
    for told in (True, False):
        if not told:  # as earlier versions wrote it
            del values["renormalize"]
            (tmp_path / "adapter_config.json").write_text(json.dumps(values))
        params = layers_of(PeftModel.from_pretrained(tiny_model("llama"), tmp_path))[0].routers["default"].params
        assert params.renormalized is (top_k > 1 or not told)
        assert override_params(params, {"top_k": 1}).renormalized is params.renormalized, "for a reply too"
