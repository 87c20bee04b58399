"""The sample data and rows of the five shapes become the tokens and labels that they always became."""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from mole.config import DataConfig
from mole.data import build_datasets
from mole.models.loading import load_tokenizer

SAMPLES = Path(__file__).parents[2] / "assets" / "data"
ASK, REPLY = {"role": "user", "content": "What is 3 + 4?"}, {"role": "assistant", "content": "It is 7."}
SYSTEM, AGAIN = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "And 4 + 4?"}

ROWS: dict[str, list[dict[str, Any]]] = {
    "messages": [
        {"messages": [ASK, REPLY]},
        {"messages": [SYSTEM, ASK, REPLY, AGAIN, {**REPLY, "content": "8, Grüße 你好 🎉"}]},
    ],
    "prompt/completion": [{"prompt": "Say a.", "completion": "a"}, {"prompt": " b? ", "completion": " b\n"}],
    "instruction/input/output": [
        {"instruction": "Sort.", "input": "c b a", "output": "a b c"},
        {"instruction": "Say a.", "input": "", "output": "a"},
    ],
    "text": [{"text": "Once upon a time.\n\nThe end."}, {"text": "<|im_start|>user\nHi<|im_end|>\n"}],
    "multiple choice": [
        {"question": "3 + 4?", "choices": ["6", "7"], "answer": "B"},
        {"question": "4 + 4?", "choices": {"text": ["8", "9"], "label": ["1", "2"]}, "answer": "1"},
    ],
}
DIGESTS = {
    "skills_train.jsonl": "d8ff91859227527a",
    "skills_heldout.jsonl": "fd565be0c3120095",
    "messages": "93746b4d91d59265",
    "prompt/completion": "2ac5a5d28a48d80a",
    "instruction/input/output": "f6e062f5196e18c0",
    "text": "5f8acb7e32cdca4a",
    "multiple choice": "f5a5d48de8b1b9ff",
}


@pytest.fixture(scope="module")
def smollm2(embedded_folder: Path) -> Any:
    return load_tokenizer("smollm2-135m", embedded_folder)


def digest(path: Path, tokenizer: Any) -> str:
    """A digest of the token ids and labels of all rows of a file."""
    rows = build_datasets(DataConfig(path=str(path), eval_fraction=0), tokenizer, 0).train
    return sha256(json.dumps([[row["input_ids"], row["labels"]] for row in rows]).encode()).hexdigest()[:16]


@pytest.mark.parametrize("name", ["skills_train.jsonl", "skills_heldout.jsonl"])
def test_the_sample_data(name: str, smollm2: Any) -> None:
    assert digest(SAMPLES / name, smollm2) == DIGESTS[name]


@pytest.mark.parametrize("shape", ROWS)
def test_a_shape(shape: str, smollm2: Any, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS[shape]))
    assert digest(path, smollm2) == DIGESTS[shape]
