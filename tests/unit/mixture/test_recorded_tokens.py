"""Which projections a recording has, and that each token's row is that token's, on models of every kind."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from adapting import layers_of, shake
from architectures import IMAGE_TOKEN, build
from peft import get_peft_model
from torch import Tensor, nn

from mole import MoleConfig, record_routing
from mole.chat.generate import stream
from mole.chat.process import describe_routing, routing_bytes
from mole.chat.settings import ChatSettings
from mole.models.loading import Loaded

Make = Callable[..., Any]
IDS = torch.randint(3, 50, (2, 7), generator=torch.Generator().manual_seed(0))
PICTURES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
WITH_PICTURE = IDS.clone().index_fill_(1, torch.arange(1, 5), IMAGE_TOKEN)
"""A picture takes 4 tokens, and its patches are 4."""


PLAIN = {"input_ids": IDS}
PAIRS = {"input_ids": IDS, "labels": IDS.flip(1)}
"""Encoder and decoder read as many tokens, so that their shapes are the same."""
SPOKEN = {"input_features": torch.randn(2, 8, 14, generator=torch.Generator().manual_seed(0)), "labels": IDS}
SEEN = {"input_ids": WITH_PICTURE, "pixel_values": PICTURES}
CASES: dict[str, tuple[str, dict[str, Tensor], str]] = {
    "opt": ("opt", PLAIN, ""),
    "qwen2_moe": ("qwen2_moe", PLAIN, ""),
    "deepseek_v3": ("deepseek_v3", PLAIN, ""),
    "modernbert_decoder": ("modernbert_decoder", PLAIN, ""),
    "bert": ("bert", PLAIN, "pooler"),
    "albert": ("albert", PLAIN, ""),
    "vit": ("vit", {"pixel_values": PICTURES}, "pooler"),
    "t5": ("t5", PAIRS, r"^encoder|EncDecAttention\.[kv]"),
    "bart": ("bart", PAIRS, r"\.encoder\.|encoder_attn\.[kv]_proj"),
    "whisper": ("whisper", SPOKEN, r"\.encoder\.|encoder_attn\.[kv]_proj"),
    "gemma3": ("gemma3", SEEN, "vision_tower"),
    "gemma3, text": ("gemma3", PLAIN, "vision_tower"),
    "llava": ("llava", SEEN, "vision_tower|projector"),
    "llava, text": ("llava", PLAIN, "vision_tower|projector"),
    "qwen2_vl, text": ("qwen2_vl", PLAIN, "visual"),
}
"""Model, what it is called with, and a pattern of the projections that are left out of its recording."""


def adapted(make: str | Callable[[], Any], **values: Any) -> Any:
    """The model with a mixture whose every weight matters."""
    values = {"router": "dynmole", "num_experts": 3, "r": 2, "lora_alpha": 2, "lora_dropout": 0.0, **values}
    model = get_peft_model(build(make) if isinstance(make, str) else make(), MoleConfig(**values))
    shake(model)
    return model.eval()


def recorded(model: Any, **inputs: Any) -> Any:
    with torch.no_grad(), record_routing(model) as trace:
        model(**inputs)
    return trace


@pytest.mark.parametrize("case", CASES)
def test_a_recording_has_the_projections_that_saw_the_tokens_and_changes_nothing(case: str) -> None:
    make, inputs, left_out = CASES[case]
    model = adapted(make)
    with torch.no_grad():
        silent = model(**inputs)
        with record_routing(model) as trace:
            assert all(map(torch.equal, tensors(silent), tensors(model(**inputs))))
    names = [layer.name for layer in layers_of(model)]
    assert trace.modules == [name for name in names if not (left_out and re.search(left_out, name))]
    assert trace.weights.shape == (len(trace), len(trace.modules), 3) and trace.weights.isfinite().all()
    assert len(trace) == (5 if case == "vit" else 7)
    json.dumps(trace.to_dict(["?"] * len(trace), 0), allow_nan=False)


def tensors(output: Any) -> list[Tensor]:
    return [value for value in output.values() if isinstance(value, Tensor)]


@pytest.mark.parametrize("case", CASES)
def test_the_rows_are_those_of_the_first_batch_row_alone(case: str) -> None:
    make, inputs, _ = CASES[case]
    model = adapted(make)
    whole, alone = recorded(model, **inputs), recorded(model, **{name: value[:1] for name, value in inputs.items()})
    assert whole.modules == alone.modules
    torch.testing.assert_close(whole.weights, alone.weights, rtol=0, atol=1e-4)
    torch.testing.assert_close(whole.entropy, alone.entropy, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "case", ["opt", "qwen2_moe", "deepseek_v3", "modernbert_decoder", "gemma3, text", "llava, text"]
)
def test_token_by_token_a_decoder_has_the_rows_of_one_pass(case: str) -> None:
    model = adapted(CASES[case][0])
    with record_routing(model) as generated:
        ids = model.generate(input_ids=IDS[:1], max_new_tokens=5, do_sample=False, eos_token_id=-1)
    whole = recorded(model, input_ids=ids[:, :-1])
    seen = ["lm_head" not in name for name in generated.modules]  # `generate` computes the last logits only
    assert len(generated) == 11 and generated.modules == whole.modules
    torch.testing.assert_close(generated.weights[:, seen], whole.weights[:, seen], rtol=0, atol=1e-4)


@pytest.mark.parametrize("arch", ["t5", "bart"])
def test_generating_an_encoder_decoder_records_what_it_writes(arch: str) -> None:
    model = adapted(arch)
    with record_routing(model) as generated:
        ids = model.generate(input_ids=IDS[:1], max_new_tokens=4, do_sample=False, eos_token_id=-1)
    whole = recorded(model, input_ids=IDS[:1], decoder_input_ids=ids[:, :-1])
    assert generated.modules == whole.modules and len(generated) == len(whole) == 4
    torch.testing.assert_close(generated.weights, whole.weights, rtol=0, atol=1e-4)


def test_tokens_that_were_embedded_before_are_the_same_tokens() -> None:
    model = adapted("opt")
    whole = recorded(model, inputs_embeds=model.get_input_embeddings()(IDS))
    torch.testing.assert_close(whole.weights, recorded(model, input_ids=IDS).weights)


def test_a_projection_that_is_called_several_times_has_the_mean_of_its_calls() -> None:
    """ALBERT's layers are one, called as many times."""
    model = adapted(CASES["albert"][0])
    layer = next(layer for layer in layers_of(model) if layer.name.endswith("query"))
    inputs: list[Tensor] = []
    layer.register_forward_pre_hook(lambda module, args: inputs.append(args[0][0]))
    trace = recorded(model, **PLAIN)
    expected = torch.stack([layer.routers["default"](x).weights for x in inputs]).mean(0)
    assert len(inputs) == 2
    torch.testing.assert_close(trace.weights[:, trace.modules.index(layer.name)], expected)


