"""A conversation in the chat: what the page shows, what the model is given, and how they are kept apart."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

MARKUP = re.compile(r"<(?=[A-Za-z/!?])|!(?=\[)")
"""What would begin an HTML tag or an image, which the browser might fetch from somewhere."""
JOINER = "\u2060"
"""Put behind such a beginning it is text. It is not seen, and taken out again before the model reads it and where it is
copied. In code too: what is code to one reader of Markdown is none to another, and an attack lives in between."""


@dataclass(frozen=True)
class Turn:
    """A message and its answer, None as long as there is none; `note` says what was different for it."""

    user: str
    answer: str | None = None
    note: str = ""


def shown(text: str) -> str:
    """Text as the chat gets it: Markdown as ever, HTML tags and images as the characters they are."""
    return MARKUP.sub(lambda found: found[0] + JOINER, text)


def said(content: Any) -> str:
    """What a message of the chat says, whatever shape the component gives it; the inverse of `shown`."""
    parts = content if isinstance(content, list) else [content]
    text = "".join(part if isinstance(part, str) else str(part.get("text", "")) for part in parts)
    return re.sub(rf"([<!]){JOINER}", r"\1", text)


def parse(history: list[Any]) -> list[Turn]:
    """The chat component's value as turns."""
    turns: list[Turn] = []
    for entry in history:
        text, title = said(entry["content"]), (entry.get("metadata") or {}).get("title")
        if entry["role"] == "user":
            turns.append(Turn(text))
        elif turns and title:
            turns[-1] = replace(turns[-1], note=title)
        elif turns:
            turns[-1] = replace(turns[-1], answer=text)
    return turns


def render(turns: list[Turn]) -> list[dict[str, Any]]:
    """Turns as the chat component's value."""
    history: list[dict[str, Any]] = []
    for turn in turns:
        history.append({"role": "user", "content": shown(turn.user)})
        if turn.note:
            detail = "For this reply only; the adapter stays as it was trained."
            history.append({"role": "assistant", "content": detail, "metadata": {"title": turn.note, "status": "done"}})
        if turn.answer is not None:
            history.append({"role": "assistant", "content": shown(turn.answer)})
    return history


def messages(turns: list[Turn], system: str = "") -> list[dict[str, str]]:
    """What the model is given to answer the last turn; earlier ones without an answer are left out."""
    given = [{"role": "system", "content": system.strip()}] if system.strip() else []
    for turn in turns[:-1]:
        if turn.answer:
            given += [{"role": "user", "content": turn.user}, {"role": "assistant", "content": turn.answer}]
    return [*given, {"role": "user", "content": turns[-1].user}]


def turn_at(history: list[Any], index: Any) -> int:
    """The number of the turn that the entry `index` of the chat's value belongs to."""
    place = index[0] if isinstance(index, (list, tuple)) else index
    return max(sum(entry["role"] == "user" for entry in history[: place + 1]) - 1, 0)


def aligned(main: list[Turn], own: list[Turn]) -> list[Turn]:
    """The main conversation as another model has it: its own answers where it gave some to the same messages."""
    return [
        own[place] if place < len(own) and turn.answer is not None and answers(own[place], turn) else turn
        for place, turn in enumerate(main)
    ]


def answers(own: Turn, turn: Turn) -> bool:
    """Whether a turn is an answer to the message of another."""
    return own.answer is not None and own.user == turn.user
