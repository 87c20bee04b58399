"""A conversation in the Chat tab: as the page shows it, and as the model reads it."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

MARKUP = re.compile(r"<(?=[A-Za-z/!?])|!(?=\[)")
"""The start of an HTML tag or an image, which the browser might fetch from elsewhere."""
THOUGHT = "Thought"
"""Title of the entry with what a model wrote before its answer."""
JOINER = "\u2060"
"""WORD JOINER: put after such a start, it makes it plain text. It is invisible, and removed before the model reads the
text and when it is copied. Code is escaped too: Markdown parsers disagree about what is code, and an attack would use
the difference."""


@dataclass(frozen=True)
class Turn:
    """A message and its answer.

    Attributes:
        user: the message.
        answer: None until there is one.
        note: names the routing overrides of the answer.
        thought: what the model wrote before its answer, to itself; None for nothing.
    """

    user: str
    answer: str | None = None
    note: str = ""
    thought: str | None = None


def escape_markup(text: str) -> str:
    """Text for the chat component: Markdown as it is, HTML tags and images as plain characters."""
    return MARKUP.sub(lambda found: found[0] + JOINER, text)


def message_text(content: Any) -> str:
    """The text of a message of the chat component, in any shape it sends; the inverse of `escape_markup`."""
    parts = content if isinstance(content, list) else [content]
    text = "".join(part if isinstance(part, str) else str(part.get("text", "")) for part in parts)
    return re.sub(rf"([<!]){JOINER}", r"\1", text)


def turns_of(history: list[Any]) -> list[Turn]:
    """The chat component's value as turns."""
    turns: list[Turn] = []
    for entry in history:
        text, title = message_text(entry["content"]), (entry.get("metadata") or {}).get("title")
        if entry["role"] == "user":
            turns.append(Turn(text))
        elif turns and title == THOUGHT:
            turns[-1] = replace(turns[-1], thought=text)
        elif turns and title:
            turns[-1] = replace(turns[-1], note=title)
        elif turns:
            turns[-1] = replace(turns[-1], answer=text)
    return turns


def history_of(turns: list[Turn]) -> list[dict[str, Any]]:
    """Turns as the chat component's value."""
    history: list[dict[str, Any]] = []
    for turn in turns:
        history.append({"role": "user", "content": escape_markup(turn.user)})
        if turn.note:
            detail = "For this reply only; the adapter itself does not change."
            history.append(folded(turn.note, detail))
        if turn.thought is not None:
            history.append(folded(THOUGHT, escape_markup(turn.thought), done=turn.answer is not None))
        if turn.answer is not None:
            history.append({"role": "assistant", "content": escape_markup(turn.answer)})
    return history


def folded(title: str, content: str, done: bool = True) -> dict[str, Any]:
    """An entry that the chat component shows under its title, folded once it is done."""
    metadata = {"title": title, **({"status": "done"} if done else {})}
    return {"role": "assistant", "content": content, "metadata": metadata}


def model_messages(turns: list[Turn], system: str = "") -> list[dict[str, str]]:
    """The messages the model reads to answer the last turn; earlier turns without an answer are left out."""
    messages = [{"role": "system", "content": system.strip()}] if system.strip() else []
    for turn in turns[:-1]:
        if turn.answer:
            messages += [{"role": "user", "content": turn.user}, {"role": "assistant", "content": turn.answer}]
    return [*messages, {"role": "user", "content": turns[-1].user}]


def turn_index(history: list[Any], index: Any) -> int:
    """The number of the turn that the entry `index` of the chat component's value belongs to."""
    entry_index = index[0] if isinstance(index, (list, tuple)) else index
    return max(sum(entry["role"] == "user" for entry in history[: entry_index + 1]) - 1, 0)


def align_turns(main: list[Turn], own: list[Turn]) -> list[Turn]:
    """The main conversation for another model, with its `own` answers where it answered the same messages."""

    def is_own(number: int, turn: Turn) -> bool:
        return number < len(own) and own[number].answer is not None and own[number].user == turn.user

    return [
        own[number] if turn.answer is not None and is_own(number, turn) else turn for number, turn in enumerate(main)
    ]
