"""From rows to batches: shapes, rejected rows, the chat template, labels, truncation, the split, padding."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Sequence
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mole.config import DataConfig
from mole.core.errors import DataError
from mole.data import (
    DEFAULT_CHAT_TEMPLATE,
    Collator,
    EncodedExample,
    Example,
    ExampleSet,
    build_datasets,
    chat_template,
    encode_example,
    encode_examples,
    read_examples,
    render_prompt,
    rendering,
    split_by_length,
)
from mole.data.batches import optimal_cuts

FORMAT = "Which is wet?\n\nAnswer1: sand Answer2: sea Answer3: sun\n\nAnswer format: answer1/answer2/answer3"


def rows_of(folder: Path, *rows: Any, **options: Any) -> ExampleSet:
    """What `read_examples` makes of these JSON values."""
    return read_examples(str(write(folder, *rows)), **options)


def write(folder: Path, *rows: Any, name: str = "data.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def dialogue(*contents: str) -> Example:
    """A conversation that begins with the user and ends with the assistant."""
    roles = ("user", "assistant")
    return Example(tuple({"role": roles[i % 2], "content": content} for i, content in enumerate(contents)))


def learnt(encoded: EncodedExample, tokenizer: Any) -> str:
    """The text that carries loss."""
    return tokenizer.decode([label for label in encoded.labels if label != -100])


# Shapes


@pytest.mark.parametrize(
    ("row", "shape", "contents"),
    [
        ({"prompt": "2+2?", "completion": "4"}, "prompt/completion", ["2+2?", "4"]),
        ({"instruction": "Add.", "input": "2 2", "output": "4"}, "instruction/input/output", ["Add.\n\n2 2", "4"]),
        ({"instruction": "2+2?", "input": "", "output": "4"}, "instruction/input/output", ["2+2?", "4"]),
        ({"instruction": "2+2?", "input": None, "output": "4"}, "instruction/input/output", ["2+2?", "4"]),
        ({"instruction": "2+2?", "output": "4"}, "instruction/input/output", ["2+2?", "4"]),
        (
            {"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]},
            "messages",
            ["2+2?", "4"],
        ),
    ],
)
def test_each_shape_becomes_a_conversation(tmp_path: Path, row: dict, shape: str, contents: list[str]) -> None:
    rows = rows_of(tmp_path, row)
    (example,) = rows.examples
    assert rows.shape == shape and [message["content"] for message in example.messages] == contents
    assert (example.target, example.text, example.choices) == ("4", None, None)


def test_a_text_row_has_no_conversation(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, {"text": "Once upon a time"})
    assert rows.shape == "text" and rows.examples[0].text == rows.examples[0].target == "Once upon a time"


def test_messages_end_with_the_last_answer(tmp_path: Path) -> None:
    turns = [("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello"), ("user", "Bye")]
    (example,) = rows_of(tmp_path, {"messages": [{"role": r, "content": c} for r, c in turns]}).examples
    assert [message["role"] for message in example.messages] == ["system", "user", "assistant"]


def test_an_answer_format_line_gives_choices_to_score(tmp_path: Path) -> None:
    row = {"instruction": FORMAT, "input": "", "output": "the correct answer is answer2", "answer": "answer2"}
    rows = rows_of(tmp_path, row)
    (example,) = rows.examples
    assert rows.shape == "multiple choice"
    assert example.choices == tuple(f"the correct answer is answer{i}" for i in (1, 2, 3))
    assert example.answer == example.target == "the correct answer is answer2"


def test_only_the_whole_label_is_replaced_in_the_output(tmp_path: Path) -> None:
    labels = "/".join(f"answer{i}" for i in range(1, 12))
    row = {"instruction": f"Pick.\nAnswer format: {labels}", "output": "not answer11 but answer1", "answer": "answer1"}
    (example,) = rows_of(tmp_path, row).examples
    assert example.choices is not None and len(example.choices) == 11
    assert example.choices[4] == "not answer11 but answer5"


@pytest.mark.parametrize(
    ("choices", "answer"),
    [
        (["sand", "sea"], "sea"),
        (["sand", "sea"], 1),
        (["sand", "sea"], "1"),
        (["sand", "sea"], "B"),
        ({"text": ["sand", "sea"], "label": ["A", "B"]}, "B"),
        ({"text": ["sand", "sea"], "label": ["1", "2"]}, "2"),
        ({"text": ["sand", "sea"], "label": ["1", "2"]}, 2),
        ({"text": ["sand", "sea"], "label": ["A", "B"]}, "sea"),
        ('["sand", "sea"]', "sea"),
    ],
)
@pytest.mark.parametrize("names", [("question", "answer"), ("question", "answerKey"), ("prompt", "answer")])
def test_choices_are_answered_by_label_text_or_index(
    tmp_path: Path, choices: Any, answer: Any, names: tuple[str, str]
) -> None:
    rows = rows_of(tmp_path, {names[0]: "Which is wet?", "choices": choices, names[1]: answer})
    (example,) = rows.examples
    assert rows.shape == "multiple choice" and example.prompt == [{"role": "user", "content": "Which is wet?"}]
    assert (example.choices, example.answer, example.target) == (("sand", "sea"), "sea", "sea")


def test_a_text_that_looks_like_an_index_is_a_text_first(tmp_path: Path) -> None:
    assert rows_of(tmp_path, {"question": "1+1?", "choices": ["1", "2", "3"], "answer": "2"}).examples[0].answer == "2"


def test_another_choice_can_stand_in_the_answers_place() -> None:
    example = dialogue("Which is wet?", "sea")
    assert example.with_target("sand").target == "sand" and example.with_target("sand").prompt == example.prompt


# Columns


def test_columns_of_other_names_are_mapped(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, {"q": "2+2?", "a": "4"}, columns={"prompt": "q", "completion": "a"})
    assert rows.shape == "prompt/completion" and rows.examples[0].target == "4"


def test_a_mapped_column_decides_the_shape(tmp_path: Path) -> None:
    row = {"prompt": "2+2?", "completion": "4", "body": "A story."}
    assert rows_of(tmp_path, row).shape == "prompt/completion"
    rows = rows_of(tmp_path, row, columns={"text": "body"})
    assert rows.shape == "text" and rows.examples[0].text == "A story."


def test_a_mapped_column_that_is_not_there_names_those_that_are(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"data.columns.prompt is 'ask', but .* has no such column; it has: q, a"
    ) as caught:
        rows_of(tmp_path, {"q": "2+2?", "a": "4"}, columns={"prompt": "ask"})
    assert caught.value.field == "data.columns.prompt"


def test_a_mapping_of_an_unknown_field_names_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data.columns.propmt is not a field .* prompt"):
        rows_of(tmp_path, {"q": "2+2?", "a": "4"}, columns={"propmt": "q"})


def test_an_unknown_shape_names_the_columns_found_and_the_shapes_known(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"\(q, a\) fit no known shape.*prompt \+ completion"):
        rows_of(tmp_path, {"q": "2+2?", "a": "4"})


# Rejected rows

GOOD = {"prompt": "2+2?", "completion": "4"}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "2+2?", "completion": None}, "completion is null"),
        ({"prompt": "2+2?"}, "completion is missing"),
        ({"prompt": "2+2?", "completion": True}, "completion is true or false, not text"),
        ({"prompt": "2+2?", "completion": ["4"]}, "completion is a list, not text"),
        ({"prompt": {"a": 1}, "completion": "4"}, "prompt is an object, not text"),
        ({"prompt": True, "completion": "4"}, "prompt is true or false, not text"),
        ({"prompt": "2+2?", "completion": " \n"}, "completion is empty"),
        ({"prompt": "", "completion": "4"}, "prompt is empty"),
        ({"prompt": "2+2?", "completion": "\ud800"}, "completion is not valid Unicode"),
        (["2+2?", "4"], "is a list, not an object"),
        (None, "is null, not an object"),
    ],
)
def test_a_bad_row_is_rejected_by_number_and_reason(tmp_path: Path, row: Any, reason: str) -> None:
    rows = rows_of(tmp_path, GOOD, row, GOOD)
    assert [example.row for example in rows.examples] == [1, 3]
    (rejected,) = rows.rejected
    assert rejected.row == 2 and rejected.reason.startswith(reason)


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        (None, "messages is null, not a list"),
        ("hello", "messages is text that is not JSON"),
        ([], "messages contains no answer"),
        ([{"role": "user", "content": "Hi"}], "messages contains no answer"),
        ([{"role": "assistant", "content": "Hi"}], "messages contains nothing before"),
        (["Hi"], "message 1 is text, not an object"),
        ([{"role": "user", "content": "Hi"}, {"role": "king", "content": "Ho"}], "message 2 has the role 'king'"),
        ([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": None}], "message 2's content is null"),
        ([{"role": "user"}, {"role": "assistant", "content": "Ho"}], "message 1's content is missing"),
    ],
)
def test_a_bad_conversation_is_rejected(tmp_path: Path, messages: Any, reason: str) -> None:
    good = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]}
    (rejected,) = rows_of(tmp_path, good, {"messages": messages}).rejected
    assert rejected.reason.startswith(reason)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"answer": "answer4"}, "the answer 'answer4' is not in its Answer format"),
        ({"output": "the sea"}, "the output does not contain its answer"),
        ({"choices": ["sand"]}, "choices is neither"),
        ({"choices": {"text": ["sand", "sea"], "label": ["A"]}}, "choices has a different number of labels and texts"),
        ({"choices": ["sand", None]}, "choice 2 is null"),
        ({"choices": ["sand", "sea"], "answer": 2}, "the answer 2 is not one of the choices"),
        ({"choices": ["sand", "sea"], "answer": True}, "the answer True is not one of the choices"),
        ({"choices": ["sand", "sea"], "answer": None}, "answer is missing or null"),
    ],
)
def test_a_bad_multiple_choice_row_is_rejected(tmp_path: Path, change: dict, reason: str) -> None:
    good = {"instruction": FORMAT, "output": "the correct answer is answer2", "answer": "answer2"}
    if "choices" in change:
        good["choices"] = ["answer2", "other"]  # type: ignore[assignment]
    (rejected,) = rows_of(tmp_path, good, good | change).rejected
    assert rejected.reason.startswith(reason)


def test_a_csv_row_of_the_wrong_width_is_rejected(tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    path.write_text("prompt,completion\n2+2?,4\n2,+2?,4\n3+3?,6\n")
    rows = read_examples(str(path))
    assert [str(rejected) for rejected in rows.rejected] == ["row 2: has 3 values for 2 columns"]
    assert [example.row for example in rows.examples] == [1, 3]


def test_when_all_rows_are_rejected_the_first_reasons_are_quoted(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no usable row, 5 rejected: row 1: completion is null; row 2") as caught:
        rows_of(tmp_path, *[{"prompt": "2+2?", "completion": None}] * 5)
    assert caught.value.field == "data.path"


# The chat template


def test_a_tokenizer_without_a_template_gets_the_plain_one(tiny_tokenizer: Any) -> None:
    base = copy.deepcopy(tiny_tokenizer)
    base.chat_template = None
    assert (
        chat_template(base) == DEFAULT_CHAT_TEMPLATE and chat_template(tiny_tokenizer) == tiny_tokenizer.chat_template
    )
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2+2?"}]
    prompt = render_prompt(messages, base)
    assert prompt == "<|im_start|>Be brief.\n\n### User:\n2+2?\n\n### Assistant:\n"
    encoded = encode_example(Example((*messages, {"role": "assistant", "content": "4"})), base, 512)
    assert base.decode(encoded.input_ids) == prompt + "4<|im_end|>"


WORDS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30).filter(str.strip)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(WORDS, min_size=2, max_size=6).filter(lambda words: len(words) % 2 == 0), st.booleans())
def test_training_sees_the_tokens_that_generation_sees(tiny_tokenizer: Any, contents: list[str], plain: bool) -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = None if plain else tokenizer.chat_template
    example = dialogue(*contents)
    encoded = encode_example(example, tokenizer, 4096)
    prompt = tokenizer(render_prompt(example.prompt, tokenizer), add_special_tokens=False)["input_ids"]
    assert encoded.input_ids[: len(prompt)] == prompt
    answer = encoded.labels[len(prompt) :]
    assert answer == encoded.input_ids[len(prompt) :] and answer[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(answer[:-1]).rstrip() == contents[-1].rstrip()


def test_a_thinking_model_is_trained_and_asked_without_thoughts(tiny_tokenizer: Any) -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
        "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
        "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
    )
    encoded = encode_example(dialogue("2+2?", "4", "3+3?", "6"), tokenizer, 512)
    assert learnt(encoded, tokenizer) == "4<|im_end|>6<|im_end|>"


def test_a_template_that_refuses_a_conversation_rejects_the_row(tmp_path: Path, tiny_tokenizer: Any) -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = (
        "{% if messages[0].role == 'assistant' %}{{ raise_exception('the user comes first') }}{% endif %}"
        + tokenizer.chat_template
    )
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    path = write(tmp_path, {"messages": [{"role": "assistant", "content": "Hello."}, *turns]}, {"messages": turns})
    report = build_datasets(DataConfig(path=str(path)), tokenizer, 0).report
    assert report.rejections == ["row 1: the chat template rejects the messages: the user comes first"]


# Labels


def test_loss_is_on_every_answer_and_its_end_and_nowhere_else(tiny_tokenizer: Any) -> None:
    encoded = encode_example(dialogue("yes?", "yes", "and yes?", "no"), tiny_tokenizer, 512)
    assert learnt(encoded, tiny_tokenizer) == "yes<|im_end|>no<|im_end|>"
    assert all(label in (-100, token) for token, label in zip(encoded.input_ids, encoded.labels, strict=True))


@pytest.mark.parametrize("plain", [True, False], ids=["plain template", "own template"])
def test_answers_found_together_are_those_found_one_by_one(
    tiny_tokenizer: Any, plain: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Words of the template, of other messages and blanks around an answer mislead neither."""
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = None if plain else tokenizer.chat_template
    words = ["user", " assistant\n", "a", "\n", "the same", "the same", "### User:", "é"]
    example = dialogue(*[words[i * 3 % 8] + str(i % 5) for i in range(2 * rendering.FEW_ANSWERS + 8)])
    together = encode_example(example, tokenizer, 10_000)
    monkeypatch.setattr(rendering, "FEW_ANSWERS", 10_000)
    one_by_one = encode_example(example, tokenizer, 10_000)
    assert together == one_by_one
    assert sum(label != -100 for label in together.labels) > 100


