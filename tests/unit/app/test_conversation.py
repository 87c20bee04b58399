"""The conversation as the page shows it and as the model gets it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.services.conversation import (
    JOINER,
    Turn,
    align_turns,
    escape_markup,
    history_of,
    message_text,
    model_messages,
    turn_index,
    turns_of,
)

TURNS = [
    Turn("one", "eins"),
    Turn("two", "zwei", "Routing overrides: expert 2 muted"),
    Turn("three", None),
    Turn("thought about", "42", "Routing overrides: expert 2 muted", "What is <b> * 7?"),
    Turn("thought about for too long", None, thought="Hm"),
    Turn("four"),
]


def test_turns_there_and_back_with_their_notes() -> None:
    assert turns_of(history_of(TURNS)) == TURNS


def test_a_thought_is_folded_once_the_answer_has_begun() -> None:
    *_, thought, answer = history_of([TURNS[3]])
    assert thought["metadata"] == {"title": "Thought", "status": "done"} and answer["content"] == "42"
    *_, thought = history_of([TURNS[4]])
    assert thought["metadata"] == {"title": "Thought"} and thought["content"] == "Hm"


def test_the_component_may_give_text_in_parts() -> None:
    parts = [{"type": "text", "text": "a <b"}, {"type": "text", "text": ">"}]
    assert turns_of([{"role": "user", "content": parts, "metadata": None}]) == [Turn("a <b>")]


def test_the_model_gets_neither_notes_nor_thoughts_nor_messages_without_an_answer() -> None:
    assert model_messages(TURNS, " be kind ") == [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "eins"},
        {"role": "user", "content": "two"},
        {"role": "assistant", "content": "zwei"},
        {"role": "user", "content": "thought about"},
        {"role": "assistant", "content": "42"},
        {"role": "user", "content": "four"},
    ]


def test_an_entry_of_the_page_belongs_to_its_turn() -> None:
    history = history_of(TURNS)
    assert [turn_index(history, place) for place in range(len(history))] == [0, 0, 1, 1, 1, 2, 3, 3, 3, 3, 4, 4, 5]


def test_another_model_keeps_its_own_answers_to_the_same_messages() -> None:
    main = [Turn("a", "1"), Turn("b", "2"), Turn("c")]
    assert align_turns(main, []) == main, "it has none: the main ones are the context"
    assert align_turns(main, [Turn("a", "x"), Turn("b", "y"), Turn("c", "z")]) == [
        Turn("a", "x"),
        Turn("b", "y"),
        Turn("c"),
    ]
    assert align_turns(main, [Turn("a", "x"), Turn("before the edit", "y")]) == [
        Turn("a", "x"),
        Turn("b", "2"),
        Turn("c"),
    ]


@pytest.mark.parametrize(
    "text",
    [
        "<img src=http://elsewhere.example/x.png>",
        "a ![picture](http://elsewhere.example/x.png) b",
        "</div><script>alert(1)</script><!-- -->",
        "`code` <b>bold</b> ``more ` code`` <i>",
        "never closed ` <img src=x>",
        r"escaped \` <img src=x> \`",
        "in a line ``` <img src=x>",
        "```html\n<img src=x>\n```",
        "1. a\n   ```\n<img src=x>",
        "`<b>` and ``a`<b>``",
    ],
)
def test_tags_and_images_are_text_in_what_looks_like_code_too(text: str) -> None:
    safe = escape_markup(text)
    for part in ("<img", "<script", "</", "<b>", "<i>", "<!", "!["):
        assert part not in safe
    assert message_text(safe) == text


@pytest.mark.parametrize("text", ["```python\nif a < b:\n```", "`a<-b`", "1 < 2", "wow! [link](x)", "**bold** $x<1$"])
def test_everything_else_is_left_as_it_is(text: str) -> None:
    assert escape_markup(text) == text


@given(st.text(alphabet="a<>!`[]/\\ \n", max_size=60))
def test_what_is_shown_is_what_was_said(text: str) -> None:
    assert message_text(escape_markup(text)) == text and message_text(text) == text
    assert escape_markup(message_text(escape_markup(text))) == escape_markup(text)
    assert escape_markup(text).replace(JOINER, "") == text
