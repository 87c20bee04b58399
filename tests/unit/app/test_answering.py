"""Replies column by column: what each is asked, what is remembered of the last one, and what goes wrong in one."""

from __future__ import annotations

import copy
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from app.services.answering import ChatColumn, LastRecords, ReplyRequest, UIUpdate, answer_columns, chat_columns
from app.services.conversation import Turn, history_of, turns_of
from mole.mixture.steering import Steering

FIRST = LastRecords()
SHORT = ReplyRequest({"max_new_tokens": 4})


@pytest.fixture(autouse=True)
def on_the_cpu(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


def last_of(updates: list[UIUpdate], part: str, place: int = 0) -> Any:
    return [value for m in updates if m.place == place and (value := getattr(m, part)) is not None][-1]


def test_a_steered_reply_is_held_against_the_last_one_of_the_same_model(tiny_adapter: Path) -> None:
    target = str(tiny_adapter)
    trained = list(answer_columns([ChatColumn(target, [Turn("hello")])], SHORT, FIRST))
    records = last_of(trained, "records")
    identifier = last_of(trained, "view")["meta"]["id"]
    assert records == LastRecords({target: [identifier, ""]}, {0: identifier})
    column = ChatColumn(target, [Turn("hello")], Steering({"top_p": 0.5}, frozenset({1})))
    steered = list(answer_columns([column], SHORT, records))
    meta = last_of(steered, "view")["meta"]
    assert (meta["against"], meta["against_label"]) == (records.by_target[target][0], "as trained")
    (turn,) = turns_of(last_of(steered, "history"))
    assert turn.note == "Routing overrides: top p 0.75 → 0.5 · expert 2 muted"
    assert last_of(steered, "records").by_target[target] == [meta["id"], "top p 0.75 → 0.5 · expert 2 muted"]


def test_the_columns_share_the_message_and_only_the_first_is_steered(tiny_adapter: Path, tiny_folder: Path) -> None:
    main, other = [Turn("a", "1"), Turn("b")], [Turn("a", "own")]
    steering = Steering(muted=frozenset({0}))
    base = f"base:{tiny_folder}"
    columns = chat_columns(str(tiny_adapter), [base], steering, [history_of(main), history_of(other), [], []])
    assert [column.turns for column in columns] == [main, [Turn("a", "own"), Turn("b")]]
    assert [bool(column.steering) for column in columns] == [True, False]
    (alone,) = chat_columns(str(tiny_adapter), [], steering, [history_of(main), [], [], []])
    assert not alone.label


def reciting(folder: Path, tokenizer: Any, prompt: str, text: str) -> str:
    """The target of a base model that answers a prompt with this text: what it says depends on the position alone."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    start = len(tokenizer(prompt, add_special_tokens=False)["input_ids"]) - 1
    said = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    shape = {"vocab_size": len(tokenizer), "n_embd": 256, "n_layer": 1, "n_head": 1, "n_positions": 128}
    model = GPT2LMHeadModel(
        GPT2Config(**shape, tie_word_embeddings=False, eos_token_id=tokenizer.eos_token_id)  # type: ignore[arg-type]
    )
    positions, (block,) = model.transformer.wpe.weight, model.transformer.h
    with torch.no_grad():
        for weight in (
            model.transformer.wte.weight, block.attn.c_proj.weight, block.mlp.c_proj.weight, model.lm_head.weight
        ):  # fmt: skip
            weight.zero_()
        for place, token in enumerate(said, start):
            model.lm_head.weight[token] += positions[place]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return f"base:{folder}"


def test_a_thought_is_shown_before_the_answer_and_is_not_read_again(tiny_tokenizer: Any, tmp_path: Path) -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}|{% endfor %}"
    target = reciting(tmp_path / "base", tokenizer, "2 + 2?|", "<think>\nIt is even.\n</think>\n\n4.")
    long = ReplyRequest({"max_new_tokens": 64})
    (turn,) = turns_of(last_of(list(answer_columns([ChatColumn(target, [Turn("2 + 2?")])], long, FIRST)), "history"))
    assert (turn.thought, turn.answer) == ("It is even.", "4.")
    again = ChatColumn(target, [turn, Turn("And 3 + 3?")])
    (first, *_) = [
        update.view for update in answer_columns([again], long, FIRST) if update.view and update.view["meta"]
    ]
    prompt = "2 + 2?|4.|And 3 + 3?|"
    assert first["meta"]["prompt"] == len(tokenizer(prompt, add_special_tokens=False)["input_ids"])


def test_a_reply_that_ends_within_its_thought_says_so(tiny_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "thinks"
    shutil.copytree(tiny_folder, folder)
    (folder / "chat_template.jinja").write_text(
        "{{ messages[-1].content }}{% if enable_thinking and add_generation_prompt %}<think>\n{% endif %}"
    )
    column = ChatColumn(f"base:{folder}", [Turn("hello")])
    updates = list(
        answer_columns([column], replace(SHORT, settings={**SHORT.settings, "enable_thinking": True}), FIRST)
    )
    (turn,) = turns_of(last_of(updates, "history"))
    assert turn.thought and turn.answer is None
    assert last_of(updates, "status").endswith("The reply ends within the model's thought: raise the maximum length.")


def test_what_goes_wrong_in_one_column_is_said_and_the_next_answers(tiny_adapter: Path) -> None:
    columns = [
        ChatColumn("nothing", [Turn("hi")], label="nothing"),
        ChatColumn(str(tiny_adapter), [Turn("hi")], label="tiny"),
    ]
    updates = list(answer_columns(columns, SHORT, FIRST))
    assert last_of(updates, "history", 1)[-1]["role"] == "assistant"
    status = [m.status for m in updates if m.status is not None][-1]
    assert "**nothing: Not answered.** There is no run and no adapter folder 'nothing'" in status
    assert "**tiny** · 4 tokens" in status
