"""What a base model can read: rows longer than its positions, and tokens without an embedding, are told before."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import DECODERS
from transformers import AddedToken

from mole import models, runs
from mole.chat import generate
from mole.config import ModelConfig, RunConfig, apply_overrides
from mole.core.errors import ModelError
from mole.data import encode_examples, read_examples
from mole.models.context import context_length, learnt_positions
from mole.preflight.estimate import estimate
from mole.preflight.preview import preview
from mole.training.continuing import continue_run
from mole.training.trainer import train

TABLES = ("gpt2", "gpt_bigcode", "opt", "gptj", "codegen", "mpt")
"""Architectures with a table of positions."""


@pytest.mark.parametrize("name", [*TABLES, "llama", "falcon", "bloom", "phi"])
def test_a_model_fails_beyond_its_learnt_positions_and_others_go_on(name: str) -> None:
    model = DECODERS[name]()
    limit = learnt_positions(model.config)
    assert limit == (256 if name in TABLES else None)
    ids = torch.randint(3, 500, (1, 270))
    with torch.no_grad():
        if limit is None:
            model(input_ids=ids)
        else:
            model(input_ids=ids[:, :limit])
            with pytest.raises((IndexError, RuntimeError)):
                model(input_ids=ids[:, : limit + 1])


@pytest.fixture
def long_rows(tmp_path: Path) -> Path:
    """Four rows, the last of some 700 tokens."""
    rows = [{"prompt": f"Say {n}", "completion": str(n)} for n in range(3)]
    rows.append({"prompt": "a b " * 350, "completion": "done"})
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


def saved(folder: Path, model: Any, tokenizer: Any) -> Path:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def settings(folder: Path, data: Path, **more: Any) -> RunConfig:
    given = {
        "model.name": str(folder), "model.device": "cpu", "model.dtype": "float32", "data.path": str(data),
        "data.eval_fraction": 0, "data.max_length": 2048, "adapter.num_experts": 2, "adapter.r": 2,
        "adapter.target_modules": "all-linear", "training.max_steps": 1, "training.warmup_steps": 0, **more,
    }  # fmt: skip
    return RunConfig.from_dict(apply_overrides({}, given))


def test_rows_are_cut_to_the_learnt_positions_and_that_is_said_everywhere(
    home: Path, tiny_model: Callable[..., Any], tiny_tokenizer: Any, long_rows: Path, tmp_path: Path
) -> None:
    config = settings(saved(tmp_path / "gpt2", tiny_model("gpt2"), tiny_tokenizer), long_rows)
    told = f"data.max_length is 2048, and {config.model.name} has 512 positions: rows are cut to that."
    before, shown = estimate(config), preview(config)
    assert told in before.notes and before.longest == 512
    assert told in shown.notices and (shown.max_length, shown.truncated) == (512, 1)
    run = runs.create(config)
    train(run)
    started = next(event for event in run.events() if event["type"] == "started")
    assert run.state == "finished" and told in started["notices"]
    assert run.config.data.max_length == 2048  # the settings stay as they were given
    longer = continue_run(run, 1)
    train(longer, resume=True)
    assert (longer.state, longer.step) == ("finished", 2)


def test_rows_beyond_what_a_model_with_rotated_positions_was_made_for_are_learnt_and_told(
    home: Path, tiny_folder: Path, long_rows: Path
) -> None:
    config = settings(tiny_folder, long_rows)
    notes, shown = estimate(config).notes, preview(config)
    (told,) = [note for note in notes if "positions" in note or "was made for 512" in note]
    assert told in shown.notices and shown.truncated == 0
    short = dataclasses.replace(config, data=dataclasses.replace(config.data, max_length=512))
    assert not [note for note in estimate(short).notes if "made for" in note]


# ---------------------------------------------------------------------------------------------------------
# Tokens without an embedding


@pytest.fixture
def extended(tiny_model: Callable[..., Any], tiny_tokenizer: Any, tmp_path: Path) -> Callable[..., Path]:
    """`extended(pad="<pad>")`: a base model whose tokenizer got tokens that the model has no embeddings for."""

    def make(template: str | None = None, **tokens: str) -> Path:
        tokenizer = copy.deepcopy(tiny_tokenizer)
        tokenizer.add_tokens([AddedToken(token, special=True) for token in tokens.values()])
        tokenizer.pad_token = tokens.get("pad", tokenizer.pad_token)
        tokenizer.chat_template = template or tokenizer.chat_template
        return saved(tmp_path / "extended", tiny_model(), tokenizer)

    return make


def test_a_padding_token_without_an_embedding_is_replaced(
    home: Path, extended: Callable[..., Path], long_rows: Path, tiny_tokenizer: Any
) -> None:
    folder = extended(pad="<new pad>")
    assert models.load_tokenizer("it", folder).pad_token == tiny_tokenizer.eos_token
    run = runs.create(settings(folder, long_rows, **{"training.per_device_train_batch_size": 4}))
    train(run)  # a batch with rows of several lengths
    assert run.state == "finished"


def test_a_chat_token_without_an_embedding_is_one_line_before_training_and_in_chat(
    home: Path, extended: Callable[..., Path], long_rows: Path, tiny_tokenizer: Any
) -> None:
    folder = extended("<turn>" + tiny_tokenizer.chat_template, turn="<turn>")
    config, line = settings(folder, long_rows), f"writes the token '<turn>' with the id {len(tiny_tokenizer)}"
    run = runs.create(config)
    for attempt in (lambda: estimate(config), lambda: preview(config), lambda: train(run)):
        with pytest.raises(ModelError, match=line):
            attempt()
    base = models.load_base(ModelConfig(str(folder), device="cpu", dtype="float32"))
    loaded = models.Loaded(base.model, base.tokenizer, "it", base.name)
    with pytest.raises(ModelError, match=line):
        list(generate.stream(loaded, [{"role": "user", "content": "Hello"}]))


def test_tokens_that_no_text_has_are_no_matter(extended: Callable[..., Path], long_rows: Path) -> None:
    """Some tokenizers have more tokens than their model has embeddings, for other uses."""
    tokenizer = models.load_tokenizer("it", extended(image="<image>"))
    encoded = list(encode_examples(read_examples(str(long_rows)).examples, tokenizer, 512))
    assert len(encoded) == 4 and not any(isinstance(row, Exception) for row in encoded)


def test_context_length_is_unlimited_where_the_config_does_not_say() -> None:
    assert context_length(DECODERS["bloom"]().config) > 1 << 20 and learnt_positions(None) is None
