"""What is learnt of a conversation: exactly the answers and what ends them, as each kind of chat template writes them.

The expected texts are the whole example; what carries loss stands between ⟦ and ⟧.
"""

from __future__ import annotations

import json
import shutil
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from templates import marked, with_template

from mole.chat.tokens import answer_ends, prompt_ids
from mole.config import DataConfig, RunConfig
from mole.core.errors import DataError
from mole.data import Example, build_datasets, encode_example
from mole.preflight.preview import preview


def dialogue(*contents: str, system: str = "") -> Example:
    """A conversation that begins with the user, after a system message if there is one."""
    roles = ("user", "assistant")
    turns = [{"role": roles[turn % 2], "content": content} for turn, content in enumerate(contents)]
    return Example((*([{"role": "system", "content": system}] if system else []), *turns))


ECHO = dialogue("Repeat the word blue.", "blue", "Again.", "blue", system="Be brief.")
THOUGHT_TURNS = ("17+4?", "<think>\nadd\n</think>\n\n21", "minus 1?", "<think>\nsubtract\n</think>\n\n20")
THOUGHT = dialogue(*THOUGHT_TURNS)
PLAIN = dialogue("3+4?", "7")
GREETING = Example(({"role": "assistant", "content": "I am here."}, *dialogue("x?", "y").messages))

CASES: dict[tuple[str, str], tuple[Example, str]] = {
    ("mistral", "the system message moves into the last user turn, which repeats an answer's word"): (
        ECHO,
        "<|im_start|>[INST] Repeat the word blue. [/INST]⟦ blue<|im_end|>⟧"
        "[INST] Be brief.\n\nAgain. [/INST]⟦ blue<|im_end|>⟧",
    ),
    ("mistral", "a question has the words of its answer"): (
        dialogue("Say ok", "ok", "Say ok again", "ok"),
        "<|im_start|>[INST] Say ok [/INST]⟦ ok<|im_end|>⟧[INST] Say ok again [/INST]⟦ ok<|im_end|>⟧",
    ),
    ("generation", "only what the template marks"): (
        ECHO,
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nRepeat the word blue.<|im_end|>\n"
        "<|im_start|>assistant\n⟦blue<|im_end|>⟧\n<|im_start|>user\nAgain.<|im_end|>\n"
        "<|im_start|>assistant\n⟦blue<|im_end|>⟧",
    ),
    ("thinks", "the last thought is learnt; the template leaves out the earlier one"): (
        THOUGHT,
        "<|im_start|>user\n17+4?<|im_end|>\n<|im_start|>assistant\n⟦21<|im_end|>⟧\n"
        "<|im_start|>user\nminus 1?<|im_end|>\n<|im_start|>assistant\n⟦<think>\nsubtract\n</think>\n\n20<|im_end|>⟧",
    ),
    ("thinks", "an answer without a thought follows the template's empty one, as in chat"): (
        PLAIN,
        "<|im_start|>user\n3+4?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n⟦7<|im_end|>⟧",
    ),
    ("r1", "the prompt begins the thought"): (
        THOUGHT,
        "<|im_start|><|im_start|>user\n17+4?<|im_start|>assistant\n\n\n⟦21<|im_end|>⟧"
        "<|im_start|>user\nminus 1?<|im_start|>assistant\n<think>\n⟦subtract\n</think>\n\n20<|im_end|>⟧",
    ),
    ("r1", "without a thought the template begins none"): (
        ECHO,
        "<|im_start|><|im_start|>system\nBe brief.<|im_start|>user\nRepeat the word blue.<|im_start|>assistant\n"
        "⟦blue<|im_end|>⟧<|im_start|>user\nAgain.<|im_start|>assistant\n⟦blue<|im_end|>⟧",
    ),
    ("end_text", "an ending of several tokens is learnt whole, after every answer"): (
        ECHO,
        "<|system|>\nBe brief.<|end|>\n<|user|>\nRepeat the word blue.<|end|>\n<|assistant|>\n⟦blue<|end|>⟧\n"
        "<|user|>\nAgain.<|end|>\n<|assistant|>\n⟦blue<|end|>⟧",
    ),
    ("gemma", "a system message that the template does not take begins the first question"): (
        ECHO,
        "<|im_start|><start>user\nBe brief.\n\nRepeat the word blue.<end>\n<start>model\n⟦blue<end>⟧\n"
        "<start>user\nAgain.<end>\n<start>model\n⟦blue<end>⟧",
    ),
    ("gemma", "the first answer is a greeting"): (
        GREETING,
        "<|im_start|><start>model\n⟦I am here.<end>⟧\n<start>user\nx?<end>\n<start>model\n⟦y<end>⟧",
    ),
    ("gemma", "blanks around an answer are trimmed"): (
        dialogue("x?", "  y \n", "z?", " y"),
        "<|im_start|><start>user\nx?<end>\n<start>model\n⟦y<end>⟧\n<start>user\nz?<end>\n<start>model\n⟦y<end>⟧",
    ),
}


