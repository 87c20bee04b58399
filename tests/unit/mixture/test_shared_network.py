"""LD-MoLE's network of λ is one for all projections of an input width: one parameter, in one place of the model."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapting import TOKENS, adapt, layers_of, logits, settings, shake
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from mole.mixture.shared_linears import copies
from mole.models.adapter_files import WEIGHTS, AdapterFiles

Make = Callable[..., Any]
NETWORK = {f"{part}.default.{kind}" for part in ("lambda_in", "lambda_out") for kind in ("weight", "bias")}


class Rows(Dataset[dict[str, Tensor]]):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": TOKENS[index % 3], "labels": TOKENS[index % 3]}


def adapt_natively(model: Any, seed: int = 0) -> Any:
    """The model with an adapter by transformers' own `add_adapter`."""
    model.add_adapter(settings("sparsegen"))
    shake(model, seed)
    return model.eval()


def same(found: Any, expected: Any) -> bool:
    """Whether two models have the same adapter, to the bit."""
    ours, theirs = (
        {name: weight for name, weight in model.named_parameters() if "mole_studio_" in name}
        for model in (found, expected)
    )
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_every_weight_of_the_model_has_one_name(tiny_model: Make) -> None:
    model = adapt(tiny_model(), "sparsegen")
    names = [name for name, _ in model.named_parameters(remove_duplicate=False) if "mole_studio_lambda" in name]
    assert len(names) == 2 * len(NETWORK)  # the tiny model's projections have two input widths
    assert {name.split("mole_studio_")[1] for name in names} == NETWORK
    assert {name for name in model.state_dict() if "mole_studio_lambda" in name} == set(names)


def test_all_projections_of_a_width_compute_with_it_and_its_gradient_is_their_sum(tiny_model: Make) -> None:
    model = adapt(tiny_model(), "sparsegen").double()
    owners = {layer.in_features: layer for layer in reversed(layers_of(model))}
    for layer in layers_of(model):
        owner = owners[layer.in_features]
        assert layer.routers["default"].lambda_in is owner.mole_studio_lambda_in["default"]
    model(input_ids=TOKENS).logits.square().mean().backward()
    weight, step = owners[32].mole_studio_lambda_out["default"].weight, 1e-3
    losses = []
    for sign in (1, -1):
        with torch.no_grad():
            weight[0, 3] += sign * step
            losses.append(logits(model).square().mean())
            weight[0, 3] -= sign * step
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad[0, 3], (losses[0] - losses[1]) / (2 * step), rtol=1e-2, atol=1e-8)


def test_a_copy_has_a_network_of_its_own(tiny_model: Make) -> None:
    model = adapt(tiny_model(), "sparsegen")
    expected = logits(model)
    twin = copy.deepcopy(model)
    shake(model, seed=1)
    assert torch.equal(logits(twin), expected) and not torch.equal(logits(model), expected)


def test_files_with_and_without_copies_load(tiny_model: Make, tmp_path: Path) -> None:
    """Earlier versions wrote the network for each projection, and expect it there."""
    model = adapt(tiny_model(), "sparsegen")
    model.save_pretrained(tmp_path)
    written = load_file(tmp_path / WEIGHTS)
    assert len([name for name in written if "lambda_in.weight" in name]) == len(layers_of(model))
    kept = set(model.state_dict())
    without = {name: w for name, w in written.items() if name.replace(".weight", ".default.weight") in kept}
    without |= {name: w for name, w in written.items() if name.replace(".bias", ".default.bias") in kept}
    assert len(without) < len(written)
    for weights in (written, without):
        save_file(weights, tmp_path / WEIGHTS)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            loaded = PeftModel.from_pretrained(tiny_model(), tmp_path)
        assert not [warning for warning in told if "keys" in str(warning.message)]
        assert same(loaded, model) and torch.equal(logits(loaded), logits(model))
        AdapterFiles.read(tmp_path).check_complete(loaded, "default", "the base")


def test_a_state_dict_with_copies_loads(tiny_model: Make) -> None:
    """As `torch.save(model.state_dict())` wrote it before."""
    model = adapt(tiny_model(), "sparsegen")
    state, twin = model.state_dict(), adapt(tiny_model(), "sparsegen", seed=1)
    state |= {own: state[owners] for own, owners in copies(model, "default")}
    assert len([name for name in state if "lambda_in.default.weight" in name]) == len(layers_of(model))
    twin.load_state_dict(state)
    assert same(twin, model)


def test_a_native_adapter_is_saved_and_loaded_to_the_bit(tiny_model: Make, tmp_path: Path) -> None:
    native = adapt_natively(tiny_model())
    native.save_pretrained(tmp_path)
    loaded = tiny_model()
    report = loaded.load_adapter(str(tmp_path))
    assert not report.unexpected_keys and not report.missing_keys
    assert same(loaded, native)
    by_peft = PeftModel.from_pretrained(tiny_model(), tmp_path)
    assert torch.equal(logits(by_peft), logits(native))


def test_trainers_checkpoint_of_a_natively_adapted_model(tiny_model: Make, tmp_path: Path) -> None:
    """Trainer cannot resume by itself from one, LoRA's neither: it looks for the whole model there."""
    model = adapt_natively(tiny_model())
    before = copy.deepcopy(model)
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, save_steps=2, per_device_train_batch_size=2, use_cpu=True, report_to=[],
        learning_rate=1e-2, disable_tqdm=True,
    )  # fmt: skip
    Trainer(model=model, args=arguments, train_dataset=Rows()).train()
    assert not same(model, before)
    loaded = tiny_model()
    loaded.load_adapter(str(tmp_path / "checkpoint-2"), is_trainable=True)
    assert same(loaded, model)
    assert len([name for name, weight in loaded.named_parameters() if weight.requires_grad]) > 2 * len(NETWORK)


@pytest.mark.parametrize("order", [("default", "other"), ("other", "default")])
def test_two_adapters_and_one_deleted(order: tuple[str, str], tiny_model: Make) -> None:
    model = adapt(tiny_model(), "sparsegen")
    expected = logits(model)
    model.add_adapter("other", settings("sparsegen"))
    shake(model, seed=1, adapter="other")
    model.set_adapter("other")
    other = logits(model)
    model.set_adapter(order[1])
    model.delete_adapter(order[0])
    model.set_adapter(order[1])
    assert torch.equal(logits(model), expected if order[1] == "default" else other)
