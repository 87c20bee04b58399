"""A reply's routing as the page gets it: the model's own numbers to the nearest 1/255, and never without bounds."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from app.services.routing_stream import (
    ROUTING_RECORDS,
    RoutingRecord,
    RoutingRecords,
    fetch_projections,
    fetch_router,
    fetch_routing,
    fetch_similar,
)
from mole.chat.process import describe_routing, routing_bytes, short_names
from mole.chat.reference import fit_map, reference_ids
from mole.mixture.routing_map import hue_and_distance

HALF = 0.5 / 255 + 1e-6
MESSAGES = [{"role": "user", "content": "Convert 3 km to metres."}]


@pytest.fixture(scope="module")
def recorded(tiny_adapter: Path) -> tuple[RoutingRecord, Any]:
    """A short reply on a record, and the trace it was made from."""
    from mole.chat import ChatSettings, stream
    from mole.runs.targets import load_target

    loaded = load_target(str(tiny_adapter))
    loaded.routing_map = fit_map(loaded, reference_ids(loaded))
    steps = stream(loaded, MESSAGES, ChatSettings(max_new_tokens=6))
    step = next(steps)
    routing = describe_routing(loaded, step)
    record = ROUTING_RECORDS.new(**routing)
    record.extend(**routing_bytes(step, routing, loaded.routing_map))
    for step in steps:
        if added := routing_bytes(step, routing, loaded.routing_map):
            record.extend(**added)
    return record, step.trace


def unpacked(text: str, *shape: int) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), np.uint8).reshape(shape) / 255


def test_the_bytes_are_the_trace_to_half_a_step(recorded: tuple[RoutingRecord, Any]) -> None:
    record, trace = recorded
    told, sent, delta = len(trace), record.since(0), trace.since(0)
    assert len(sent["tokens"]) == told > record.meta["prompt"]
    layers, experts = trace.layers, trace.experts
    assert np.abs(unpacked(sent["weights"], told, layers, experts) - delta.weights.numpy()).max() <= HALF
    assert np.abs(unpacked(sent["entropy"], told, layers) - delta.entropy.numpy()).max() <= HALF
    assert np.abs(unpacked(sent["active"], told, layers) - delta.active.numpy() / experts).max() <= HALF


def test_a_delta_holds_only_what_is_new(recorded: tuple[RoutingRecord, Any]) -> None:
    record, trace = recorded
    whole, rest = record.since(0), fetch_routing([record.meta["id"], 5])
    assert rest is not None
    assert rest["at"] == 5 and rest["tokens"] == whole["tokens"][5:]
    assert base64.b64decode(whole["weights"]).endswith(base64.b64decode(rest["weights"]))
    assert len(base64.b64decode(rest["weights"])) == (len(trace) - 5) * trace.layers * trace.experts


def test_an_opened_layer_gets_every_projections_own_weights(recorded: tuple[RoutingRecord, Any]) -> None:
    record, trace = recorded
    for token, expected in ((7, trace.weights[7]), (None, trace.weights[record.meta["prompt"] :].mean(0))):
        sent = fetch_projections([record.meta["id"], token])
        assert sent is not None and sent["layers"] == trace.layer_of
        assert sent["names"] == [name.rsplit(".", 1)[-1] for name in trace.modules]
        values = np.frombuffer(base64.b64decode(sent["weights"]), "<f4").reshape(len(trace.modules), -1)
        assert np.abs(values - expected.numpy()).max() <= HALF


def test_a_chosen_router_gets_its_own_weights_for_every_token_and_later_for_new_ones(
    recorded: tuple[RoutingRecord, Any],
) -> None:
    record, trace = recorded
    assert record.meta["routers"][1] == [
        name for name, layer in zip(record.names, record.layer_of, strict=True) if layer
    ]
    column = record.layer_of.index(1) + 1
    for start in (0, 5):
        sent = fetch_router([record.meta["id"], 1, record.names[column], start])
        assert sent is not None and sent["at"] == start
        values = unpacked(sent["weights"], len(trace) - start, trace.experts)
        assert np.abs(values - trace.weights[start:, column].numpy()).max() <= HALF
    assert fetch_router([record.meta["id"], 1, "no_proj", 0]) is None
    assert fetch_router([record.meta["id"], 99, record.names[column], 0]) is None


def test_the_most_similar_tokens_are_those_of_the_largest_cosine_of_all_weights(
    recorded: tuple[RoutingRecord, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.services.routing_stream.ROWS", 4)  # compared in parts
    record, trace = recorded
    found = fetch_similar([record.meta["id"], 9])
    vectors = trace.weights.flatten(1).double()
    cosine = (vectors @ vectors[9]) / vectors.norm(dim=1) / vectors[9].norm()
    cosine[9] = -1
    assert found is not None and len(found) == 5 and found == sorted(found, key=lambda pair: -pair[1])
    np.testing.assert_allclose([value for _, value in found], cosine.sort(descending=True).values[:5], atol=5e-3)
    np.testing.assert_allclose([value for _, value in found], [cosine[int(other)] for other, _ in found], atol=5e-3)
    assert fetch_similar([record.meta["id"], len(trace)]) is None and fetch_similar(["unknown", 0]) is None


def test_each_token_has_its_place_on_the_map_and_the_weight_left_to_the_strongest(
    recorded: tuple[RoutingRecord, Any], tiny_adapter: Path
) -> None:
    from mole.runs.targets import load_target

    record, trace = recorded
    loaded = load_target(str(tiny_adapter))  # as in another session
    routing_map = fit_map(loaded, reference_ids(loaded))
    assert routing_map is not None
    places = hue_and_distance(routing_map.place(trace.modules, trace.weights)).numpy()
    sent = unpacked(record.since(0)["hues"], len(trace), 2)
    turn = np.abs(sent[:, 0] * 255 / 256 - places[:, 0])
    assert np.minimum(turn, 1 - turn).max() <= 0.5 / 256 + 1e-6 and np.abs(sent[:, 1] - places[:, 1]).max() <= HALF
    shares = (trace.weights.amax(-1) / trace.weights.sum(-1)).mean(1).numpy()
    assert np.abs(unpacked(record.since(0)["strongest"], len(trace)) - shares).max() <= HALF


def test_a_reply_or_a_token_that_is_not_there_is_none(recorded: tuple[RoutingRecord, Any]) -> None:
    record, trace = recorded
    assert fetch_routing(["unknown", 0]) is None and fetch_projections(["unknown", 0]) is None
    assert (
        fetch_projections([record.meta["id"], len(trace)]) is None
        and fetch_projections([record.meta["id"], -1]) is None
    )


def test_the_entropy_threshold_shown_is_the_one_this_reply_used(tiny_adapter: Path) -> None:
    from mole.chat import ChatSettings, stream
    from mole.mixture.steering import Steering
    from mole.runs.targets import load_target

    loaded = load_target(str(tiny_adapter))
    step = next(stream(loaded, MESSAGES, ChatSettings(max_new_tokens=1)))
    assert describe_routing(loaded, step)["threshold"] == 0.9
    changed = Steering({"entropy_threshold": 0.25}, muted=frozenset({2}))
    routing = describe_routing(loaded, step, changed)
    assert (routing["threshold"], routing["muted"]) == (0.25, [2])
    assert routing["even"] == [1 / 2] * routing["layers"]


def test_adamoles_threshold_of_every_token_is_filmed(tiny_model: Any) -> None:
    import torch
    from peft import get_peft_model

    from mole import MoleConfig, record_routing
    from mole.mixture.layer import MoleLinear

    model = get_peft_model(tiny_model(), MoleConfig(router="adamole", num_experts=4, r=2)).eval()
    found: list[torch.Tensor] = []
    for layer in model.modules():
        if isinstance(layer, MoleLinear):
            layer.register_forward_pre_hook(
                lambda module, args: found.append(module.routers["default"](args[0]).threshold[0])
            )
    with record_routing(model) as trace, torch.no_grad():
        model(input_ids=torch.arange(8)[None])
    expected = torch.stack(found, 1).view(8, trace.layers, -1).mean(-1)
    torch.testing.assert_close(trace.since(0).threshold, expected, rtol=0, atol=1e-6)


def test_projections_keep_the_part_of_their_name_that_tells_them_apart() -> None:
    assert short_names(["model.layers.0.self_attn.q_proj", "model.layers.10.mlp.up_proj"]) == ["q_proj", "up_proj"]
    assert short_names(["transformer.h.0.attn.c_proj", "transformer.h.0.mlp.c_proj", "transformer.h.0.mlp.c_fc"]) == [
        "attn.c_proj",
        "mlp.c_proj",
        "c_fc",
    ]


def test_the_oldest_replies_are_forgotten_by_number_and_by_bytes() -> None:
    kept = RoutingRecords(max_records=2, max_bytes=1000)
    first, second, third = (kept.new(layers=1, experts=2, counts=[2]) for _ in range(3))
    assert kept.get(first.meta["id"]) is None and kept.get(second.meta["id"]) is second
    third.extend(["x"] * 300, b"\0" * 600, b"\0" * 300, b"\0" * 300)
    kept.trim()
    assert kept.get(second.meta["id"]) is None and kept.get(third.meta["id"]) is third


def test_a_reply_too_long_for_memory_stays_complete_without_its_projections(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.services.routing_stream.KEPT_BYTES", 18)
    record = RoutingRecords().new(names=["q", "k"], layer_of=[0, 0], layers=1, experts=2, counts=[2])
    for text in "abc":
        record.extend([text], b"\1\2", b"\3", b"\4", projections=b"\1\2\3\4")
    assert len(record.weights) == 6 and len(record.since(0)["tokens"]) == 3
    assert (
        record.projection_weights(1) is not None
        and record.projection_weights(2) is None
        and record.projection_weights(None) is None
    )
