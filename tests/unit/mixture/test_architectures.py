"""A mixture on every kind of model the studio names: tiny random ones, and quantised projections."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapting import TOKENS, adapt, layers_of, logits
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from mole import MoleConfig, auxiliary_loss, record_routing
from mole.core.errors import MoleError
from mole.mixture.quantised import limit_packing

Make = Callable[..., Any]
ARCHITECTURES = ["llama", "qwen3", "gemma3", "gpt2", "phi"]
PROJECTIONS = {"llama": 7, "qwen3": 7, "gemma3": 7, "gpt2": 4, "phi": 6}


@pytest.fixture(params=ARCHITECTURES)
def arch(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_all_linear_adapts_every_projection_but_the_head(arch: str, tiny_model: Make) -> None:
    model = adapt(tiny_model(arch))
    names = [layer.name for layer in layers_of(model)]
    assert len(names) == 2 * PROJECTIONS[arch]
    assert not any("lm_head" in name for name in names)


def test_a_round_trip_gives_the_same_bits_and_disabling_gives_the_base(
    arch: str, tiny_model: Make, tmp_path: Path
) -> None:
    base, model = logits(tiny_model(arch)), adapt(tiny_model(arch))
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_model(arch), tmp_path)), logits(model))
    assert not torch.equal(logits(model), base)
    with model.disable_adapter():
        assert torch.equal(logits(model), base)


def test_a_few_steps_of_training_lower_the_loss_and_leave_the_base_alone(arch: str, tiny_model: Make) -> None:
    model = get_peft_model(tiny_model(arch), MoleConfig(router="dynmole", num_experts=3, r=2, lora_dropout=0.0)).train()
    frozen = {name: weight.clone() for name, weight in model.named_parameters() if not weight.requires_grad}
    optimizer = torch.optim.Adam([weight for weight in model.parameters() if weight.requires_grad], lr=3e-2)
    values = []
    for _ in range(16):
        loss = model(input_ids=TOKENS, labels=TOKENS).loss
        values.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert values[-1] < values[0] - 0.1
    assert all(torch.equal(weight, frozen[name]) for name, weight in model.named_parameters() if name in frozen)


def test_the_auxiliary_loss_and_the_recorder_see_every_projection(arch: str, tiny_model: Make) -> None:
    model = adapt(tiny_model(arch)).train()
    with record_routing(model) as trace:
        model(input_ids=TOKENS)
    assert 0 < auxiliary_loss(model).item() < 0.1
    assert (len(trace), len(trace.modules), trace.layers) == (TOKENS.shape[1], 2 * PROJECTIONS[arch], 2)
    assert torch.isfinite(trace.weights).all() and trace.weights.sum() > 0


def test_greedy_text_is_the_same_with_and_without_cache_and_recorder(arch: str, tiny_model: Make) -> None:
    model = adapt(tiny_model(arch))

    def text(**settings: Any) -> list[int]:
        out = model.generate(input_ids=TOKENS[:1], max_new_tokens=8, do_sample=False, eos_token_id=-1, **settings)
        return list(out[0].tolist())

    plain = text(use_cache=True)
    assert len(plain) == TOKENS.shape[1] + 8
    assert text(use_cache=False) == plain
    with record_routing(model) as trace:
        assert text(use_cache=True) == plain
    assert len(trace) == len(plain) - 1  # the last token is drawn, never read


def test_the_seven_routers_run_on_it(arch: str, tiny_model: Make) -> None:
    seen = [
        logits(adapt(tiny_model(arch), name)) for name in ("topk", "topp", "threshold", "dense", "adamole", "sparsegen")
    ]
    assert all(torch.isfinite(values).all() for values in seen)


def test_gradient_checkpointing_gives_the_same_gradients(arch: str, tiny_model: Make) -> None:
    results = []
    for checkpointing in (False, True):
        model = adapt(tiny_model(arch)).train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        loss = model(input_ids=TOKENS, labels=TOKENS).loss
        loss.backward()
        results.append([loss.detach(), *(w.grad for w in model.parameters() if w.requires_grad)])
    for plain, recomputed in zip(*results, strict=True):
        torch.testing.assert_close(recomputed, plain, rtol=1e-5, atol=1e-7)


# ---------------------------------------------------------------------------------------------------------
# Quantised projections


def quantised(model: Any, kind: str, trains: bool = True) -> Any:
    """The model with its projections (not its head) in 4 or 8 bits, as `load_base` loads them.

    With `trains` it computes as under a trainable adapter, bit for bit, on a CPU with AVX512-BF16 too.
    """
    import bitsandbytes as bnb

    for name, module in list(model.named_modules()):
        if not isinstance(module, nn.Linear) or "lm_head" in name:
            continue
        args, bias = (module.in_features, module.out_features), module.bias is not None
        if kind == "4bit":
            new = bnb.nn.Linear4bit(*args, bias=bias, compute_dtype=torch.float32, quant_type="nf4")
            new.weight = bnb.nn.Params4bit(module.weight.data.clone(), requires_grad=False, quant_type="nf4")
        else:
            new = bnb.nn.Linear8bitLt(*args, bias=bias, has_fp16_weights=False)
            new.weight = bnb.nn.Int8Params(module.weight.data.clone(), requires_grad=False, has_fp16_weights=False)
        parent = model.get_submodule(name.rpartition(".")[0])
        setattr(parent, name.rpartition(".")[2], new.to("cpu"))
    limit_packing(model, trains)
    return model.eval()


def gradients(model: Any) -> list[torch.Tensor]:
    """Those of a pass in training mode."""
    model.train().zero_grad()
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    return [weight.grad.clone() for weight in model.parameters() if weight.requires_grad]


@pytest.mark.parametrize("kind", ["4bit", "8bit"])
def test_a_quantised_base_trains_saves_loads_and_disables(kind: str, tiny_model: Make, tmp_path: Path) -> None:
    base = logits(quantised(tiny_model(), kind))
    model = adapt(quantised(tiny_model(), kind))
    names = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert len({name.split(".mole_studio_")[0] for name in names}) == 14
    model.train()(input_ids=TOKENS, labels=TOKENS).loss.backward()
    assert all(weight.grad is not None for weight in model.parameters() if weight.requires_grad)
    model.eval().save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(quantised(tiny_model(), kind), tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    with model.disable_adapter():
        assert torch.equal(logits(model), base)


@pytest.mark.parametrize("kind", ["4bit", "8bit"])
def test_a_fresh_adapter_leaves_a_quantised_base_bit_for_bit(kind: str, tiny_model: Make) -> None:
    model = get_peft_model(quantised(tiny_model(), kind), MoleConfig(router="topk", num_experts=4, r=2)).eval()
    assert torch.equal(logits(model), logits(quantised(tiny_model(), kind)))


@pytest.fixture
def model_of_64(tiny_tokenizer: Any) -> Any:
    """A random 4-bit llama whose widths bitsandbytes packs on a CPU with AVX512-BF16: multiples of 64."""
    config = LlamaConfig(
        vocab_size=len(tiny_tokenizer), hidden_size=64, intermediate_size=128, num_attention_heads=2,
        num_hidden_layers=2,
    )  # fmt: skip
    torch.manual_seed(0)
    return quantised(LlamaForCausalLM(config), "4bit", trains=False)


def test_an_evaluation_in_mid_training_leaves_the_gradients_of_a_4bit_base_as_they_are(model_of_64: Any) -> None:
    model = adapt(model_of_64)
    before = gradients(model)
    logits(model.eval())
    assert all(map(torch.equal, before, gradients(model)))


def test_a_4bit_base_that_is_packed_already_refuses_an_adapter_that_is_to_be_trained(model_of_64: Any) -> None:
    for linear in (module for module in model_of_64.modules() if hasattr(module, "quant_state")):
        linear.weight.quant_state.packing_format_for_cpu = True  # what a first pass in evaluation mode leaves
    with pytest.raises(MoleError, match="Load the model again"):
        adapt(model_of_64)


@pytest.mark.parametrize(("inputs", "outputs"), [(64, 33), (96, 32), (32, 32)])
def test_a_4bit_projection_of_any_width_computes_in_evaluation_mode(inputs: int, outputs: int) -> None:
    model = quantised(nn.Sequential(nn.Linear(inputs, outputs)), "4bit", trains=False)
    with torch.no_grad():
        assert torch.isfinite(model(torch.randn(2, inputs))).all()