@pytest.mark.parametrize("changes_answers", [False, True])
def test_a_conversation_of_thousands_of_messages_is_encoded_or_rejected_in_seconds(
    tiny_tokenizer: Any, changes_answers: bool
) -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer)
    if changes_answers:
        tokenizer.chat_template = DEFAULT_CHAT_TEMPLATE.replace("message['content']", "message['content'] | upper")
    example = dialogue(*(f"message {number}" for number in range(5_998)), "QUESTION", "ANSWER 5999")
    begun = time.process_time()
    (encoded,) = encode_examples([example], tokenizer, 2_000)
    assert time.process_time() - begun < 10
    if changes_answers:
        assert isinstance(encoded, DataError) and "messages" in str(encoded)
    else:
        assert isinstance(encoded, EncodedExample) and "ANSWER 5999" in learnt(encoded, tokenizer)


def test_a_greeting_of_the_assistant_is_learnt_too(tiny_tokenizer: Any) -> None:
    greeting = ({"role": "assistant", "content": "Hello!"},)
    encoded = encode_example(Example(greeting + dialogue("2+2?", "4").messages), tiny_tokenizer, 512)
    assert learnt(encoded, tiny_tokenizer) == "Hello!<|im_end|>4<|im_end|>"


def test_a_text_row_is_learnt_whole_and_ends(tiny_tokenizer: Any) -> None:
    encoded = encode_example(Example(text="Once upon a time"), tiny_tokenizer, 512)
    assert encoded.labels == encoded.input_ids
    assert tiny_tokenizer.decode(encoded.input_ids) == "Once upon a time<|im_end|>"


