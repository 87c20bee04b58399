"""The thoughts that some models write before their answer, between `<think>` and `</think>`. No torch."""

from __future__ import annotations

THINK, END_THINK = "<think>", "</think>"


def opened_thought(prompt: str) -> str:
    """The end of a prompt that begins a thought, as some templates do; empty if it does not."""
    kept = prompt.rstrip()
    return prompt[len(kept) - len(THINK) :] if kept.endswith(THINK) else ""


def begins_with_thought(content: str) -> bool:
    """Whether an answer begins with a thought."""
    return content.lstrip().startswith(THINK) and END_THINK in content


def split_thought(text: str) -> tuple[str | None, str | None]:
    """A reply, as far as it is written, as (thought, answer).

    The thought is None for a reply that does not begin with one, the answer is None until the thought has ended.
    """
    begun = text.lstrip()
    if not begun.startswith(THINK):
        return None, text
    thought, closed, answer = begun.removeprefix(THINK).partition(END_THINK)
    return thought.strip(), answer.lstrip() if closed else None
