"""A model's thoughts are told from its answer."""

from __future__ import annotations

import pytest

from mole.core.thoughts import opened_thought, split_thought


@pytest.mark.parametrize(
    "text, thought, answer",
    [
        ("Paris.", None, "Paris."),
        ("", None, ""),
        ("<think>\nWhere is France?", "Where is France?", None),
        ("<think>\nFrance </think>\n\nParis.", "France", "Paris."),
        ("\n<think></think>Paris.", "", "Paris."),
        ("Paris. <think>not at the beginning</think>", None, "Paris. <think>not at the beginning</think>"),
        ("<think>a</think>b</think>c", "a", "b</think>c"),
    ],
)
def test_a_thought_at_the_beginning_is_split_off(text: str, thought: str | None, answer: str | None) -> None:
    assert split_thought(text) == (thought, answer)


def test_a_prompt_may_begin_a_thought() -> None:
    assert opened_thought("<|assistant|>\n<think>\n") == "<think>\n"
    assert opened_thought("<|assistant|>\n<think>\n\n</think>\n\n") == "" == opened_thought("<|assistant|>")