# ---------------------------------------------------------------------------------------------------------
# An output head that computes some logits only


@pytest.mark.parametrize("kept", [1, 3, torch.tensor([2, 5])])
def test_a_head_has_rows_for_the_tokens_whose_logits_were_computed(kept: Any, tiny_model: Make) -> None:
    model = adapted(tiny_model, target_modules=["q_proj", "lm_head"])
    whole = recorded(model, input_ids=IDS)
    trace = recorded(model, input_ids=IDS, logits_to_keep=kept)
    assert trace.modules == whole.modules == [*whole.modules[:2], "lm_head"]
    seen = torch.arange(7)[-kept:] if isinstance(kept, int) else kept
    torch.testing.assert_close(trace.weights[seen], whole.weights[seen])
    unseen = [token for token in range(7) if token not in seen]
    assert trace.weights[unseen, 2].isnan().all() and not trace.weights[:, :2].isnan().any()


def test_a_layers_mean_is_of_the_projections_that_saw_the_token(tiny_model: Make) -> None:
    model = adapted(tiny_model, target_modules=["q_proj", "lm_head"])
    trace = recorded(model, input_ids=IDS, logits_to_keep=1)
    delta = trace.since(0)
    torch.testing.assert_close(delta.weights[:-1], trace.weights[:-1, :2])
    torch.testing.assert_close(delta.weights[-1, 0], trace.weights[-1, [0, 2]].mean(0))
    torch.testing.assert_close(delta.active[:-1], (trace.weights[:-1, :2] > 0).sum(-1).float())


