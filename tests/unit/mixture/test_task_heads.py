"""Models with a head for a task: the head is trained and saved with the experts, as under PEFT's LoRA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from adapting import TOKENS, logits
from peft import PeftModel, get_peft_model
from peft.utils import ModulesToSaveWrapper
from transformers import (
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
    LlamaConfig,
)

from mole import MoleConfig
from mole.core.errors import ConfigError, MoleError
from mole.mixture.layer import MoleLinear

SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "pad_token_id": 0,
}  # fmt: skip
ARCHITECTURES = {"llama": LlamaConfig(**SIZES), "bert": BertConfig(**SIZES)}
IDS = torch.arange(1, 15).view(2, 7)
TASKS: dict[str, tuple[Any, dict[str, torch.Tensor]]] = {
    "SEQ_CLS": (AutoModelForSequenceClassification, {"labels": torch.tensor([0, 1])}),
    "TOKEN_CLS": (AutoModelForTokenClassification, {"labels": IDS % 2}),
    "QUESTION_ANS": (
        AutoModelForQuestionAnswering,
        {"start_positions": torch.tensor([1, 2]), "end_positions": torch.tensor([3, 4])},
    ),
}


def predictions(model: Any) -> torch.Tensor:
    with torch.no_grad():
        output = model.eval()(input_ids=IDS)
    return output.logits if "logits" in output else torch.stack([output.start_logits, output.end_logits])


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_head_is_trained_saved_and_loaded(architecture: str, task: str, tmp_path: Path) -> None:
    kind, labels = TASKS[task]
    torch.manual_seed(0)
    base = kind.from_config(ARCHITECTURES[architecture])
    plain = {name: weight.clone() for name, weight in base.state_dict().items()}
    model = get_peft_model(base, MoleConfig(task_type=task, router="topk", num_experts=2, r=2))
    head = {name: weight for name, weight in model.named_parameters() if "modules_to_save" in name}
    assert head and all(weight.requires_grad for weight in head.values())
    saved = [module for name, module in model.named_modules() if "modules_to_save" in name]
    assert not any(isinstance(module, MoleLinear) for module in saved)
    before = {name: weight.detach().clone() for name, weight in head.items()}
    optimiser = torch.optim.SGD((weight for weight in model.parameters() if weight.requires_grad), lr=1.0)
    for _ in range(2):  # the experts' B is zero in the first
        model.train()(input_ids=IDS, **labels).loss.backward()
        optimiser.step()
    assert all(not torch.equal(weight, before[name]) for name, weight in head.items())
    model.save_pretrained(tmp_path)
    fresh = kind.from_config(ARCHITECTURES[architecture])
    fresh.load_state_dict(plain)
    assert torch.equal(predictions(PeftModel.from_pretrained(fresh, tmp_path)), predictions(model))


@pytest.mark.parametrize("task", TASKS)
def test_a_second_adapter_has_a_head_of_its_own(task: str, tmp_path: Path) -> None:
    """all-linear is resolved into names, the head's among them, which PEFT has wrapped for the first adapter."""
    kind, _ = TASKS[task]
    torch.manual_seed(0)
    config = MoleConfig(task_type=task, router="topk", num_experts=2, r=2)
    model = get_peft_model(kind.from_config(ARCHITECTURES["bert"]), config)
    model.save_pretrained(tmp_path)
    before = predictions(model)
    model.load_adapter(str(tmp_path), "loaded")
    model.add_adapter("same", config)
    model.add_adapter("other", MoleConfig(task_type=task, router="dense", num_experts=3, r=2))
    heads = [module for module in model.modules() if isinstance(module, ModulesToSaveWrapper)]
    assert heads and all(set(head.modules_to_save) == {"default", "loaded", "same", "other"} for head in heads)
    assert not any(isinstance(module, MoleLinear) for head in heads for module in head.modules())
    model.set_adapter("loaded")
    assert torch.equal(predictions(model), before)


def test_loading_and_saving_again_names_no_module_twice_more(tmp_path: Path) -> None:
    """PEFT adds the heads of a task to the config that it has loaded."""
    kind, _ = TASKS["SEQ_CLS"]
    model = get_peft_model(kind.from_config(ARCHITECTURES["llama"]), MoleConfig(task_type="SEQ_CLS", num_experts=2))
    lengths = []
    for turn in ("first", "second", "third"):
        model.save_pretrained(tmp_path / turn)
        model = PeftModel.from_pretrained(kind.from_config(ARCHITECTURES["llama"]), tmp_path / turn)
        lengths.append(len(MoleConfig.from_pretrained(tmp_path / turn).modules_to_save))
    assert lengths == [2, 2, 2]


def test_any_module_may_be_trained_and_saved_whole(tiny_model: Any, tmp_path: Path) -> None:
    model = get_peft_model(tiny_model(), MoleConfig(num_experts=2, r=2, modules_to_save=["lm_head"]))
    head = model.base_model.model.lm_head.modules_to_save["default"].weight
    with torch.no_grad():
        head.add_(1.0)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_model(), tmp_path)), logits(model))
    with pytest.raises(ConfigError, match="modules_to_save"):
        MoleConfig(modules_to_save=["(.+)+!"])  # PEFT would run it as a pattern


def test_rows_with_adapters_of_their_own_are_refused(tiny_model: Any) -> None:
    model = get_peft_model(tiny_model(), MoleConfig(num_experts=2, r=2)).eval()
    model.add_adapter("other", MoleConfig(num_experts=2, r=2))
    rows = TOKENS[:1].repeat(2, 1)
    for call in (model, model.generate):
        with pytest.raises(MoleError, match=r"adapter_names is not supported.*set_adapter"):
            call(input_ids=rows, adapter_names=["default", "other"])
    assert model(input_ids=rows, adapter_names=None).logits.shape[0] == 2
