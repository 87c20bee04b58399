"""What is read of each kind of row that people bring: its messages, or the reason for which it is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from templates import with_template

from mole.core.errors import DataError
from mole.data import ExampleSet, describe_columns, detect_columns, encode_example, guess_mapping, read_examples

ASK, REPLY = {"role": "user", "content": "x?"}, {"role": "assistant", "content": "y"}
ONCE = "user: x? | assistant: y"
PAIR = {"prompt": "x?", "completion": "y"}
GOOD = {**PAIR, "messages": [ASK, REPLY]}
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add", "arguments": {"a": 1}}}]}
RESULT = {"role": "tool", "content": "2"}
ADDED = 'user: x? | assistant:  add({"a": 1}) | tool: 2 | assistant: y'
TOOL = {"name": "add", "parameters": {"type": "object"}}
DEEP = json.loads('{"a": ' * 40 + "1" + "}" * 40)


def chat(*messages: dict[str, Any], **columns: Any) -> dict[str, Any]:
    return {"messages": list(messages), **columns}


def calling(**function: Any) -> dict[str, Any]:
    """A row in which the assistant calls a function."""
    return chat(
        ASK, {**CALL, "tool_calls": [{"type": "function", "function": {"name": "add", **function}}]}, RESULT, REPLY
    )


def parts(*content: Any) -> dict[str, Any]:
    return chat({"role": "user", "content": list(content)}, REPLY)


READ: dict[str, tuple[dict[str, Any], str]] = {
    "ShareGPT": ({"conversations": [{"from": "human", "value": "x?"}, {"from": "gpt", "value": "y"}]}, ONCE),
    "ShareGPT with a system message": (
        {"conversations": [{"from": n, "value": v} for n, v in (("system", "S"), ("human", "x?"), ("bot", "y"))]},
        f"system: S | {ONCE}",
    ),
    "ShareGPT's system column": ({"system": "S", "conversations": [ASK, REPLY]}, f"system: S | {ONCE}"),
    "role and content under conversations": ({"conversations": [ASK, REPLY]}, ONCE),
    "role and content under conversation": ({"conversation": [ASK, REPLY]}, ONCE),
    "role with value, from with content": (
        chat({"role": "user", "value": "x?"}, {"from": "gpt", "content": "y"}), ONCE
    ),
    "model is assistant": (chat(ASK, {"role": "model", "content": "y"}), ONCE),
    "roles in any case": (chat({"role": "User", "content": "x?"}, {"role": " ASSISTANT", "content": "y"}), ONCE),
    "developer is system": (chat({"role": "developer", "content": "S"}, ASK, REPLY), f"system: S | {ONCE}"),
    "an empty system message": (chat({"role": "system", "content": ""}, ASK, REPLY), ONCE),
    "a system message that is null": (chat({"role": "system", "content": None}, ASK, REPLY), ONCE),
    "two system messages": (
        chat({"role": "system", "content": "A."}, {"role": "system", "content": "B."}, ASK, REPLY),
        "system: A.\n\nB. | user: x? | assistant: y",
    ),
    "two user turns": (chat(ASK, ASK, REPLY), "user: x? | user: x? | assistant: y"),
    "text in parts": (parts({"type": "text", "text": "x"}, {"type": "text", "text": "?"}), ONCE),
    "a number as content": (chat(ASK, {"role": "assistant", "content": 4}), "user: x? | assistant: 4"),
    "a thought in a field of its own": (
        chat(ASK, {"role": "assistant", "content": "y", "reasoning_content": "hm"}),
        "user: x? | assistant: <think>\nhm\n</think>\n\ny",
    ),
    "a number as answer": ({"prompt": "x?", "completion": 21}, "user: x? | assistant: 21"),
    "a fraction as answer": ({"instruction": "x?", "output": 0.5}, "user: x? | assistant: 0.5"),
    "a number as prompt": ({"prompt": 7, "completion": "y"}, "user: 7 | assistant: y"),
    "prompt and completion as messages": ({"prompt": [ASK], "completion": [REPLY]}, ONCE),
    "a completion of messages": ({"prompt": "x?", "completion": [REPLY]}, ONCE),
    "a prompt of messages": ({"prompt": [ASK], "completion": "y"}, ONCE),
    "answers in the prompt are not learnt": (
        {"prompt": [ASK, REPLY, ASK], "completion": [REPLY]},
        "user: x? | assistant: y (0) | user: x? | assistant: y",
    ),
    "alpaca's system and history": (
        {"instruction": "x?", "input": "", "output": "y", "system": "S", "history": [["a?", "b"]]},
        "system: S | user: a? | assistant: b | user: x? | assistant: y",
    ),
    "history in CSV": ({**PAIR, "history": '[["a?", "b"]]'}, "user: a? | assistant: b | user: x? | assistant: y"),
    "no system, no history": ({**PAIR, "system": None, "history": []}, ONCE),
    "history and input beside messages as prompt": (
        {"prompt": [ASK], "completion": [REPLY], "history": [["a?", "b"]], "input": "i", "system": "S"},
        "system: S | user: a? | assistant: b (0) | user: x?\n\ni | assistant: y",
    ),
    "a system column beside messages": (chat(ASK, REPLY, system="S"), f"system: S | {ONCE}"),
    "the same system message twice": (
        chat({"role": "system", "content": "S"}, ASK, REPLY, system="S"), f"system: S | {ONCE}"
    ),
    "a system column beside a prompt": ({**PAIR, "system": "S"}, f"system: S | {ONCE}"),
    "OpenOrca": ({"system_prompt": "S", "question": "x?", "response": "y"}, f"system: S | {ONCE}"),
    "Dolly": ({"instruction": "x?", "context": "c", "response": "y"}, "user: x?\n\nc | assistant: y"),
    "Dolly without context": ({"instruction": "x?", "context": "", "response": "y"}, ONCE),
    "GSM8K": ({"question": "x?", "answer": "y"}, ONCE),
    "an answer of weight 0": (
        chat(ASK, {**REPLY, "weight": 0}, ASK, {**REPLY, "weight": 1}),
        "user: x? | assistant: y (0) | user: x? | assistant: y",
    ),
    "a last answer of weight 0": (chat(ASK, REPLY, ASK, {**REPLY, "weight": 0}), ONCE),
    "a call": (chat(ASK, CALL, RESULT, REPLY), ADDED),
    "arguments as JSON text": (calling(arguments='{"a": 1}'), ADDED),
    "no arguments": (calling(arguments=""), 'user: x? | assistant:  add({}) | tool: 2 | assistant: y'),
    "calls as JSON text": (chat(ASK, {**CALL, "tool_calls": json.dumps(CALL["tool_calls"])}, RESULT, REPLY), ADDED),
    "parallel calls": (
        chat(ASK, {**CALL, "content": "", "tool_calls": [*CALL["tool_calls"] * 2]}, RESULT, RESULT, REPLY),
        'user: x? | assistant:  add({"a": 1}) add({"a": 1}) | tool: 2 | tool: 2 | assistant: y',
    ),
    "words before a call": (
        chat(ASK, {**CALL, "content": "Well."}),
        'user: x? | assistant: Well. add({"a": 1})',
    ),
    "a thought before a call": (
        chat(ASK, {**CALL, "reasoning_content": "hm"}),
        'user: x? | assistant: <think>\nhm\n</think>\n\n add({"a": 1})',
    ),
    "OpenAI's older calls": (
        chat(
            ASK,
            {"role": "assistant", "content": None, "function_call": {"name": "add", "arguments": '{"a": 1}'}},
            {"role": "function", "name": "add", "content": "2"},
            REPLY,
        ),
        ADDED,
    ),
    "ShareGPT's calls": (
        {
            "conversations": [
                {"from": "human", "value": "x?"},
                {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
                {"from": "observation", "value": "2"},
                {"from": "gpt", "value": "y"},
            ]
        },
        ADDED,
    ),
    "a call of weight 0": (
        chat(ASK, {**CALL, "weight": 0}, RESULT, REPLY),
        'user: x? | assistant:  add({"a": 1}) (0) | tool: 2 | assistant: y',
    ),
    "what follows the last call": (chat(ASK, CALL, RESULT, ASK), 'user: x? | assistant:  add({"a": 1})'),
    "a result in parts": (chat(ASK, CALL, {**RESULT, "content": [{"type": "text", "text": "2"}]}, REPLY), ADDED),
    "a result that is a number": (chat(ASK, CALL, {**RESULT, "content": 2}, REPLY), ADDED),
    "a result that is an object": (
        chat(ASK, CALL, {**RESULT, "content": {"sum": 2}}, REPLY), ADDED.replace("tool: 2", 'tool: {"sum": 2}')
    ),
    "an empty result": (chat(ASK, CALL, {**RESULT, "content": ""}, REPLY), ADDED.replace("tool: 2", "tool: ")),
    "a prompt with a call": (
        {"prompt": [ASK, CALL, RESULT], "completion": [REPLY]}, ADDED.replace(" | tool", " (0) | tool")
    ),
    "no image": (chat(ASK, REPLY, images=[], audio=None, video=""), ONCE),
    "a good answer of KTO": ({**PAIR, "label": True}, ONCE),
    "a label that is a number": ({**PAIR, "label": 0}, ONCE),
}  # fmt: skip

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "an image": (chat(ASK, REPLY, images=["1.jpg"]), "has images; only text is learnt"),
    "audio": (chat(ASK, REPLY, audio={"path": "1.wav"}), "has audio; only text is learnt"),
    "a part that is an image": (
        parts({"type": "image_url", "image_url": {"url": "u"}}),
        "message 1's content has a part that is of the type 'image_url'; only text is learnt",
    ),
    "a part that is a number": (parts(4), "message 1's content has a part that is a number; only text is learnt"),
    "no part": (parts(), "message 1's content is empty"),
    "a bad answer of KTO": ({**GOOD, "label": False}, "its label is false: a bad answer is not learnt"),
    "a bad answer of KTO in CSV": ({**GOOD, "label": "False"}, "its label is false: a bad answer is not learnt"),
    "only answers of weight 0": (chat(ASK, {**REPLY, "weight": 0}), "messages contains no answer of the assistant"),
    "half a weight": (chat(ASK, {**REPLY, "weight": 0.5}), "message 2's weight is 0.5, neither 0 nor 1"),
    "an unknown role": (chat(ASK, {"role": "king", "content": "y"}), "message 2 has the role 'king'"),
    "a call of nothing": (chat(ASK, {**CALL, "tool_calls": [{}]}), "message 2 has a call without the name of a"),
    "calls that are text": (chat(ASK, {**CALL, "tool_calls": "add(1)"}), "message 2's call is text that is not JSON"),
    "a call in words": (chat(ASK, {"from": "function_call", "value": "add 1"}), "message 2's call is text that is not"),
    "arguments in words": (calling(arguments="one"), "message 2's call of 'add' has arguments that are text that is"),
    "arguments in a list": (calling(arguments=[1]), "message 2's call of 'add' has arguments that are a list"),
    "deep arguments": (calling(arguments=DEEP), "message 2's call of 'add' is nested more than 32 levels deep"),
    "an image of a tool": (
        chat(ASK, CALL, {"role": "tool", "content": [{"type": "image"}]}, REPLY),
        "message 3's content has a part that is of the type 'image'; only text is learnt",
    ),
    "tools in words": (chat(ASK, REPLY, tools="add, subtract"), "tools is text that is not JSON"),
    "a tool without a name": (chat(ASK, REPLY, tools=[{"type": "function"}]), "tool 1 is not an object with the name"),
    "calls only in the end": (chat(ASK, {**CALL, "weight": 0}, RESULT), "messages contains no answer of the assistant"),
    "true as content": (chat(ASK, {"role": "assistant", "content": True}), "message 2's content is true or false"),
    "a system column that is no text": (chat(ASK, REPLY, system=["S"]), "system is a list, not text"),
}  # fmt: skip

PAIRED: dict[str, tuple[dict[str, Any], str]] = {
    "Dolly's history": ({"instruction": "x?", "output": "y", "history": [["a?"]]}, "turn 1 of history is not"),
    "a number that is none": ({"instruction": "x?", "output": float("nan")}, "output is nan, not a number or text"),
    "history as an object": ({"instruction": "x?", "output": "y", "history": {"a": 1}}, "history is an object"),
}  # fmt: skip


def rows_of(folder: Path, *rows: dict[str, Any], columns: dict[str, str] | None = None) -> ExampleSet:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_examples(str(path), columns)


def written(message: dict[str, Any]) -> str:
    calls = [call["function"] for call in message.get("tool_calls", [])]
    called = "".join(f" {call['name']}({json.dumps(call['arguments'])})" for call in calls)
    return f"{message['role']}: {message['content']}{called}" + (" (0)" if message.get("weight") == 0 else "")


@pytest.mark.parametrize("kind", READ)
def test_a_row_is_read_as_it_was_meant(kind: str, tmp_path: Path) -> None:
    row, expected = READ[kind]
    (example,) = rows_of(tmp_path, row).examples
    assert " | ".join(map(written, example.messages)) == expected


@pytest.mark.parametrize(
    "columns",
    [
        {"tools": [TOOL]},
        {"tools": json.dumps([TOOL])},
        {"tools": [{"type": "function", "function": TOOL}]},
        {"tools": json.dumps(TOOL)},
        {"functions": [TOOL]},
    ],
)
@pytest.mark.parametrize("row", [chat(ASK, REPLY), {"prompt": [ASK], "completion": [REPLY]}, PAIR])
def test_the_tools_of_a_row_are_read(row: dict[str, Any], columns: dict[str, Any], tmp_path: Path) -> None:
    rows = rows_of(tmp_path, {**row, **columns})
    assert rows.examples[0].tools == ({"type": "function", "function": TOOL},) and rows.ignored_columns == []


@pytest.mark.parametrize("tools", [None, "", "[]", []])
def test_a_row_may_have_no_tools(tools: Any, tmp_path: Path) -> None:
    assert rows_of(tmp_path, chat(ASK, REPLY, tools=tools)).examples[0].tools == ()


@pytest.mark.parametrize("kind", [*REFUSED, *PAIRED])
def test_a_row_that_cannot_be_learnt_is_refused_with_the_reason(kind: str, tmp_path: Path) -> None:
    row, reason = {**REFUSED, **PAIRED}[kind]
    good = GOOD if kind in REFUSED else {"instruction": "x?", "output": "y"}
    rows = rows_of(tmp_path, good, row)
    (rejected,) = rows.rejected
    assert (rejected.row, len(rows.examples)) == (2, 1) and rejected.reason.startswith(reason)


@pytest.mark.parametrize(
    ("row", "mapping", "read"),
    [
        ({"prompt": "x?", "chosen": "y", "rejected": "n"}, {"completion": "chosen"}, "user: x? | assistant: y"),
        ({"instruction": "x?", "chosen": "y", "rejected": "n"}, {"output": "chosen"}, "user: x? | assistant: y"),
        (
            {"question": "x?", "chosen": "y", "rejected": "n"},
            {"prompt": "question", "completion": "chosen"},
            "user: x? | assistant: y",
        ),
        ({"chosen": [ASK, REPLY], "rejected": [ASK, REPLY]}, {"messages": "chosen"}, "user: x? | assistant: y"),
        (
            {"prompt": "x?", "chosen": [ASK, REPLY], "rejected": [ASK, REPLY]},
            {"messages": "chosen"},
            "user: x? | assistant: y",
        ),
        (
            {"prompt": [ASK], "chosen": [REPLY], "rejected": [REPLY]},
            {"completion": "chosen"},
            "user: x? | assistant: y",
        ),
    ],
)
def test_preference_data_are_refused_with_the_way_to_use_them(
    row: dict[str, Any], mapping: dict[str, str], read: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError) as caught:
        rows_of(tmp_path, row)
    way = ", ".join(f"{name}: {column}" for name, column in mapping.items())
    assert f"--set data.columns='{{{way}}}'" in str(caught.value) and "\n" not in str(caught.value)
    rows = rows_of(tmp_path, row, columns=mapping)
    assert " | ".join(map(written, rows.examples[0].messages)) == read
    assert "rejected" in rows.ignored_columns


@pytest.mark.parametrize(
    ("row", "ignored"),
    [
        (PAIR, []),
        ({**PAIR, "id": 1, "source": "web"}, ["id", "source"]),
        ({**PAIR, "system": "S", "history": [], "context": "c"}, []),
        ({"instruction": "x?", "context": "c", "response": "y", "category": "qa"}, ["category"]),
        ({**PAIR, "answer": "y"}, ["answer"]),
        ({"messages": [ASK, REPLY], "input": "i"}, ["input"]),
        ({"text": "t", "system": "S"}, ["system"]),
        ({"question": "x?", "choices": ["a", "b"], "answer": "a", "subject": "s"}, ["subject"]),
        ({"instruction": "x?\nAnswer format: a/b", "output": "a", "answer": "a"}, []),
    ],
)
def test_columns_that_are_not_used_are_known(row: dict[str, Any], ignored: list[str], tmp_path: Path) -> None:
    assert rows_of(tmp_path, row).ignored_columns == ignored


def test_skipped_answers_are_counted_and_their_label_is_used(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, {**PAIR, "label": True}, {**PAIR, "label": False}, {**PAIR, "label": False})
    assert (len(rows.examples), len(rows.rejected), rows.ignored_columns) == (1, 2, [])


@pytest.mark.parametrize(
    "columns", [["prompt", "chosen", "rejected"], ["question", "chosen", "rejected"], ["chosen", "rejected"]]
)
def test_the_page_takes_no_good_answer_of_preference_data_for_the_answer(columns: list[str], tmp_path: Path) -> None:
    assert guess_mapping(columns) == {}
    said = describe_columns(detect_columns(columns, {}, "f"))
    with pytest.raises(DataError) as caught:
        rows_of(tmp_path, dict.fromkeys(columns, "x"))
    why = "A row has a good and a bad answer (chosen, rejected), and preferences are not learnt."
    assert why in said and why in str(caught.value)


def test_the_page_names_the_columns_that_are_not_used() -> None:
    found = detect_columns(["conversations", "id"], {}, "f")
    assert (found.shape, found.fields) == ("messages", {"messages": "conversations"})
    assert describe_columns(found).endswith("Read as messages (conversations as messages). Not used: id.")


@pytest.mark.parametrize("template", ["generation", "mistral", None])
@pytest.mark.parametrize("turns", [2, 40])
def test_an_answer_of_weight_0_has_no_loss(
    template: str | None, turns: int, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    tokenizer = with_template(tiny_tokenizer, template) if template else tiny_tokenizer
    bad = {"role": "assistant", "content": "Bogota.", "weight": 0}
    last = {"role": "assistant", "content": "Sorry, it is Lima."}
    (example,) = rows_of(tmp_path, chat(*[ASK, bad] * (turns - 1), ASK, REPLY, ASK, last)).examples
    encoded = encode_example(example, tokenizer, 8192)
    learnt = tokenizer.decode([label for label in encoded.labels if label != -100])
    assert "Bogota" not in learnt and "Lima" in learnt and "y" in learnt.partition("Sorry")[0]