def test_where_nothing_saw_a_token_the_means_are_0(tiny_model: Make) -> None:
    model = adapted(tiny_model, target_modules=["lm_head"])
    trace = recorded(model, input_ids=IDS, logits_to_keep=1)
    values = trace.to_dict(["?"] * 7, 7)
    assert not any(map(any, [row for token in values["weights"][:-1] for row in token])) and values["active"][0] == [
        0.0
    ]
    assert sum(values["weights"][-1][0]) > 0
    json.dumps(values, allow_nan=False)


# ---------------------------------------------------------------------------------------------------------
# Experts of a mixture-of-experts base that are linear layers


class GatheredExperts(nn.Module):
    """Every token goes to both experts, sorted by something else than its position."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(8, 2)
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, 1)
        self.gate(rows)
        order = torch.arange(len(rows) - 1, -1, -1)
        return sum(expert(rows[order])[order] for expert in self.experts).view_as(x)


class GatheredModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, 8)
        self.layers = nn.ModuleList(GatheredExperts() for _ in range(2))

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for layer in self.layers:
            x = x + layer(x)
        return x


def test_experts_that_get_gathered_tokens_are_left_out_even_if_they_get_all() -> None:
    model = adapted(GatheredModel)
    trace = recorded(model, input_ids=IDS)
    assert len(layers_of(model)) == 6 and trace.modules == ["layers.0.gate", "layers.1.gate"] and len(trace) == 7
    inputs = model.base_model.model.embed(IDS[0])
    router = layers_of(model)[0].routers["default"]
    torch.testing.assert_close(trace.weights[:, 0], router(inputs).weights)


def test_a_model_of_vectors_without_rows_is_recorded_as_it_is_called() -> None:
    model = adapted(lambda: nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8))), target_modules=["0"])
    with torch.no_grad(), record_routing(model) as trace:
        model(torch.randn(5, 8))
    assert (len(trace), trace.modules) == (5, ["0", "1.0"])


# ---------------------------------------------------------------------------------------------------------
# Chat


@pytest.mark.parametrize(
    "case", ["opt", "qwen2_moe", "deepseek_v3", "modernbert_decoder", "gemma3", "llava", "qwen2_vl, text"]
)
@pytest.mark.parametrize("with_head", [False, True])
def test_a_chat_has_every_token_in_the_routing_view(case: str, with_head: bool, tiny_tokenizer: Any) -> None:
    make = CASES[case][0]
    linear = [name for name, module in build(make).named_modules() if type(module) is nn.Linear]
    model = adapted(make, target_modules=linear if with_head else "all-linear")
    loaded = Loaded(model, tiny_tokenizer, "a run", "tiny", "dynmole")
    steps = list(stream(loaded, [{"role": "user", "content": "Sort"}], ChatSettings(max_new_tokens=3)))
    described = describe_routing(loaded, steps[0])
    assert len(described["names"]) == len(described["layer_of"]) and described["layers"] == 2
    for step in steps[:-1]:
        values, tokens = routing_bytes(step, described), len(step.tokens)
        assert len(values["weights"]) == tokens * 2 * 3 and len(values["entropy"]) == tokens * 2
        assert len(values["projections"]) == tokens * len(described["names"]) * 3
