"""A local model hub: tiny random models under the names that PEFT's tests load, in the layout of the hub's cache."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from architectures import ARCHITECTURES, WIDE

DEBERTA: dict[str, Any] = {**WIDE, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "type_vocab_size": 0}


def body(name: str, **values: Any) -> Callable[[], Any]:
    """A model without a head, of transformers' config class `name` + `Config`."""
    return lambda: hf.AutoModel.from_config(getattr(hf, f"{name}Config")(**values))


def classifier(name: str, **values: Any) -> Callable[[], Any]:
    """A classifier of sequences."""
    return lambda: hf.AutoModelForSequenceClassification.from_config(getattr(hf, f"{name}Config")(**values))


MODELS: dict[str, Callable[[], Any]] = {
    "peft-internal-testing/tiny-random-OPTForCausalLM": ARCHITECTURES["opt"],
    "peft-internal-testing/opt-125m": ARCHITECTURES["opt"],
    "gpt2": ARCHITECTURES["gpt2"],
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": ARCHITECTURES["gpt2"],
    "peft-internal-testing/tiny-random-GPTJForCausalLM": ARCHITECTURES["gptj"],
    "trl-internal-testing/tiny-random-LlamaForCausalLM": ARCHITECTURES["llama"],
    "peft-internal-testing/tiny-dummy-qwen2": ARCHITECTURES["qwen2"],
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": ARCHITECTURES["gemma3_text"],
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated": ARCHITECTURES["t5"],
    "peft-internal-testing/tiny-random-BartForConditionalGeneration": ARCHITECTURES["bart"],
    "peft-internal-testing/tiny-random-BertModel": ARCHITECTURES["bert"],
    "peft-internal-testing/tiny-random-RobertaModel": body("Roberta", **WIDE),
    "peft-internal-testing/tiny-random-DebertaModel": body("Deberta", **DEBERTA),
    "peft-internal-testing/tiny-random-DebertaV2Model": body("DebertaV2", **DEBERTA),
    "bert-base-uncased": classifier("Bert", **WIDE),
    "peft-internal-testing/tiny-random-BertForSequenceClassification": classifier("Bert", **WIDE),
    "peft-internal-testing/tiny-random-RobertaForSequenceClassification": classifier("Roberta", **WIDE),
    "trl-internal-testing/tiny-LlamaForSequenceClassification-3.2": classifier(
        "Llama", **WIDE, num_key_value_heads=1, num_labels=1
    ),
}
REVISION = "0" * 40


def make_hub(folder: Path) -> Path:
    """The models as a cache of the hub, for `HF_HUB_CACHE`; those that are in `folder` already stay."""
    for name, build in MODELS.items():
        repository = folder / f"models--{name.replace('/', '--')}"
        reference = repository / "refs" / "main"
        if not reference.is_file():
            torch.manual_seed(0)
            build().save_pretrained(repository / "snapshots" / REVISION)
            reference.parent.mkdir(parents=True, exist_ok=True)
            reference.write_text(REVISION, encoding="utf-8")
    return folder
