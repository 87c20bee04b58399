"""Routing overrides: what can be changed for a reply, what it does, and that the model is as before afterwards."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from adapting import adapt, layers_of, logits

from mole import record_routing
from mole.config import ROUTERS
from mole.core.errors import ConfigError, InputError
from mole.mixture.steering import Steering, describe_steering, steer, steerable

OTHER = {
    "dynmole": {"entropy_threshold": 0.2, "top_p": 0.3, "keep_top_k": 1, "inclusive_top_p": True},
    "adamole": {"max_threshold": 0.9},
    "topk": {"top_k": 1},
    "topp": {"top_p": 0.1},
    "threshold": {"threshold": 0.4},
}


def weights_of(model: Any) -> torch.Tensor:
    with record_routing(model) as trace:
        logits(model)
    return trace.weights


@pytest.mark.parametrize("router", ROUTERS)
def test_an_empty_steering_changes_nothing(router: str, tiny_model: Callable[..., Any]) -> None:
    model = adapt(tiny_model(), router)
    as_trained = logits(model)
    with steer(model, Steering()):
        assert torch.equal(logits(model), as_trained)


@pytest.mark.parametrize("router", [name for name in ROUTERS if name != "lora"])
def test_a_muted_expert_has_no_weight_and_adds_nothing(router: str, tiny_model: Callable[..., Any]) -> None:
    model = adapt(tiny_model(), router)
    before = logits(model)
    with steer(model, Steering(muted=frozenset({2}))):
        assert not weights_of(model)[..., 2].any()
        muted = logits(model)
        with torch.no_grad():  # whatever the muted expert holds, it is not asked
            for layer in layers_of(model):
                layer.mole_studio_B["default"].weight[:, 4:6] += 1
        assert torch.equal(logits(model), muted)
        for layer in layers_of(model):
            with torch.no_grad():
                layer.mole_studio_B["default"].weight[:, 4:6] -= 1
    assert not torch.equal(muted, before)


def test_every_setting_that_can_be_steered_is_tried_here() -> None:
    tried = {router: set(values) for router, values in OTHER.items()}
    assert tried == {router: set(steerable(router)) for router in ROUTERS if steerable(router)}, "OTHER has them all"


@pytest.mark.parametrize("router", OTHER)
def test_each_setting_acts_at_once_and_is_put_back(router: str, tiny_model: Callable[..., Any]) -> None:
    model = adapt(tiny_model(), router)
    as_trained, params = logits(model), [copy.copy(layer.routers["default"].params) for layer in layers_of(model)]
    state = copy.deepcopy(model.state_dict())
    with steer(model, Steering(OTHER[router])):
        for layer in layers_of(model):
            assert OTHER[router].items() <= vars(layer.routers["default"].params).items()
        assert not torch.equal(logits(model), as_trained)
    assert torch.equal(logits(model), as_trained)
    assert [layer.routers["default"].params for layer in layers_of(model)] == params
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())


def test_it_is_put_back_after_an_error_too(tiny_model: Callable[..., Any]) -> None:
    model = adapt(tiny_model())
    as_trained = logits(model)
    with pytest.raises(RuntimeError, match="halfway"), steer(model, Steering({"top_p": 0.2}, frozenset({0}))):
        raise RuntimeError("halfway")
    assert torch.equal(logits(model), as_trained)
    assert all(layer.routers["default"].allowed is None for layer in layers_of(model))


def test_two_models_never_share_it(tiny_model: Callable[..., Any]) -> None:
    one, two = adapt(tiny_model()), adapt(tiny_model())
    as_trained = logits(two)
    with steer(one, Steering({"keep_top_k": 1, "entropy_threshold": 0.0}, frozenset({1}))):
        assert torch.equal(logits(two), as_trained)
        assert not torch.equal(logits(one), as_trained)


def test_saving_while_steered_saves_the_adapter_as_trained(tiny_model: Callable[..., Any], tmp_path: Any) -> None:
    model = adapt(tiny_model())
    model.save_pretrained(tmp_path / "before")
    with steer(model, Steering({"top_p": 0.2}, frozenset({0}))):
        model.save_pretrained(tmp_path / "steered")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "before" / name).read_bytes() == (tmp_path / "steered" / name).read_bytes()


def test_all_experts_muted_is_the_base_model(tiny_model: Callable[..., Any]) -> None:
    model = adapt(tiny_model())
    with steer(model, Steering(muted=frozenset(range(4)))):
        steered = logits(model)
    with model.disable_adapter():
        assert torch.equal(steered, logits(model))


def test_pinned_experts_decide_among_themselves_and_a_layer_without_them_routes_as_trained(
    tiny_model: Callable[..., Any],
) -> None:
    model = adapt(tiny_model(), "topk", num_experts=[2, 4])  # layer 0 has experts 0 and 1, layer 1 has four
    trained = weights_of(model)
    with steer(model, Steering(pinned=frozenset({2, 3}))):
        steered = weights_of(model)
    first = torch.tensor([".layers.0." in layer.name for layer in layers_of(model)])
    assert not steered[:, ~first][..., :2].any()
    torch.testing.assert_close(steered[:, ~first][..., 2:].sum(-1), torch.ones(len(steered), int((~first).sum())))
    place = int(first.nonzero()[0])  # the first projection's input is the same whatever later ones do
    assert torch.equal(steered[:, place], trained[:, place])


@pytest.mark.parametrize(
    ("router", "values", "message"),
    [
        ("dynmole", {"settings": {"top_k": 1}}, r"top_k cannot be changed .* only entropy_threshold, keep_top_k"),
        ("dynmole", {"settings": {"entropy_index": 1}}, r"entropy_index cannot be changed"),
        ("dense", {"settings": {"top_p": 0.5}}, r"'dense': it has no such settings"),
        ("topp", {"settings": {"top_p": 2}}, r"adapter\.top_p is 2\.0; it must be a number greater than 0 and at"),
        ("topk", {"settings": {"top_k": 0}}, r"adapter\.top_k is 0; it must be a whole number at least 1"),
        ("topk", {"muted": [4]}, r"steering\.muted has 4; this adapter's experts are 0 to 3"),
    ],
)
def test_what_an_adapter_does_not_have_is_said_before_anything_changes(
    router: str, values: dict[str, Any], message: str, tiny_model: Callable[..., Any]
) -> None:
    model = adapt(tiny_model(), router)
    as_trained = logits(model)
    with pytest.raises((InputError, ConfigError), match=message), steer(model, Steering.from_dict(values)):
        pass
    assert torch.equal(logits(model), as_trained)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mute": [1]}, r"steering\.mute is not a setting; known: muted, pinned, settings"),
        ({"muted": [1], "pinned": [1, 2]}, r"Expert 1 is both muted and pinned"),
        ({"muted": [-1]}, r"counted from 0"),
        ({"muted": ["a"]}, r"steering\.muted is 'a'; it must be a whole number"),
        ({"pinned": 3}, r"steering\.pinned must be a list"),
        ({"settings": [1]}, r"steering\.settings must be a mapping"),
    ],
)
def test_plain_values_are_checked(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Steering.from_dict(values)


def test_plain_values_there_and_back() -> None:
    steering = Steering({"top_p": 0.5}, frozenset({1}), frozenset({0, 3}))
    assert Steering.from_dict(steering.to_dict()) == steering
    assert not Steering.from_dict(None) and not Steering.from_dict({}) and steering


def test_a_base_model_has_nothing_to_steer(tiny_model: Callable[..., Any]) -> None:
    with pytest.raises(InputError, match="no mixture of experts"), steer(tiny_model(), Steering(muted=frozenset({0}))):
        pass


def test_the_change_in_words_counts_experts_from_one() -> None:
    trained = {"top_p": 0.75, "inclusive_top_p": False, "keep_top_k": 2, "max_threshold": None}
    steering = Steering({"top_p": 0.5, "inclusive_top_p": True, "keep_top_k": 2}, frozenset({1}), frozenset({0, 3}))
    assert describe_steering(steering, trained) == (
        "top p 0.75 → 0.5 · inclusive top p off → on · expert 2 muted · only experts 1, 4"
    )
    assert describe_steering(Steering({"max_threshold": 0.05}), trained) == "max threshold 1/E → 0.05"
    assert describe_steering(Steering(), trained) == ""
