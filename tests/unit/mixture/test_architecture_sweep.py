"""A table of sixty architectures: what a mixture on each of them does, and what is left out of it."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from adapting import layers_of, shake
from architectures import DECODERS, IMAGE_TOKEN, MIXTURES, RECURRENT, build
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from mole import MoleConfig, auxiliary_loss, record_routing
from mole.chat.generate import generate
from mole.chat.settings import ChatSettings
from mole.config import AdapterConfig
from mole.data import Example
from mole.evaluation.scoring import score_families
from mole.mixture.model import mole_config
from mole.models.loading import Loaded
from mole.preflight import layer_costs, memory_profile

IDS = torch.randint(3, 50, (2, 7), generator=torch.Generator().manual_seed(0))
PICTURES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
SOUNDS = torch.randn(2, 8, 14, generator=torch.Generator().manual_seed(0))
LABELLED = {"input_ids": IDS, "labels": IDS}
WITH_PICTURE = {**LABELLED, "input_ids": IDS.index_fill(1, torch.arange(1, 5), IMAGE_TOKEN), "pixel_values": PICTURES}


class Expected(NamedTuple):
    """What is expected of an architecture, beside: all linear layers but the head are adapted, and get a gradient.

    Attributes:
        left_out: pattern of linear layers that all-linear leaves out.
        no_gradient: pattern of adapted ones that get no gradient, as they have no part in the loss.
        inputs: what a training step is given.
        task: PEFT's name of the task; None where its class for the task takes other inputs.
    """

    left_out: str = ""
    no_gradient: str = ""
    inputs: dict[str, Tensor] = LABELLED
    task: str | None = "CAUSAL_LM"


TEXT_MODELS = [*DECODERS, *MIXTURES, *RECURRENT]
EXPECTED = {
    **dict.fromkeys(TEXT_MODELS, Expected()),
    # routers that are linear layers, but return more than their product
    "phimoe": Expected(r"mlp\.router$"),
    # read past the module by a fused kernel, or without calling it at all
    "mamba": Expected(r"mixer\.(x_proj|dt_proj|out_proj)$"),
    "falcon_mamba": Expected(r"mixer\.(x_proj|dt_proj|out_proj)$"),
    "mamba2": Expected(r"mixer\.out_proj$"),
    "jamba": Expected(r"mamba\.(x_proj|dt_proj|out_proj)$"),
    "bamba": Expected(r"mamba\.out_proj$"),
    "falcon_h1": Expected(r"mamba\.out_proj$"),
    "granitemoehybrid": Expected(r"mamba\.out_proj$"),
    # each layer uses one of the small adapters that its shared block has for all
    "zamba2": Expected(r"mamba\.out_proj$", r"adapter_list"),
    # rescaled in evaluation mode
    "rwkv": Expected(r"attention\.output$|feed_forward\.value$"),
    # encoder-decoders
    "t5": Expected(task="SEQ_2_SEQ_LM"),
    "bart": Expected(task="SEQ_2_SEQ_LM"),
    "whisper": Expected(inputs={"input_features": SOUNDS, "labels": IDS}, task=None),
    # with images: their encoder's pooling head has no part in a text; Qwen2-VL is given no image here
    "gemma3": Expected(no_gradient=r"vision_tower\.head", inputs=WITH_PICTURE),
    "llava": Expected(inputs=WITH_PICTURE),
    "qwen2_vl": Expected(no_gradient=r"visual\."),
    # heads
    "bert, tokens": Expected(inputs={"input_ids": IDS, "labels": IDS % 2}, task="TOKEN_CLS"),
    "bert, sequences": Expected(inputs={"input_ids": IDS, "labels": torch.tensor([0, 1])}, task="SEQ_CLS"),
    "bert, answers": Expected(
        inputs={"input_ids": IDS, "start_positions": IDS[:, 0] % 7, "end_positions": IDS[:, 1] % 7}, task="QUESTION_ANS"
    ),
}
HEADS = ("lm_head", "embed_out", "head", "proj_out", "classifier", "qa_outputs", "decoder", "output_projection")


@pytest.fixture(scope="module", params=EXPECTED)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def model(name: str) -> Any:
    """A mixture on every linear layer, each weight of which matters. Tests leave it as it is."""
    return adapted(name)


@pytest.fixture(scope="module", params=TEXT_MODELS)
def text_model(request: pytest.FixtureRequest) -> Any:
    return adapted(request.param)


def adapted(name: str) -> Any:
    settings = {"router": "dynmole", "num_experts": 3, "r": 2, "lora_alpha": 2, "lora_dropout": 0.0}
    model = get_peft_model(build(name), MoleConfig(**settings, task_type=EXPECTED[name].task))
    shake(model)
    return model.eval()


def matches(pattern: str, name: str) -> bool:
    return bool(pattern and re.search(pattern, name))


def test_all_linear_layers_are_adapted_but_heads_and_those_left_out(name: str, model: Any) -> None:
    linear = [key for key, module in build(name).named_modules() if isinstance(module, (nn.Linear, Conv1D))]
    expected = {key for key in linear if key not in HEADS and not matches(EXPECTED[name].left_out, key)}
    assert {layer.name for layer in layers_of(model)} == expected


def test_a_training_step_changes_what_is_trained_and_nothing_else(name: str, model: Any) -> None:
    expected, model = EXPECTED[name], copy.deepcopy(model).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    trained = {key: weight for key, weight in model.named_parameters() if weight.requires_grad}
    model(**expected.inputs).loss.backward()
    without = {key for key, weight in trained.items() if weight.grad is None or not weight.grad.any()}
    assert all(matches(expected.no_gradient, key) for key in without), sorted(without)[:3]
    torch.optim.SGD(trained.values(), lr=1.0).step()
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == trained.keys() - without


def test_it_is_loaded_as_it_was_saved(name: str, model: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    # Also to be trained: torch folds a product by whether its weights need a gradient, which shows in the last bit.
    loaded = PeftModel.from_pretrained(build(name), tmp_path, is_trainable=True).eval()
    with torch.no_grad():
        outputs = [each(**EXPECTED[name].inputs) for each in (model, loaded)]
    first, second = ([part for part in output.values() if isinstance(part, Tensor)] for output in outputs)
    assert len(first) >= 2 and all(map(torch.equal, first, second))


def test_text_is_the_same_with_and_without_cache_recorder_and_chat(text_model: Any) -> None:
    def text(**settings: Any) -> list[int]:
        return text_model.generate(input_ids=IDS[:1], max_new_tokens=6, do_sample=False, eos_token_id=-1, **settings)[
            0
        ].tolist()

    plain = text()
    assert text(use_cache=False) == plain
    with record_routing(text_model):
        assert text() == plain
    settings = ChatSettings(max_new_tokens=6)
    with record_routing(text_model) as trace:
        read: list[int] = []
        generate(text_model, IDS[0].tolist(), settings, set(), 100, go_on=lambda ids: not read.extend(ids))
        assert read == plain
    with torch.no_grad(), record_routing(text_model) as whole:
        text_model(input_ids=torch.tensor([plain[:-1]]))
    seen = ~trace.weights.isnan()  # not by the dense layer of ModernBERT's head, which computes the last logits only
    assert trace.modules == whole.modules and seen.float().mean() > 0.95
    torch.testing.assert_close(trace.weights[seen], whole.weights[seen], rtol=0, atol=1e-4)


def test_answers_to_one_question_have_the_scores_of_each_alone(text_model: Any, tiny_tokenizer: Any) -> None:
    def example(answer: str) -> Example:
        return Example(messages=({"role": "user", "content": "Is it?"}, {"role": "assistant", "content": answer}))

    loaded = Loaded(text_model, tiny_tokenizer, "a run", "tiny")
    answers = [example("yes"), example("no, not quite")]
    ((_, together),) = score_families(loaded, [answers])
    for answer, score in zip(answers, together, strict=True):
        ((_, (alone,)),) = score_families(loaded, [[answer]])
        torch.testing.assert_close(torch.tensor(score.log_probs), torch.tensor(alone.log_probs), rtol=0, atol=1e-4)


PROFILED = ("llama", "opt", "bloom", "mixtral", "gpt_oss", "mamba", "recurrent_gemma", "jamba", "gemma3")
"""For each kind of padding mask, of layers and of experts one that CI profiles; soak profiles the others."""


@pytest.mark.parametrize(
    "name",
    [name if name in PROFILED else pytest.param(name, marks=pytest.mark.soak) for name in (*TEXT_MODELS, "gemma3")],
)
def test_preflight_counts_its_weights_and_the_memory_of_a_step(name: str) -> None:
    """The memory is that of tensors: beside the interpreter's, a tiny model's does not show in a process."""
    base, shape = build(name), memory_profile.BatchShape(rows=4, length=12, labelled=30)
    adapter = AdapterConfig.from_flat({"router": "dynmole", "num_experts": 3, "r": 2})
    counted = memory_profile.count_parameters(base.config, adapter, torch.float32)
    predicted = layer_costs.step_cost(base.config, adapter, torch.float32, shape, checkpointing=False)
    real = get_peft_model(base, mole_config(adapter, task_type="CAUSAL_LM")).train()
    assert (counted.trainable, counted.total) == layer_costs.sizes(real)
    head = real.get_base_model().get_output_embeddings()
    positions, ids = torch.arange(shape.labelled), torch.full((shape.rows, shape.length), 5)
    mask = (torch.arange(shape.length) < torch.tensor([[12], [12], [9], [7]])).long()
    tracker = memory_profile.MemoryTracker([*real.parameters(), *real.buffers()], head.weight.shape[0])
    with tracker:
        loss = memory_profile.summed_loss_at(real, head, positions, positions, input_ids=ids, attention_mask=mask)
        (loss + auxiliary_loss(real)).backward()
    assert predicted.bytes == pytest.approx(tracker.peak, rel=0.25)
