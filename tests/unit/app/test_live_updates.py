"""What travels to the live view: only what is new, and everything again when what was sent is no longer right."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from app.services import live_updates
from app.services.live_updates import LiveCursor
from mole import runs
from mole.analysis.history import STEP_COLUMNS, Histories
from mole.config import RunConfig
from mole.runs.run import Run

ROUTING = {
    "layers": 2,
    "experts": 4,
    "load": [[0.25] * 4] * 2,
    "entropy": [0.5] * 2,
    "active": [2.0] * 2,
    "dead": [0] * 2,
}


@pytest.fixture
def run(home: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A run of nine steps, of which none is done."""
    monkeypatch.setattr(live_updates, "HISTORIES", Histories())
    settings = {"data": {"path": "x.jsonl"}, "training": {"max_steps": 9}, "adapter": {"num_experts": [2, 4]}}
    made = runs.create(RunConfig.from_dict({**settings, "name": "some"}))
    made.append_event("started", 0, total_steps=9, resumed_from=None)
    return made


def log_step(run: Run, step: int, **values: Any) -> None:
    run.append_event("step", step, **{"loss": 1 / step, "learning_rate": 0.1, "routing": ROUTING, **values})


def test_only_what_is_new_travels(run: Run) -> None:
    log_step(run, 1)
    log_step(run, 2)
    first, cursor = live_updates.run_update(run, LiveCursor())
    assert first["reset"] and [row[0] for row in first["rows"]["rows"]] == [1, 2] and first["routing"]["step"] == 2
    assert first["rows"]["columns"] == list(STEP_COLUMNS) and first["status"]["total_steps"] == 9
    idle, same = live_updates.run_update(run, cursor)
    assert same == cursor and idle["rows"] == {**first["rows"], "at": 2, "rows": []}
    assert not idle["reset"] and "routing" not in idle and "trouble" not in idle and idle["marks"] is None
    log_step(run, 3)
    run.append_event("eval", 3, eval_loss=0.5)
    run.append_event("checkpoint", 3, path="step-3")
    value, _ = live_updates.run_update(run, cursor)
    assert (value["rows"]["at"], [row[0] for row in value["rows"]["rows"]]) == (2, [3])
    assert value["evals"] == {"at": 0, "rows": [[3, 0.5]]} and value["marks"] == [[3, "checkpoint"]]
    assert value["last"]["step"] == value["routing"]["step"] == 3


def test_the_deltas_put_together_are_the_whole(run: Run) -> None:
    rows: list[Any] = []
    cursor = LiveCursor()
    for step in range(1, 3_000):
        log_step(run, step, routing=None)
        if step % 37 == 0 or step == 2_999:
            value, cursor = live_updates.run_update(run, cursor)
            rows = [] if value["reset"] else rows
            assert value["rows"]["at"] <= len(rows)
            rows[value["rows"]["at"] :] = value["rows"]["rows"]
    whole = live_updates.fetch_run("some")
    assert whole and whole["rows"]["rows"] == rows and rows[-1][0] == 2_999 and whole["reset"]


def test_another_run_and_a_run_that_went_back_start_over(run: Run) -> None:
    for step in (1, 2, 3):
        log_step(run, step)
    _, cursor = live_updates.run_update(run, LiveCursor())
    other = runs.create(RunConfig.from_dict({"name": "other", "data": {"path": "x.jsonl"}}))
    value, following = live_updates.run_update(other, cursor)
    assert value["reset"] and value["rows"]["rows"] == [] and value["last"] is None and following.run == "other"
    run.append_event("started", 2, total_steps=9, resumed_from="step-2")
    log_step(run, 3, loss=7.0)
    value, _ = live_updates.run_update(run, cursor)
    assert value["reset"] and [row[0] for row in value["rows"]["rows"]] == [1, 2, 3]
    assert value["marks"] == [[2, "resumed"]]


def test_a_layer_shows_the_experts_the_config_gives_it(run: Run) -> None:
    log_step(run, 1)
    assert live_updates.run_update(run, LiveCursor())[0]["routing"]["counts"] == [2, 4]
    found = live_updates.fetch_step_routing(["some", 1])
    assert found and (found["step"], found["counts"], found["threshold"]) == (1, [2, 4], 0.9)
    run.config_path.write_text("broken: [", encoding="utf-8")
    unreadable = Run(run.name, run.path)
    assert live_updates.step_routing(unreadable, {"step": 1, "routing": ROUTING})["counts"] is None


@pytest.mark.parametrize(
    "request_", [["some", "x"], ["no-such", 1], ["../some", 1], ["some", None], ["some", float("inf")]]
)
def test_an_odd_question_has_no_answer(run: Run, request_: list[Any]) -> None:
    log_step(run, 1)
    assert live_updates.fetch_step_routing(request_) is None
    assert live_updates.fetch_run("../some") is None


def test_a_failure_is_told_once_with_cause_advice_and_the_end_of_the_log(run: Run) -> None:
    log_step(run, 1)
    run.log_path.write_bytes(b"first\n" * 3_000 + b"  0%|  | 0/9\r 11%|# | 1/9\nTraceback: <b>bold</b>\n")
    run.append_event("failed", 1, error="Out of memory. (x)", advice="Use less.")
    value, cursor = live_updates.run_update(run, LiveCursor())
    told = value["trouble"]
    assert (told["cause"], told["advice"]) == ("Out of memory. (x)", "Use less.")
    assert told["log"].endswith("11%|# | 1/9\nTraceback: <b>bold</b>") and "  0%" not in told["log"]
    assert len(told["log"].splitlines()) == live_updates.LOG_LINES
    assert "trouble" not in live_updates.run_update(run, cursor)[0]
    run.append_event("queued", 1, device="cpu", resume=True)
    value, _ = live_updates.run_update(run, cursor)
    assert value["trouble"] is None and value["status"]["state"] == "queued"


def test_a_process_that_vanished_is_told_too(run: Run) -> None:
    log_step(run, 1)
    value, _ = live_updates.run_update(run, LiveCursor())
    assert value["status"]["state"] == "interrupted" and "Resume" in value["trouble"]["advice"]


def test_alarms_travel_with_the_newest_step(run: Run) -> None:
    collapsed = {**ROUTING, "load": [[0.5, 0.5, 0, 0], [0.97, 0.01, 0.01, 0.01]], "entropy": [0.2, 0.1]}
    for step in range(1, 10):
        log_step(run, step, routing=collapsed)
    value, cursor = live_updates.run_update(run, LiveCursor())
    assert value["alarms"] == [] and not value["watched"]
    log_step(run, 10, routing=collapsed)
    value, _ = live_updates.run_update(run, cursor)
    assert value["watched"] and [alarm["kind"] for alarm in value["alarms"]][:1] == ["collapse"]
    assert value["alarms"][0]["where"] == "Layer 2 expert 1"
    json.dumps(value)


def test_notices_travel_with_what_they_are_told_by(run: Run) -> None:
    run.append_event("data", 0, notices=["One row is left out.", 7, None])
    first, cursor = live_updates.run_update(run, LiveCursor())
    assert first["notices"] == ["One row is left out."]
    assert live_updates.run_update(run, cursor)[0]["notices"] is None
    run.append_event("finished", 9, notices=["The loss never moved from 1."])
    run.append_event("started", 0, notices=["A resumed start says it anew."])
    run.append_event("data", 0, notices="no list")
    told, _ = live_updates.run_update(run, cursor)
    assert told["notices"] == ["A resumed start says it anew.", "The loss never moved from 1."] == run.notices()