def test_many_at_once_are_the_same_as_one_by_one(tiny_tokenizer: Any) -> None:
    examples = [dialogue("a", "b"), Example(text="c"), dialogue("d", "e", "f", "g")]
    assert list(encode_examples(examples, tiny_tokenizer, 12)) == [
        encode_example(one, tiny_tokenizer, 12) for one in examples
    ]


# Truncation


def test_the_oldest_tokens_of_the_question_go_first(tiny_tokenizer: Any) -> None:
    example = dialogue("0 1 2 3 4 5 6 7 8 9 " * 20, "the answer")
    whole, cut = encode_example(example, tiny_tokenizer, 4096), encode_example(example, tiny_tokenizer, 40)
    turn = len(tiny_tokenizer("<|im_start|>user\n")["input_ids"])
    assert cut.truncated and not whole.truncated
    assert cut.input_ids == whole.input_ids[:turn] + whole.input_ids[turn - 40 :]
    assert cut.labels == whole.labels[:turn] + whole.labels[turn - 40 :]


@given(limit=st.integers(8, 60), asked=st.integers(1, 30), answered=st.integers(1, 60))
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_truncation_never_drops_the_whole_answer(tiny_tokenizer: Any, limit: int, asked: int, answered: int) -> None:
    encoded = encode_example(dialogue("? " * asked, "! " * answered), tiny_tokenizer, limit)
    answer = [label for label in encoded.labels if label != -100]
    whole = tiny_tokenizer("! " * answered + "<|im_end|>")["input_ids"]
    assert len(encoded.input_ids) == len(encoded.labels) <= limit
    assert encoded.labels[0] == -100, "a first token has nothing before it to be predicted from"
    assert len(answer) >= min(len(whole) - 1, limit - 1)


