"""Adapters of other PEFT methods with patterns in their settings: `attach` makes of them what PEFT makes of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from adapting import logits
from peft import PeftConfig, PeftModel, get_peft_config, get_peft_model
from transformers import AutoModelForCausalLM

from mole.config import ModelConfig
from mole.core.errors import MoleError
from mole.models.loading import attach, load_base
from mole.models.peft_patterns import TABLES, USUAL_TABLE, literal_table, resolve_patterns

SETTINGS = "adapter_config.json"
LORA = {"peft_type": "LORA", "r": 4, "init_lora_weights": False}
ADAPTERS: dict[str, dict[str, Any]] = {
    "a pattern of modules": {**LORA, "target_modules": r".*\.(q|v)_proj"},
    "alternatives": {**LORA, "target_modules": r".*layers\.0\..*_proj|lm_head"},
    "some excluded": {**LORA, "target_modules": r".*_proj", "exclude_modules": r".*\.0\..*|.*down.*"},
    "some of a list excluded": {**LORA, "target_modules": ["q_proj", "nothing"], "exclude_modules": r".*\.0\..*"},
    "none excluded": {**LORA, "target_modules": r".*q_proj", "exclude_modules": "nothing"},
    "all of them": {**LORA, "target_modules": "all-linear", "exclude_modules": "lm_head|.*down_proj"},
    "ranks by patterns": {
        **LORA, "target_modules": ["q_proj", "k_proj", "up_proj"],
        "rank_pattern": {r"layers\.[01]\.self_attn\.q_proj": 3, ".*mlp.*": 5, "q_proj": 6, r"^model\..*k_proj": 2},
        "alpha_pattern": {"k_proj|q_proj": 3, "up_proj": 2.5, "nothing": 7},
    },
    "the first of two that match": {
        **LORA, "target_modules": ["q_proj"], "rank_pattern": {".*1.self_attn.*": 2, "q_proj": 6, "model.*": 8},
    },
    "saved modules": {**LORA, "target_modules": r".*q_proj", "modules_to_save": ["lm_head", "model.norm"]},
    "some layers": {
        **LORA, "target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": ["h", "layers"],
    },
    "embeddings": {**LORA, "target_modules": r"(.*\.)?embed_tokens|.*\.q_proj"},
    "IA3": {
        "peft_type": "IA3", "target_modules": r".*(k_proj|down_proj)", "feedforward_modules": r".*\.1\..*down_proj",
        "init_ia3_weights": False,
    },
    "LoHa": {
        "peft_type": "LOHA", "r": 2, "target_modules": r".*self_attn\.[qk]_proj", "init_weights": False,
        "rank_pattern": {r".*\.1\..*": 3}, "alpha_pattern": {"q.proj": 2},
    },
    "LoKr": {
        "peft_type": "LOKR", "r": 2, "target_modules": r".*v_proj", "init_weights": False,
        "rank_pattern": {r"[1-9]\.self_attn\.v_proj": 3},
    },
    "DeLoRA": {
        "peft_type": "DELORA", "r": 2, "target_modules": r".*q_proj", "init_weights": False,
        "rank_pattern": {r".*\.1\..*": 3}, "lambda_pattern": {r".*\.0\..*": 9},
    },
    "FourierFT": {
        "peft_type": "FOURIERFT", "n_frequency": 8, "target_modules": r".*(q|v)_proj", "init_weights": False,
        "n_frequency_pattern": {r"0\.self_attn\..*": 9, "v_proj": 7, "q_proj|": 3},
    },
    "C3A": {
        "peft_type": "C3A", "block_size": 8, "target_modules": r".*(q|o)_proj", "init_weights": "gaussian",
        "block_size_pattern": {r"1\.self_attn\.[oq]_proj": 16},
    },
    "OSF": {"peft_type": "OSF", "target_modules": ["q_proj"], "rank_pattern": {r"\.0\.": 3, "q": 5}},
    "repeated layers": {**LORA, "target_modules": ["q_proj"], "layer_replication": [[0, 2], [1, 2]]},
    "an adaption prompt": {
        "peft_type": "ADAPTION_PROMPT", "target_modules": "self_attn", "adapter_len": 3, "adapter_layers": 2,
    },
    "a prompt": {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 3},
}  # fmt: skip


@pytest.fixture
def base_model(tiny_folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32).eval()


def write(folder: Path, model: Any, values: dict[str, Any]) -> None:
    """An adapter of random weights, as PEFT writes it; its file keeps the patterns."""
    torch.manual_seed(3)
    adapter = get_peft_model(model, get_peft_config({"task_type": "CAUSAL_LM", **values}))
    with torch.no_grad():
        for weight in adapter.parameters():
            if weight.requires_grad:
                weight.add_(torch.randn_like(weight) * 0.1)
    adapter.save_pretrained(folder)
    written = json.loads((folder / SETTINGS).read_text())
    patterned = {key: value for key, value in values.items() if "pattern" in key or "modules" in key}
    (folder / SETTINGS).write_text(json.dumps({**written, **patterned}))


@pytest.mark.parametrize("kind", ADAPTERS)
def test_an_adapter_with_patterns_gives_to_the_bit_what_peft_gives(
    kind: str, tiny_folder: Path, base_model: Any, tmp_path: Path
) -> None:
    write(tmp_path, base_model, ADAPTERS[kind])
    plain = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32).eval()
    before = logits(plain)
    theirs = PeftModel.from_pretrained(plain, tmp_path).eval()
    base = load_base(ModelConfig(name=str(tiny_folder), device="cpu", dtype="float32"))
    ours = attach(base, tmp_path).model
    assert [name for name, _ in ours.named_modules()] == [name for name, _ in theirs.named_modules()]
    assert {n: w.shape for n, w in ours.state_dict().items()} == {n: w.shape for n, w in theirs.state_dict().items()}
    assert torch.equal(logits(ours), logits(theirs))
    assert not torch.equal(logits(ours), before)


def test_a_second_one_is_added_beside_the_first(tiny_folder: Path, base_model: Any, tmp_path: Path) -> None:
    write(tmp_path / "a", base_model, ADAPTERS["a pattern of modules"])
    other = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    write(tmp_path / "b", other, ADAPTERS["ranks by patterns"])
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_folder), tmp_path / "a").eval()
    theirs.load_adapter(tmp_path / "b", "b")
    base = load_base(ModelConfig(name=str(tiny_folder), device="cpu", dtype="float32"))
    ours = attach(base, tmp_path / "a").model
    attach(base, tmp_path / "b", onto=ours, adapter="b")
    for name in ("default", "b"):
        theirs.set_adapter(name)
        ours.set_adapter(name)
        assert torch.equal(logits(ours), logits(theirs))


NAMES = [f"model.layers.{layer}.self_attn.{name}" for layer in (0, 1, 10) for name in ("q_proj", "k_proj")] + [
    "lm_head"
]
KEYS = ["q_proj", ".*1.*", r"1\.self_attn\.k_proj", "q|k", "lm_head", "^model.*q_proj", ".*", "layers", "self_attn.*k"]


LOOKAHEAD = r"^(?!.*\.0\.)(?!.*lm_head).*(q|v)_proj"
SAME = r".*\.1\..*(q|v)_proj"
"""The same modules of this model in RE2's syntax."""


