"""Reading a conversation, under the names and in the forms that people write it, into messages."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from mole.core.errors import DataError, brief
from mole.core.text import one_line
from mole.core.thoughts import END_THINK, THINK

Message = dict[str, Any]
"""`role` and `content` (texts); `weight` 0 in an answer that is not learnt."""
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
TOOL_ROLES = ("tool", "function", "observation", "ipython", "function_call", "tool_call")
TOOL_KEYS = ("tool_calls", "function_call")
TEXT_PARTS = ("text", "input_text", "output_text")
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
            result += [parsed] if parsed["content"] else []
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
    if name in TOOL_ROLES or any(message.get(key) for key in TOOL_KEYS):
        raise DataError(f"message {number} is of a tool or calls one; tool calls are not learnt")
    role = ROLES.get(name) if isinstance(name, str) else None
    if role is None:
        raise DataError(f"message {number} has the role {brief(given)}, not one of system, user, assistant")
    parsed: Message = {"role": role, "content": read_content(message, role, f"message {number}'s content")}
    if role == "assistant":
        parsed["content"] = with_reasoning(message, parsed["content"])
        weight = message.get("weight")
        if weight is not None and weight not in (0, 1):
            raise DataError(f"message {number}'s weight is {brief(weight)}, neither 0 nor 1")
        if weight is not None and not weight:
            parsed["weight"] = 0
    return parsed


def read_content(message: Mapping[str, Any], role: str, label: str) -> str:
    """The text of a message, joined if it is in parts; only a system message may have none. Raises `DataError`."""
    key = "value" if "content" not in message and "value" in message else "content"
    content = message.get(key)
    if isinstance(content, list):
        content = join_parts(content, label)
    if role == "system" and (content is None or (isinstance(content, str) and not content.strip())):
        return ""
    return text_value({key: content} if key in message else {}, key, label, numbers=True)


def join_parts(parts: Sequence[Any], label: str) -> str:
    """The text of a content that is a list of parts. Raises `DataError` for a part that is not text."""
    texts = []
    for part in parts:
        kind = part.get("type", "text") if isinstance(part, dict) else None
        text = part if isinstance(part, str) else part.get("text") if kind in TEXT_PARTS else None
        if not isinstance(text, str):
            what = f"of the type {brief(kind)}" if isinstance(kind, str) else json_type(part)
            raise DataError(f"{label} has a part that is {what}; only text is learnt")
        texts.append(text)
    return "".join(texts)


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


def parse_nested(value: Mapping[str, Any], name: str) -> Any:
    """The value of a column with a list or object, which CSV holds as JSON text. Raises `DataError`."""
    entry = value.get(name)
    if isinstance(entry, str):
        try:
            return json.loads(entry)
        except ValueError as error:
            raise DataError(f"{name} is text that is not JSON: {one_line(error)}") from None
    return entry


def text_value(value: Mapping[str, Any], name: str, label: str = "", *, numbers: bool = False) -> str:
    """The text of a column, or with `numbers` a number as text.

    Raises `DataError` when it is missing, null, blank or neither.
    """
    entry, label = value.get(name), label or name
    if entry is None:
        raise DataError(f"{label} is null" if name in value else f"{label} is missing")
    if numbers and type(entry) in (int, float):
        entry = number_text(entry, label)
    if not isinstance(entry, str):
        raise DataError(f"{label} is {json_type(entry)}, not text")
    if not entry.strip():
        raise DataError(f"{label} is empty")
    try:
        entry.encode()
    except UnicodeEncodeError:
        raise DataError(f"{label} is not valid Unicode (half of a surrogate pair)") from None
    return entry


def number_text(number: float, label: str) -> str:
    """A number as it is written. Raises `DataError` for one that is not finite or has thousands of digits."""
    if isinstance(number, float) and not math.isfinite(number):
        raise DataError(f"{label} is {number}, not a number or text")
    try:
        return str(number)
    except ValueError:
        raise DataError(f"{label} is {brief(number)}") from None


def json_type(value: Any) -> str:
    """The type of a JSON value in words."""
    kinds = {type(None): "null", bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list"}
    return kinds.get(type(value), "an object" if isinstance(value, dict) else f"a {type(value).__name__}")
