"""The thoughts that some models write before their answer, between `<think>` and `</think>`. No torch."""

from __future__ import annotations

OPEN, CLOSE = "<think>", "</think>"


def opened_by(prompt: str) -> str:
    """The end of a prompt that begins a thought, as some chat templates do; empty if it does not."""
    return f"{OPEN}\n" if prompt.rstrip().endswith(OPEN) else ""


def split_thought(text: str) -> tuple[str | None, str | None]:
    """A reply, as far as it is written, as (thought, answer).

    The thought is None for a reply that does not begin with one, the answer is None until the thought has ended.
    """
    begun = text.lstrip()
    if not begun.startswith(OPEN):
        return None, text
    thought, closed, answer = begun.removeprefix(OPEN).partition(CLOSE)
    return thought.strip(), answer.lstrip() if closed else None