@pytest.mark.parametrize(("template", "case"), CASES, ids=lambda value: value.split(",")[0])
def test_loss_is_on_the_answers_and_what_ends_them(template: str, case: str, tiny_tokenizer: Any) -> None:
    example, expected = CASES[template, case]
    tokenizer = with_template(tiny_tokenizer, template)
    assert marked(encode_example(example, tokenizer, 4096), tokenizer) == expected


@pytest.mark.parametrize(
    ("template", "example", "lost"),
    [
        ("thinks", THOUGHT, 1),
        ("r1", THOUGHT, 1),
        ("gemma", THOUGHT, 0),
        ("generation", THOUGHT, 0),
        ("thinks", dialogue("a?", "b", "c?", "<think>\nd\n</think>\n\ne"), 0),
        ("thinks", dialogue(*THOUGHT_TURNS, *THOUGHT_TURNS), 3),
    ],
)
def test_thoughts_that_the_template_leaves_out_are_counted(
    template: str, example: Example, lost: int, tiny_tokenizer: Any
) -> None:
    assert encode_example(example, with_template(tiny_tokenizer, template), 4096).lost_thoughts == lost


def test_thoughts_that_are_not_learnt_are_said(tiny_folder: Path, tiny_tokenizer: Any, tmp_path: Path) -> None:
    shutil.copytree(tiny_folder, tmp_path / "model")
    with_template(tiny_tokenizer, "thinks").save_pretrained(tmp_path / "model")
    (tmp_path / "d.jsonl").write_text(2 * (json.dumps({"messages": THOUGHT.messages}) + "\n"))
    config = RunConfig.from_dict(
        {"model": {"name": str(tmp_path / "model")}, "data": {"path": str(tmp_path / "d.jsonl")}}
    )
    said = "The chat template leaves out 2 thoughts of answers in 2 rows, as most do in all but the last: these are not"
    assert any(text.startswith(said) for text in preview(config).notices)


@pytest.mark.parametrize("template", ["thinks", "end_text", "mistral", "gemma", "date"])
def test_chat_reads_the_tokens_before_the_answer(template: str, tiny_tokenizer: Any) -> None:
    tokenizer = with_template(tiny_tokenizer, template)
    example = dialogue("Say ok", "ok", "Say ok again", "ok")
    prompt = prompt_ids(example.prompt, tokenizer)
    assert encode_example(example, tokenizer, 4096).input_ids[: len(prompt)] == prompt


@pytest.mark.parametrize(("thinking", "begun"), [(True, ""), (False, "<think>\n\n</think>\n\n")])
def test_thinking_can_be_chosen_for_all_rows(thinking: bool, begun: str, tiny_tokenizer: Any) -> None:
    tokenizer = with_template(tiny_tokenizer, "thinks")
    text = marked(encode_example(PLAIN, tokenizer, 4096, enable_thinking=thinking), tokenizer)
    whole = "<think>\n\n</think>\n\n7<|im_end|>"
    assert text == f"<|im_start|>user\n3+4?<|im_end|>\n<|im_start|>assistant\n{begun}⟦{whole.removeprefix(begun)}⟧"


@pytest.mark.parametrize("template", ["gemma", "thinks", "generation", "end_text", None])
def test_what_looks_like_a_special_token_in_a_text_stays_text(template: str | None, tiny_tokenizer: Any) -> None:
    tokenizer = with_template(tiny_tokenizer, template) if template else tiny_tokenizer
    question, answer = "What does <|im_end|> mean, <|im_start|>?", "The marker <|im_end|> closes a turn."
    encoded = encode_example(dialogue(question, answer, question, answer), tokenizer, 4096)
    ids = encoded.input_ids
    assert marked(encoded, tokenizer).count(answer) == 2 == tokenizer.decode(ids).count(question)
    plain = encode_example(dialogue("What?", "The.", "What?", "The."), tokenizer, 4096).input_ids
    for special in tokenizer.all_special_ids:
        assert ids.count(special) == plain.count(special)
    prompt = prompt_ids([{"role": "user", "content": question}], tokenizer)
    alone = encode_example(dialogue(question, answer), tokenizer, 4096).input_ids
    assert prompt == alone[: len(prompt)], "in chat too"


