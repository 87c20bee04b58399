"""Replies column by column: what each is asked, what is remembered of the last one, and what goes wrong in one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from app.services.answering import ChatColumn, ReplyRequest, UIUpdate, answer_columns, chat_columns
from app.services.conversation import Turn, history_of, turns_of
from mole.mixture.steering import Steering

SHORT = ReplyRequest({"max_new_tokens": 4})


@pytest.fixture(autouse=True)
def on_the_cpu(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


def last_of(updates: list[UIUpdate], part: str, place: int = 0) -> Any:
    return [value for m in updates if m.place == place and (value := getattr(m, part)) is not None][-1]


def test_a_steered_reply_is_held_against_the_last_one_of_the_same_model(tiny_adapter: Path) -> None:
    target = str(tiny_adapter)
    trained = list(answer_columns([ChatColumn(target, [Turn("hello")])], SHORT, {}))
    records = last_of(trained, "records")
    assert records == {target: [last_of(trained, "view")["meta"]["id"], ""]}
    column = ChatColumn(target, [Turn("hello")], Steering({"top_p": 0.5}, frozenset({1})))
    steered = list(answer_columns([column], SHORT, records))
    meta = last_of(steered, "view")["meta"]
    assert (meta["against"], meta["against_label"]) == (records[target][0], "as trained")
    (turn,) = turns_of(last_of(steered, "history"))
    assert turn.note == "Routing overrides: top p 0.75 → 0.5 · expert 2 muted"
    assert last_of(steered, "records")[target] == [meta["id"], "top p 0.75 → 0.5 · expert 2 muted"]


def test_the_columns_share_the_message_and_only_the_first_is_steered(tiny_adapter: Path, tiny_folder: Path) -> None:
    main, other = [Turn("a", "1"), Turn("b")], [Turn("a", "own")]
    steering = Steering(muted=frozenset({0}))
    base = f"base:{tiny_folder}"
    columns = chat_columns(str(tiny_adapter), [base], steering, [history_of(main), history_of(other), [], []])
    assert [column.turns for column in columns] == [main, [Turn("a", "own"), Turn("b")]]
    assert [bool(column.steering) for column in columns] == [True, False]
    (alone,) = chat_columns(str(tiny_adapter), [], steering, [history_of(main), [], [], []])
    assert not alone.label


def test_what_goes_wrong_in_one_column_is_said_and_the_next_answers(tiny_adapter: Path) -> None:
    columns = [
        ChatColumn("nothing", [Turn("hi")], label="nothing"),
        ChatColumn(str(tiny_adapter), [Turn("hi")], label="tiny"),
    ]
    updates = list(answer_columns(columns, SHORT, {}))
    assert last_of(updates, "history", 1)[-1]["role"] == "assistant"
    status = [m.status for m in updates if m.status is not None][-1]
    assert "**nothing: Not answered.** There is no run and no adapter folder 'nothing'" in status
    assert "**tiny** · 4 tokens" in status
