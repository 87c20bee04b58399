"""Reading a conversation, under the names and in the forms that people write it, into messages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mole.core.errors import DataError, brief
from mole.core.thoughts import END_THINK, THINK
from mole.data.tools import CALL_ROLES, RESULT_ROLES, parse_calls, parse_result
from mole.data.values import join_parts, json_type, text_value

Message = dict[str, Any]
"""`role` and `content` (texts); `weight` 0 in an answer that is not learnt, `tool_calls` in one that calls tools."""
ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
}
"""The role that each name of a role means, in lower case."""
PLAIN_ROLES = ("user", "assistant")
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")


def parse_messages(messages: Any, label: str = "messages", system: str = "") -> tuple[Message, ...]:
    """The messages up to the assistant's last one to learn.

    Args:
        messages: a list of `{"role", "content"}` or `{"from", "value"}`.
        label: what errors call it.
        system: a system message before them.

    Raises `DataError` for an invalid message or a missing answer.
    """
    if not isinstance(messages, list):
        raise DataError(f"{label} is {json_type(messages)}, not a list")
    result: list[Message] = [{"role": "system", "content": system}] if system else []
    for number, message in enumerate(messages, start=1):
        parsed = parse_message(message, number)
        if parsed["role"] != "system" or not result or result[-1]["role"] != "system":
            result += [parsed] if parsed["content"] or parsed["role"] != "system" else []
        elif parsed["content"] not in ("", result[-1]["content"]):
            result[-1]["content"] += f"\n\n{parsed['content']}"
    while result and (result[-1]["role"] != "assistant" or result[-1].get("weight") == 0):
        result.pop()
    if not result:
        raise DataError(f"{label} contains no answer of the assistant to learn from")
    if len(result) == 1:
        raise DataError(f"{label} contains nothing before the assistant's answer")
    return tuple(result)


def parse_message(message: Any, number: int) -> Message:
    """One message; only a system message may be empty. Raises `DataError`."""
    if not isinstance(message, dict):
        raise DataError(f"message {number} is {json_type(message)}, not an object with role and content")
    given = message.get("role", message.get("from"))
    if len(message) == 2 and given in PLAIN_ROLES and isinstance(message.get("content"), str):  # most are; it's quick
        return {"role": given, "content": text_value(message, "content", f"message {number}'s content")}
    name = given.strip().lower() if isinstance(given, str) else given
    label = f"message {number}'s content"
    if name in RESULT_ROLES:
        return parse_result(message, label)
    role = "assistant" if name in CALL_ROLES else ROLES.get(name) if isinstance(name, str) else None
    if role is None:
        raise DataError(f"message {number} has the role {brief(given)}, not one of system, user, assistant, tool")
    calls = parse_calls(message, name, f"message {number}") if role == "assistant" else []
    needed = role != "system" and not calls
    parsed: Message = {"role": role, "content": "" if name in CALL_ROLES else read_content(message, needed, label)}
    if calls:
        parsed["tool_calls"] = calls
    if role == "assistant":
        parsed["content"] = with_reasoning(message, parsed["content"])
        weight = message.get("weight")
        if weight is not None and weight not in (0, 1):
            raise DataError(f"message {number}'s weight is {brief(weight)}, neither 0 nor 1")
        if weight is not None and not weight:
            parsed["weight"] = 0
    return parsed


def read_content(message: Mapping[str, Any], needed: bool, label: str) -> str:
    """The text of a message, joined if it is in parts; empty if there is none and none is `needed`.

    Raises `DataError`.
    """
    key = "value" if "content" not in message and "value" in message else "content"
    content = message.get(key)
    if isinstance(content, list):
        content = join_parts(content, label) if content or needed else None
    if not needed and (content is None or (isinstance(content, str) and not content.strip())):
        return ""
    return text_value({key: content} if key in message else {}, key, label, numbers=True)


def with_reasoning(message: Mapping[str, Any], content: str) -> str:
    """An answer with the thought that is in a field of its own before it, as chat templates read it."""
    thought = next((message[key] for key in REASONING_KEYS if isinstance(message.get(key), str)), "")
    if not thought.strip() or END_THINK in content:
        return content
    thought = text_value({"": thought}, "", "the reasoning of an answer")
    return f"{THINK}\n{thought.strip()}\n{END_THINK}\n\n{content}"


def parse_history(history: Any) -> list[Message]:
    """The messages of earlier turns, `[[question, answer], …]`. Raises `DataError`."""
    if not isinstance(history, list):
        raise DataError(f"history is {json_type(history)}, not a list of [question, answer]")
    result: list[Message] = []
    for number, turn in enumerate(history, start=1):
        if not isinstance(turn, list) or len(turn) != 2:
            raise DataError(f"turn {number} of history is not [question, answer]")
        texts = [text_value({"": text}, "", f"turn {number} of history", numbers=True) for text in turn]
        result += [{"role": "user", "content": texts[0]}, {"role": "assistant", "content": texts[1]}]
    return result