@pytest.mark.parametrize("kind", ["LORA", "LOHA", "IA3", "MOLE_STUDIO"])
def test_an_adapter_with_a_lookahead_loads_by_the_names_of_its_weights(
    tiny_folder: Path, base_model: Any, tmp_path: Path, kind: str
) -> None:
    """As written for models that see, and as earlier versions wrote what they were given."""
    own = {"LORA": {"init_lora_weights": False}, "LOHA": {"init_weights": False}, "IA3": {"init_ia3_weights": False}}
    values = {"peft_type": kind, "target_modules": SAME, **own.get(kind, {"router": "topk", "num_experts": 2})}
    values |= {"feedforward_modules": []} if kind == "IA3" else {"r": 2}
    write(tmp_path, base_model, values)
    expected = logits(attach(load_base(ModelConfig(str(tiny_folder), device="cpu")), tmp_path).model)
    path = tmp_path / SETTINGS
    path.write_text(json.dumps({**json.loads(path.read_text()), "target_modules": LOOKAHEAD}))
    loaded = attach(load_base(ModelConfig(str(tiny_folder), device="cpu")), tmp_path)
    assert torch.equal(logits(loaded.model), expected)


@pytest.mark.parametrize("kind", [*TABLES, "LORA"])
def test_a_table_gives_each_name_what_its_patterns_give(kind: str) -> None:
    """All pairs of keys, in both orders, looked up as PEFT does it."""
    import re

    table = TABLES.get(kind, USUAL_TABLE)
    if table is None:
        return

    def look_up(values: dict[str, int], name: str) -> int | None:
        find = re.search if table.search else re.match
        return next((value for key, value in values.items() if find(table.within.replace("{}", key), name)), None)

    for values in ({first: 1, second: 2} for first in KEYS for second in KEYS):
        literal = literal_table(values, NAMES, "rank_pattern", table)
        for name in NAMES:
            assert look_up(literal, name) == look_up(values, name), (values, name)
        assert len(literal) <= len(values)