def test_a_template_that_refuses_a_conversation_refuses_the_row(tiny_tokenizer: Any) -> None:
    with pytest.raises(DataError, match="the chat template rejects the messages: roles must alternate"):
        encode_example(GREETING, with_template(tiny_tokenizer, "mistral"), 4096)


def test_where_a_template_takes_no_system_message_chat_has_it_too(tiny_tokenizer: Any) -> None:
    tokenizer = with_template(tiny_tokenizer, "gemma")
    ids = encode_example(ECHO, tokenizer, 4096).input_ids
    prompt = prompt_ids(ECHO.prompt, tokenizer)
    assert prompt == ids[: len(prompt)] and "Be brief.\n\nRepeat" in tokenizer.decode(prompt)


def test_a_text_that_has_the_templates_tokens_gets_none_twice(tiny_tokenizer: Any) -> None:
    def text_of(text: str) -> str:
        return tiny_tokenizer.decode(encode_example(Example(text=text), tiny_tokenizer, 4096).input_ids)

    for ended in ("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHo<|im_end|>\n", "Ho<|im_end|>"):
        assert text_of(ended) == ended
    assert text_of("Ho") == "Ho<|im_end|>"


def test_where_an_answer_ends_with_text_chat_knows_it(tiny_model: Any, tiny_tokenizer: Any) -> None:
    model, tokenizer = tiny_model("llama"), with_template(tiny_tokenizer, "end_text")
    ends = answer_ends(tokenizer, model)
    assert (ends.text, ends.ids) == ("<|end|>", {tokenizer.eos_token_id})
    assert answer_ends(tiny_tokenizer).text == answer_ends(with_template(tiny_tokenizer, "mistral")).text == ""


def test_a_template_that_writes_the_date_writes_that_of_the_run(tiny_tokenizer: Any, tmp_path: Path) -> None:
    tokenizer = with_template(tiny_tokenizer, "date")
    (tmp_path / "d.jsonl").write_text(json.dumps({"prompt": "x?", "completion": "y"}))
    config = DataConfig(path=str(tmp_path / "d.jsonl"))
    (row,) = build_datasets(config, tokenizer, 0, datetime(2024, 2, 29, 23, 59)).train
    assert "Today Date: 29 Feb 2024 23:59" in tokenizer.decode(row["input_ids"])
    (row,) = build_datasets(config, tokenizer, 0).train
    assert f"Today Date: {datetime.now():%d %b %Y}" in tokenizer.decode(row["input_ids"])


def test_of_a_long_prompt_the_oldest_content_goes_and_the_rest_stays(tiny_tokenizer: Any) -> None:
    words = [" ".join(f"{letter}{number}" for number in range(40)) for letter in "pq"]
    example = dialogue(words[0], "yes", words[1], "no", system="Be brief.")
    whole = encode_example(example, tiny_tokenizer, 4096)
    short = encode_example(example, tiny_tokenizer, 120)
    text = marked(short, tiny_tokenizer)
    assert len(short.input_ids) == 120 and short.dropped == len(whole.input_ids) - 120 and short.cut == 0
    begin = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n"
    assert text.startswith(begin) and "p0" not in text
    assert text.endswith("<|im_end|>\n<|im_start|>assistant\n⟦no<|im_end|>⟧") and "q39" in text
    assert text.count("<|im_start|>") == 5, "every turn is still one"
    shortest = marked(encode_example(example, tiny_tokenizer, 60), tiny_tokenizer)
    assert shortest.startswith(begin) and "q39" in shortest and "yes" not in shortest


@pytest.mark.parametrize("template", ["mistral", "gemma", "thinks", "generation", "r1", "end_text"])
def test_with_every_template_a_long_prompt_keeps_what_the_template_writes(template: str, tiny_tokenizer: Any) -> None:
    tokenizer = with_template(tiny_tokenizer, template)
    long, short = (
        marked(encode_example(dialogue(question, "yes"), tokenizer, 60), tokenizer) for question in ("word " * 200, "?")
    )
    before, after = short.split("?")
    assert long.startswith(before) and long.endswith(after)
