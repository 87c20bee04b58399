"""Reading the tools of a row, the calls of a message and what a tool returned, in the forms people write. No torch.

As chat templates take them: tools and calls as OpenAI's API has them, arguments as objects.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from mole.core.errors import DataError, brief
from mole.data.values import join_parts, json_type, parse_json_text, text_value

RESULT_ROLES = ("tool", "function", "observation", "ipython", "tool_response")
"""Names of the role of what a tool returned."""
CALL_ROLES = ("function_call", "tool_call")
"""Names of the role of a message that is a call, as ShareGPT's format has them, and of the field of a single call."""
DEEPEST = 32
"""Levels of lists and objects in the arguments of a call or the description of a tool."""


def parse_tools(value: Any) -> tuple[dict[str, Any], ...]:
    """The tools that a row offers: a list of them, or one, or this as JSON text. Raises `DataError`."""
    tools = parse_json_text(value, "tools")
    if isinstance(tools, dict):
        tools = [tools]
    if not isinstance(tools or [], list):
        raise DataError(f"tools is {json_type(tools)}, not a list")
    result = []
    for number, given in enumerate(tools or [], start=1):
        label = f"tool {number}"
        tool = parse_json_text(given, label)
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise DataError(f"{label} is not an object with the name of a function")
        check_values(tool, label)
        result.append(tool if "function" in tool else {"type": "function", "function": tool})
    return tuple(result)


def parse_calls(message: Mapping[str, Any], role: Any, label: str) -> list[dict[str, Any]]:
    """The calls of a message: its field `tool_calls` or `function_call`, or its content. Raises `DataError`."""
    field = next((name for name in ("tool_calls", *CALL_ROLES) if message.get(name)), None)
    given = message[field] if field else None
    if role in CALL_ROLES and field is None:
        given = message.get("content", message.get("value"))
    calls = parse_json_text(given, f"{label}'s call")
    if role in CALL_ROLES and not calls:
        raise DataError(f"{label}'s call is empty")
    return [parse_call(call, label) for call in (calls if isinstance(calls, list) else [calls] if calls else [])]


def parse_call(given: Any, label: str) -> dict[str, Any]:
    """One call, `{"type", "function": {"name", "arguments"}}` with its `id` if it has one. Raises `DataError`."""
    call = parse_json_text(given, f"{label}'s call")
    function = call.get("function", call) if isinstance(call, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(function, dict) or not isinstance(name, str) or not name.strip():
        raise DataError(f"{label} has a call without the name of a function")
    of = f"{label}'s call of {brief(name)}"
    arguments = function.get("arguments", function.get("parameters")) or {}
    if isinstance(arguments, str):
        try:
            arguments = parse_json_text(arguments, "") or {}
        except DataError:
            raise DataError(f"{of} has arguments that are text that is not JSON") from None
    if not isinstance(arguments, dict):
        raise DataError(f"{of} has arguments that are {json_type(arguments)}, not an object")
    check_values([name, arguments], of)
    parsed = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return {"id": call["id"], **parsed} if isinstance(call.get("id"), str) else parsed


def parse_result(message: Mapping[str, Any], label: str) -> dict[str, Any]:
    """The message of what a tool returned: its text, text in parts, or other values as JSON. Raises `DataError`."""
    content = message.get("content", message.get("value"))
    if isinstance(content, list) and any(isinstance(part, dict) and "type" in part for part in content):
        content = join_parts(content, label)
    elif not isinstance(content, str):
        check_values(content, label)
        content = "" if content is None else json.dumps(content, ensure_ascii=False)
    if content.strip():
        content = text_value({"": content}, "", label)
    names = {key: message[key] for key in ("tool_call_id", "name") if isinstance(message.get(key), str)}
    return {"role": "tool", "content": content, **names}


def check_values(value: Any, label: str, level: int = 0) -> None:
    """Raise `DataError` for values that are nested too deeply or whose texts are not valid Unicode."""
    if level > DEEPEST:
        raise DataError(f"{label} is nested more than {DEEPEST} levels deep")
    if isinstance(value, str) and value.strip():
        text_value({"": value}, "", label)
    for part in [*value.items()] if isinstance(value, dict) else value if isinstance(value, list | tuple) else ():
        check_values(part, label, level + (not isinstance(part, tuple)))