REFUSED: dict[str, dict[str, Any]] = {
    "target_modules": {"target_modules": r"nothing.*"},
    "exclude_modules": {"exclude_modules": 7},
    "modules_to_save": {"modules_to_save": ["(lm_head)+"]},
    "layers_pattern": {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "(layers|h)"},
    "rank_pattern": {"rank_pattern": {"[": 3}},
    "alpha_pattern": {"alpha_pattern": {"q_proj": "x"}},
    "layer_replication": {"layer_replication": [[0, 2], [0, 2]]},
    "X-LoRA": {"peft_type": "XLORA", "hidden_size": 32, "adapters": {"0": "elsewhere"}},
}


@pytest.mark.parametrize("field", REFUSED)
def test_what_cannot_be_resolved_is_refused_by_its_name(
    field: str, tiny_folder: Path, base_model: Any, tmp_path: Path
) -> None:
    write(tmp_path, base_model, ADAPTERS["a pattern of modules"])
    values = json.loads((tmp_path / SETTINGS).read_text())
    (tmp_path / SETTINGS).write_text(json.dumps({**values, **REFUSED[field]}))
    with pytest.raises(MoleError, match=field) as caught:
        attach(load_base(ModelConfig(name=str(tiny_folder), device="cpu", dtype="float32")), tmp_path)
    assert "\n" not in str(caught.value)


def test_the_settings_of_the_methods_are_known(base_model: Any) -> None:
    """A PEFT that adds a setting with `pattern` in its name, or a method that matches otherwise, needs a look here."""
    import dataclasses

    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    tables = {
        (str(getattr(kind, "value", kind)), item.name)
        for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()
        for item in dataclasses.fields(config)
        if item.name.endswith("_pattern") and item.name != "layers_pattern" and "MOLE_STUDIO" not in str(kind)
    }
    assert tables <= {  # PEFT 0.19 has all but HiRA
        ("ADALORA", "alpha_pattern"), ("ADALORA", "rank_pattern"), ("C3A", "block_size_pattern"),
        ("DELORA", "lambda_pattern"), ("DELORA", "rank_pattern"), ("FOURIERFT", "n_frequency_pattern"),
        ("HIRA", "rank_pattern"), ("LOHA", "alpha_pattern"), ("LOHA", "rank_pattern"), ("LOKR", "alpha_pattern"),
        ("LOKR", "rank_pattern"), ("LORA", "alpha_pattern"), ("LORA", "rank_pattern"), ("OSF", "rank_pattern"),
        ("WAVEFT", "n_frequency_pattern"),
    }  # fmt: skip
    config = PeftConfig.from_peft_type(peft_type="LORA", target_modules=["q_proj"])
    resolve_patterns(config, base_model)
    assert config.target_modules == {"q_proj"}
