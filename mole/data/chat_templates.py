"""Chat templates: a tokenizer's own, or a plain one, ready to render conversations. No torch."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Sequence
from datetime import datetime
from functools import cached_property
from typing import Any

from mole.core.errors import DataError
from mole.core.text import one_line
from mole.core.thoughts import END_THINK, THINK
from mole.data.messages import Message

MARK = "\ufdd0"
"""Stands in the place of a content. A noncharacter of Unicode: no text has it."""
PLAIN, END_PLAIN = "\ufdd1", "\ufdd2"
"""Around what is text although it looks like a special token. Noncharacters too."""
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
"""How a template marks what the model generates."""
NOW = re.compile(r"""strftime_now\(\s*(["'])([^"'{}]*)\1\s*\)""")
"""How a template asks for the date."""

DEFAULT_CHAT_TEMPLATE = """\
{{- bos_token if bos_token is defined and bos_token else '' -}}
{%- for message in messages -%}
    {%- if message['role'] == 'system' -%}
        {{- message['content'] + '\\n\\n' -}}
    {%- elif message['role'] == 'user' -%}
        {{- '### User:\\n' + message['content'] + '\\n\\n' -}}
    {%- else -%}
        {{- '### Assistant:\\n' + message['content'] + (eos_token if eos_token is defined else '') + '\\n\\n' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '### Assistant:\\n' -}}{%- endif -%}
"""
"""Chat template for base models without one: `### User:` and `### Assistant:` headings, and the tokenizer's
end-of-text token after each answer."""


def chat_template(tokenizer: Any) -> str:
    """The tokenizer's chat template, or `DEFAULT_CHAT_TEMPLATE` if it has none."""
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default") or next(iter(template.values()), None)
    return template or DEFAULT_CHAT_TEMPLATE


class ChatTemplate:
    """A tokenizer's chat template, ready to render conversations.

    Args:
        tokenizer: with or without a template of its own.
        date: what a template that writes the date takes for now; None for now.

    Attributes:
        source: the template.
        thinking: whether a template with this choice lets the model think.
        tools: those that the assistant may call.
    """

    def __init__(self, tokenizer: Any, date: datetime | None = None) -> None:
        self.tokenizer, self.source = tokenizer, chat_template(tokenizer)
        self.thinking, self.tools = False, list[Any]()
        if date is not None:  # a template is given texts only, no function in the place of `strftime_now`
            self.source = NOW.sub(lambda call: f"{call[1]}{date.strftime(call[2])}{call[1]}", self.source)
        special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        special -= {THINK, END_THINK}
        longest_first = sorted(filter(None, special), key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    def with_choices(self, thinking: bool, tools: Sequence[dict[str, Any]] = ()) -> ChatTemplate:
        """The same template for a conversation with or without thinking, and with these tools."""
        if thinking == self.thinking and not (tools or self.tools):
            return self
        chosen = copy.copy(self)
        chosen.thinking, chosen.tools = thinking, list(tools)
        return chosen

    @property
    def marks_generation(self) -> bool:
        """Whether the template marks what the model generates."""
        return GENERATION.search(self.source) is not None

    @cached_property
    def takes_system(self) -> bool:
        """Whether the template renders a system message; some refuse it, others leave it out."""
        try:
            return MARK in self.render([{"role": "system", "content": MARK}, {"role": "user", "content": "a"}])
        except DataError:
            return False

    @cached_property
    def takes_objects(self) -> bool:
        """Whether the template renders a call's arguments if they are an object; some need them as JSON text."""
        call = {"id": "abcdefgh1", "type": "function", "function": {"name": "a", "arguments": {"a": "b"}}}
        messages: list[Message] = [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
        ]
        try:
            return bool(self.render(messages, ask=False))
        except DataError:
            return False

    def as_plain(self, value: Any) -> Any:
        """A text, list or object, in whose texts what looks like a special token is marked as plain text."""
        if isinstance(value, str):
            return self._special.sub(rf"{PLAIN}\g<0>{END_PLAIN}", value)
        if isinstance(value, dict):
            return {self.as_plain(key): self.as_plain(entry) for key, entry in value.items()}
        return [self.as_plain(entry) for entry in value] if isinstance(value, list) else value

    def prepare_calls(self, calls: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """The calls of a message as the template is given them."""
        prepared = self.as_plain(list(calls))
        for call in () if self.takes_objects else prepared:
            call["function"]["arguments"] = json.dumps(call["function"]["arguments"], ensure_ascii=False)
        return prepared

    def prepare(self, messages: Sequence[Message]) -> list[Message]:
        """The messages as the template is given them.

        What looks like a special token in their contents is marked as plain text. A system message that the template
        does not take begins the user's first message.
        """
        prepared = [{**message, "content": self.as_plain(message["content"])} for message in messages]
        for message in prepared:
            if "tool_calls" in message:
                message["tool_calls"] = self.prepare_calls(message["tool_calls"])
        if [message["role"] for message in prepared[:2]] == ["system", "user"] and not self.takes_system:
            system, first, *rest = prepared
            return [{**first, "content": f"{system['content']}\n\n{first['content']}"}, *rest]
        return prepared

    def render(self, messages: Sequence[Message], *, ask: bool = True) -> str:
        """The conversation as text; if `ask`, the beginning of the assistant's next turn follows.

        Raises `DataError` when the template rejects the conversation.
        """
        try:
            return self.tokenizer.apply_chat_template(
                list(messages),
                tools=self.tools or None,
                chat_template=self.source,
                tokenize=False,
                add_generation_prompt=ask,
                enable_thinking=self.thinking,
            )
        except Exception as error:  # a template is a (sandboxed) program and can raise anything
            raise DataError(f"the chat template rejects the messages: {one_line(error)}") from None

    def render_marked(self, messages: Sequence[Message]) -> tuple[str, list[tuple[int, int]]]:
        """The whole conversation, and the character ranges that the template marks as generated. Raises `DataError`."""
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            rendered: Any = render_jinja_template(
                conversations=[list(messages)],
                tools=self.tools or None,
                chat_template=self.source,
                return_assistant_tokens_mask=True,
                enable_thinking=self.thinking,
                **self.tokenizer.special_tokens_map,
            )
        except Exception as error:
            raise DataError(f"the chat template rejects the messages: {one_line(error)}") from None
        (whole,), (spans,) = rendered
        return whole, list(spans)


def render_prompt(messages: Sequence[Message], tokenizer: Any, enable_thinking: bool = False) -> str:
    """The text before the assistant's next answer; `encode_text` makes it tokens.

    Thinking is disabled in templates that have this choice, unless asked for. Raises `DataError` when the template
    rejects the messages.
    """
    template = ChatTemplate(tokenizer)
    return template.with_choices(enable_thinking).render(template.prepare(messages))