@pytest.mark.parametrize("digits", [*range(14, 20), 90])
def test_a_long_text_is_cut_into_pieces_and_every_token_is_learnt_once(tiny_tokenizer: Any, digits: int) -> None:
    text = Example(text=("0123456789" * 9)[:digits])
    whole, cut = (encode_example(text, tiny_tokenizer, limit) for limit in (512, 16))
    assert not whole.more and not cut.truncated
    assert cut.input_ids == cut.labels == whole.input_ids[:16]
    pieces = [cut, *cut.more]
    assert all(2 <= len(piece.input_ids) == len(piece.labels) <= 16 for piece in pieces)
    learnt = [label for piece in pieces for label in piece.labels[1:]]
    assert learnt == whole.input_ids[1:]
    assert all(later.input_ids[0] == one.input_ids[-1] for one, later in pairwise(pieces))
    assert sum(token == tiny_tokenizer.eos_token_id for token in learnt) == 1, "the text ends once"


# Data sets


def config_of(folder: Path, count: int = 50, **options: Any) -> DataConfig:
    path = write(folder, *({"prompt": f"{i}+{i}?", "completion": str(2 * i)} for i in range(count)))
    return DataConfig(path=str(path), **options)


def test_a_fraction_is_held_out_by_the_seed(tmp_path: Path, tiny_tokenizer: Any) -> None:
    config = config_of(tmp_path, eval_fraction=0.2)
    one, again, other = (build_datasets(config, tiny_tokenizer, seed) for seed in (0, 0, 1))
    assert (len(one.train), len(one.eval)) == (40, 10) == (one.report.rows, one.report.eval_rows)
    assert one == again and one.eval != other.eval
    assert not [row for row in one.eval if row in one.train]


