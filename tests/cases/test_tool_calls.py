"""Tool calls: what a template writes of them is learnt like answers; what tools return is not.

The expected texts are the whole example; what carries loss stands between ⟦ and ⟧.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from templates import marked, with_template

from mole.core.errors import DataError
from mole.data import Example, encode_example, read_examples

TOOL = {"type": "function", "function": {"name": "time", "parameters": {"type": "object"}}}
TOOLS = json.dumps(TOOL)
ASK = {"role": "user", "content": "Time in Oslo?"}
CALL = {"name": "time", "arguments": '{"city": "Oslo"}'}
RESULT = {"role": "tool", "tool_call_id": "abcdefgh1", "content": "14:05"}
REPLY = {"role": "assistant", "content": "It is 14:05."}


def calls(*functions: dict[str, Any], content: str | None = None, **fields: Any) -> dict[str, Any]:
    """A message that calls these functions."""
    made = [{"id": "abcdefgh1", "type": "function", "function": function} for function in functions]
    return {"role": "assistant", "content": content, "tool_calls": made, **fields}


def example_of(folder: Path, *messages: dict[str, Any], tools: Any = (TOOL,)) -> Example:
    """The example that is read of these messages."""
    (folder / "rows.jsonl").write_text(json.dumps({"messages": messages, "tools": tools}))
    return read_examples(str(folder / "rows.jsonl")).examples[0]


ONCE = (ASK, calls(CALL), RESULT, REPLY)
ROME = {"name": "time", "arguments": {"city": "Rome"}}
SYSTEM = f"<|im_start|>system\n# Tools\n{TOOLS}<|im_end|>\n"
ASKED = "<|im_start|>user\nTime in Oslo?<|im_end|>\n<|im_start|>assistant\n"
OSLO = '<tool_call>\n{"name": "time", "arguments": {"city": "Oslo"}}\n</tool_call>'
RESPONSE = "\n<tool_response>\n14:05\n</tool_response>"
RETURNED = f"<|im_start|>user{RESPONSE}<|im_end|>\n<|im_start|>assistant\n"
REPLIED = "⟦It is 14:05.<|im_end|>⟧"
AVAILABLE = f"[AVAILABLE_TOOLS] [{TOOLS}][/AVAILABLE_TOOLS][INST] Time in Oslo? [/INST]"
STRICT = '⟦[TOOL_CALLS] [{"name": "time", "arguments": {"city": "Oslo"}, "id": "abcdefgh1"}]<|im_end|>⟧'
RESULTS = '[TOOL_RESULTS] {"content": 14:05, "call_id": "abcdefgh1"}[/TOOL_RESULTS]'

CASES: dict[tuple[str, str], tuple[tuple[dict[str, Any], ...], str]] = {
    ("tools", "a call and the answer"): (ONCE, f"{SYSTEM}{ASKED}⟦{OSLO}<|im_end|>⟧\n{RETURNED}{REPLIED}"),
    ("tools", "a call is the last answer"): (ONCE[:2], f"{SYSTEM}{ASKED}⟦{OSLO}<|im_end|>⟧"),
    ("tools", "a call after an answer"): (
        (ASK, REPLY, ASK, calls(CALL)), f"{SYSTEM}{ASKED}{REPLIED}\n{ASKED}⟦{OSLO}<|im_end|>⟧"
    ),
    ("tools", "words before a call"): (
        (ASK, calls(CALL, content="I look.")), f"{SYSTEM}{ASKED}⟦I look.\n{OSLO}<|im_end|>⟧"
    ),
    ("tools", "parallel calls"): (
        (ASK, calls(CALL, ROME), RESULT, RESULT, REPLY),
        f"{SYSTEM}{ASKED}⟦{OSLO}\n{OSLO.replace('Oslo', 'Rome')}<|im_end|>⟧\n"
        f"{RETURNED.replace(RESPONSE, RESPONSE * 2)}{REPLIED}",
    ),
    ("tools", "one call after the other"): (
        (*ONCE[:3], *ONCE[1:]), f"{SYSTEM}{ASKED}{f'⟦{OSLO}<|im_end|>⟧{chr(10)}{RETURNED}' * 2}{REPLIED}"
    ),
    ("tools", "a call of weight 0"): (
        (ASK, calls(CALL, weight=0), RESULT, REPLY), f"{SYSTEM}{ASKED}{OSLO}<|im_end|>\n{RETURNED}{REPLIED}"
    ),
    ("tools", "a result that repeats the call and the answer"): (
        (ASK, calls(CALL), {**RESULT, "content": f"{OSLO} It is 14:05."}, REPLY),
        f"{SYSTEM}{ASKED}⟦{OSLO}<|im_end|>⟧\n{RETURNED.replace('14:05', f'{OSLO} It is 14:05.')}{REPLIED}",
    ),
    ("tools_strict", "a template that refuses an answer in the place of a call"): (
        ONCE, f"<|im_start|>{AVAILABLE}{STRICT}{RESULTS}⟦ It is 14:05.<|im_end|>⟧"
    ),
    ("tools_strict", "and describes the tools before the last question"): (
        (*ONCE, ASK, calls(CALL)),
        f"<|im_start|>[INST] Time in Oslo? [/INST]{STRICT}{RESULTS}⟦ It is 14:05.<|im_end|>⟧{AVAILABLE}{STRICT}",
    ),
    ("tools_text", "a template that takes arguments as text"): (
        ONCE,
        f"{TOOLS}<|im_start|>user\nTime in Oslo?<|im_end|><|im_start|>assistant\n"
        '⟦<call>time {"city": "Oslo"}</call><|im_end|>⟧<|im_start|>tool\n14:05<|im_end|><|im_start|>assistant\n'
        "⟦It is 14:05.<|im_end|>⟧",
    ),
    ("tools_generation", "a template that marks what is generated"): (
        ONCE,
        f"{TOOLS}<|im_start|>user\nTime in Oslo?<|im_end|><|im_start|>assistant\n"
        f"⟦<call>{json.dumps({**CALL, 'arguments': {'city': 'Oslo'}})}</call><|im_end|>⟧"
        "<|im_start|>tool\n14:05<|im_end|><|im_start|>assistant\n⟦It is 14:05.<|im_end|>⟧",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("template", "case"), CASES)
def test_calls_are_learnt_and_results_are_not(template: str, case: str, tiny_tokenizer: Any, tmp_path: Path) -> None:
    messages, expected = CASES[template, case]
    tokenizer = with_template(tiny_tokenizer, template)
    assert marked(encode_example(example_of(tmp_path, *messages), tokenizer, 4096), tokenizer) == expected


REFUSED: dict[tuple[str | None, str], tuple[tuple[dict[str, Any], ...], str]] = {
    ("thinks", "calls"): (ONCE, "the chat template leaves out tool calls"),
    ("gemma", "calls"): (ONCE, "the chat template leaves out tool calls"),
    ("r1", "a call at the end"): (ONCE[:2], "the chat template leaves out tool calls"),
    ("generation", "a call at the end"): (ONCE[:2], "the chat template leaves out tool calls"),
    ("mistral", "calls"): (ONCE, "the chat template rejects the messages: roles must alternate"),
    ("thinks", "tools that nobody calls"): ((ASK, REPLY), "the chat template leaves out the tools"),
    ("tools_strict", "another id"): (
        (ASK, {**calls(CALL), "tool_calls": [{"id": "1", "function": CALL}]}),
        "the chat template rejects the messages: call ids must have 9 characters",
    ),
    (None, "calls"): (ONCE, "the model has no chat template, and the plain one has no tools"),
    (None, "a result"): ((ASK, REPLY, RESULT, REPLY), "the model has no chat template, and the plain one has no tools"),
}


@pytest.mark.parametrize(("template", "case"), REFUSED)
def test_what_a_template_leaves_out_refuses_the_row(
    template: str | None, case: str, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    messages, reason = REFUSED[template, case]
    tokenizer = with_template(tiny_tokenizer, template or "thinks")
    tokenizer.chat_template = tokenizer.chat_template if template else None
    with pytest.raises(DataError) as caught:
        encode_example(example_of(tmp_path, *messages), tokenizer, 4096)
    assert str(caught.value) == reason


@pytest.mark.parametrize(("part", "left_out"), [
    ("{{- call.arguments | tojson }}", "the arguments of tool calls"),
    ("m.content + '\\n</tool_response>'", "what tools return"),
    ("{{- '\\n' }}{{- tool | tojson }}", "the tools"),
])  # fmt: skip
def test_no_part_is_left_out_unsaid(part: str, left_out: str, tiny_tokenizer: Any, tmp_path: Path) -> None:
    tokenizer = with_template(tiny_tokenizer, "tools")
    assert part in tokenizer.chat_template
    tokenizer.chat_template = tokenizer.chat_template.replace(part, "''" if part.startswith("m.") else "")
    with pytest.raises(DataError, match=f"^the chat template leaves out {left_out}$"):
        encode_example(example_of(tmp_path, *ONCE), tokenizer, 4096)


def test_calls_that_are_outside_the_marks_refuse_the_row(tiny_tokenizer: Any, tmp_path: Path) -> None:
    tokenizer = with_template(tiny_tokenizer, "tools_generation")
    moved = tokenizer.chat_template.replace("{%- for call", "{% endgeneration %}{%- for call")
    tokenizer.chat_template = moved.replace("{{- '<|im_end|>' }}{% endgeneration %}", "{{- '<|im_end|>' }}")
    with pytest.raises(DataError, match="the chat template leaves out tool calls"):
        encode_example(example_of(tmp_path, *ONCE), tokenizer, 4096)


@pytest.mark.parametrize("template", ["tools", "tools_text", "tools_generation"])
def test_what_looks_like_a_special_token_in_a_call_stays_text(
    template: str, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    tokenizer = with_template(tiny_tokenizer, template)
    end = "<|im_end|>"
    counts = []
    for text in ("x", end):
        call = {"name": "time", "arguments": {"city": text}}
        tools = [{"name": "time", "description": text}]
        example = example_of(tmp_path, ASK, calls(call), {**RESULT, "content": text}, REPLY, tools=tools)
        ids = encode_example(example, tokenizer, 4096).input_ids
        counts.append(ids.count(tokenizer.eos_token_id))
        assert tokenizer.decode(ids).count(f'"{text}"') == 2
    assert counts[0] == counts[1]


def test_of_a_long_prompt_with_calls_the_newest_stays(tiny_tokenizer: Any, tmp_path: Path) -> None:
    tokenizer = with_template(tiny_tokenizer, "tools")
    example = example_of(tmp_path, ASK, calls(CALL), {**RESULT, "content": "long " * 200}, REPLY)
    encoded = encode_example(example, tokenizer, 200)
    text = marked(encoded, tokenizer)
    assert (
        len(encoded.input_ids) == 200
        and encoded.dropped
        and text.endswith(f"</tool_response><|im_end|>\n<|im_start|>assistant\n{REPLIED}")
    )


def test_many_calls_are_found(tiny_tokenizer: Any, tmp_path: Path) -> None:
    tokenizer = with_template(tiny_tokenizer, "tools")
    text = marked(encode_example(example_of(tmp_path, *ONCE * 40), tokenizer, 100_000), tokenizer)
    assert text.count(f"⟦{OSLO}<|im_end|>⟧") == text.count(REPLIED) == 40 == text.count("⟧") / 2