@pytest.mark.parametrize(("count", "fraction", "held"), [(50, 0.0, 0), (50, 0.001, 1), (2, 0.5, 1), (1, 0.5, 0)])
def test_a_fraction_holds_out_at_least_one_row_and_never_all(
    tmp_path: Path, tiny_tokenizer: Any, count: int, fraction: float, held: int
) -> None:
    datasets = build_datasets(config_of(tmp_path, count, eval_fraction=fraction), tiny_tokenizer, 0)
    assert (len(datasets.train), len(datasets.eval)) == (count - held, held)


def test_a_held_out_file_leaves_the_training_rows_alone(tmp_path: Path, tiny_tokenizer: Any) -> None:
    heldout = write(tmp_path, GOOD, {"prompt": "?", "completion": None}, name="heldout.jsonl")
    config = config_of(tmp_path, eval_path=str(heldout))
    datasets = build_datasets(config, tiny_tokenizer, 0)
    assert (len(datasets.train), len(datasets.eval)) == (50, 1)
    assert datasets.report.rejections == ["held-out row 2: completion is null"]
    write(tmp_path, GOOD, name="heldout.jsonl")
    assert build_datasets(config, tiny_tokenizer, 0).report.fingerprint != datasets.report.fingerprint


def test_a_missing_held_out_file_is_blamed_on_its_setting(tmp_path: Path, tiny_tokenizer: Any) -> None:
    with pytest.raises(DataError, match=r"data.eval_path") as caught:
        build_datasets(config_of(tmp_path, eval_path="missing.jsonl"), tiny_tokenizer, 0)
    assert caught.value.field == "data.eval_path"


def test_the_report_counts_what_is_there(tmp_path: Path, tiny_tokenizer: Any) -> None:
    long = {"prompt": "long " * 50, "completion": "yes"}
    path = write(tmp_path, GOOD, long, {"prompt": "?"})
    datasets = build_datasets(DataConfig(path=str(path), max_length=32, eval_fraction=0), tiny_tokenizer, 0)
    report = datasets.report.to_dict()
    assert json.loads(json.dumps(report)) == report
    assert (report["rows"], report["rejected"], report["truncated"]) == (2, 1, 1)
    assert report["tokens"] == sum(len(row["input_ids"]) for row in datasets.train)
    assert report["answer_tokens"] == sum(label != -100 for row in datasets.train for label in row["labels"])


def test_data_with_nothing_to_learn_is_refused(tmp_path: Path, tiny_tokenizer: Any) -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = "{{ raise_exception('never') }}"
    with pytest.raises(DataError, match=r"no usable row, 50 rejected: row 1: .* never"):
        build_datasets(config_of(tmp_path), tokenizer, 0)


@pytest.mark.timed
def test_ten_thousand_rows_take_seconds(tmp_path: Path, tiny_tokenizer: Any) -> None:
    config = config_of(tmp_path, 10_000)
    started = time.process_time()
    build_datasets(config, tiny_tokenizer, 0)
    assert time.process_time() - started < 5


# Batches


def test_a_batch_is_padded_on_the_right(tiny_tokenizer: Any) -> None:
    rows = [{"input_ids": [5, 6, 2], "labels": [-100, 6, 2]}, {"input_ids": [7], "labels": [7]}]
    batch = Collator(pad_token_id=2)(rows)
    assert batch["input_ids"].tolist() == [[5, 6, 2], [7, 2, 2]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]], "by length: the pad token may be the end token"
    assert batch["labels"].tolist() == [[-100, 6, 2], [7, -100, -100]]


def test_a_batch_is_cut_into_parts_of_like_length_and_nothing_is_lost() -> None:
    rows = [
        {"input_ids": [number] * length, "labels": [number] * length} for number, length in enumerate((9, 2, 8, 2, 1))
    ]
    parts = split_by_length(Collator(pad_token_id=0)(rows), overhead=2)
    assert [part["input_ids"].shape for part in parts] == [(3, 2), (2, 9)]
    for part in parts:
        for ids, mask, labels in zip(*part.values(), strict=True):
            number, length = int(ids[0]), int(mask.sum())
            assert ids[:length].tolist() == labels[:length].tolist() == rows[number]["input_ids"]
            assert not mask[length:].any() and (labels[length:] == -100).all()
    (whole,) = split_by_length(Collator(pad_token_id=0)(rows), overhead=1000)
    assert whole["input_ids"].shape == (5, 9) and whole["input_ids"][:, 0].tolist() == [0, 1, 2, 3, 4]


@given(st.lists(st.integers(1, 40), min_size=1, max_size=9).map(sorted), st.integers(0, 60))
def test_no_other_cut_is_cheaper(lengths: list[int], overhead: int) -> None:
    def cost(ends: Sequence[int]) -> int:
        return sum((end - start) * lengths[end - 1] + overhead for start, end in zip([0, *ends], ends, strict=False))

    cuts = range(1, len(lengths))
    every = [(*some, len(lengths)) for count in range(len(lengths)) for some in combinations(cuts, count)]
    assert cost(optimal_cuts(lengths, overhead)) == min(map(cost, every))


@pytest.mark.model
def test_the_embedded_models_answer_follows_its_own_template(embedded: Any) -> None:
    tokenizer = embedded.tokenizer
    example = dialogue("Convert 3 km to m.", "3000 m")
    encoded = encode_example(example, tokenizer, 512)
    prompt = tokenizer(render_prompt(example.prompt, tokenizer), add_special_tokens=False)["input_ids"]
    assert encoded.input_ids[: len(prompt)] == prompt
    assert tokenizer.decode(encoded.input_ids).endswith("<|im_start|>assistant\n3000 m<|im_end|>")
    assert learnt(encoded, tokenizer) == "3000 m<|im_end|>"
