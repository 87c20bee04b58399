"""The list of runs: what a row says, what a page is told, and that a thousand runs are no burden."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from app.services import listing
from app.services.listing import ListCursor, Listing
from mole import runs
from mole.analysis.atlas.job import record_atlas
from mole.config import RunConfig
from mole.core import locks
from mole.evaluation import job as evaluation_job
from mole.runs.run import Run

LAYERS, EXPERTS = 30, 8


def routing() -> dict[str, Any]:
    """A step's routing as a model of thirty layers writes it."""
    row = [1 / EXPERTS] * EXPERTS
    layer = {"load": row, "entropy": 0.5, "active": 2.0, "dead": 0}
    return {"layers": LAYERS, "experts": EXPERTS, **{key: [value] * LAYERS for key, value in layer.items()}}


def finished_run(name: str, steps: int = 32, group: str | None = None) -> Run:
    """A run with the events of a short training and the manifest of an adapter."""
    run = runs.create(RunConfig.from_dict({"name": name, "group": group, "training": {"max_steps": steps}}))
    run.append_event("started", 0, total_steps=steps)
    run.append_event("data", 0, rows=1568, eval_rows=32)
    for step in range(1, steps + 1):
        run.append_event("step", step, loss=2 / step, tokens_per_second=140.0, eta_s=10.0, routing=routing())
    run.append_event("eval", steps, eval_loss=0.25)
    run.append_event("finished", steps, metrics={"loss": 0.1, "eval_loss": 0.25, "tokens_per_second": 150.0})
    run.adapter_dir.mkdir()
    (run.adapter_dir / "manifest.json").write_text("{}", encoding="utf-8")
    return run


def rows_of(value: dict[str, Any] | None) -> dict[str, dict[str, Any]]:
    assert value is not None
    return {row["name"]: row for row in value["rows"]}


@pytest.fixture
def looked(home: Path) -> Iterator[Listing]:
    yield Listing()


def test_a_row_is_the_status_with_group_speed_and_held_out_loss(looked: Listing) -> None:
    run = finished_run("done", group="grid")
    row = rows_of(looked.since(ListCursor())[0])["done"]
    told = {"group": "grid", "speed": 150.0, "ends": None, "loss": 0.25, "score": None, "atlases": []}
    assert row == {**run.status(), **told}


def test_a_running_run_tells_when_it_ends(looked: Listing) -> None:
    run = runs.create(RunConfig.from_dict({"name": "going", "training": {"max_steps": 9}}))
    with run.lock():
        run.append_event("starting", 0)
        run.append_event("step", 3, loss=1.0, tokens_per_second=99.0, eta_s=60.0)
        run.append_event("checkpoint", 3, path="step-3")
        row = rows_of(looked.since(ListCursor())[0])["going"]
        assert row["state"] == "running" and row["step"] == 3 and row["speed"] == 99.0
        assert row["ends"] == pytest.approx(time.time() + 60, abs=5)


def test_the_lowest_of_all_held_out_losses_is_shown_also_when_they_come_in_pieces(
    looked: Listing, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listing, "READ_AT_ONCE", 10_000)
    run = finished_run("many", steps=16)
    for step, loss in ((17, 0.2), (18, 0.125), (19, None), (20, 0.5)):
        run.append_event("eval", step, eval_loss=loss)
    cursor = ListCursor()
    for _ in range(40):
        _, cursor = looked.since(cursor, at_once=True)
    assert (looked.row("many") or {})["loss"] == 0.125
    run.append_event("eval", 21, eval_loss=0.0625)
    assert rows_of(looked.since(cursor, at_once=True)[0])["many"]["loss"] == 0.0625


def test_an_atlas_that_is_kept_with_a_run_is_told_with_the_next_look(looked: Listing) -> None:
    finished_run("done")
    _, cursor = looked.since(ListCursor())
    record_atlas("done", {"data": "rows.jsonl", "sha256": "", "rows": 2, "tokens": 9, "muting": None}, [], None, 1.0)
    assert rows_of(looked.since(cursor, at_once=True)[0])["done"]["atlases"] == [1]


def test_the_newest_evaluation_that_measured_one_gives_the_score(looked: Listing) -> None:
    run = finished_run("done")
    _, cursor = looked.since(ListCursor())
    for metrics in ({"exact_match": 0.25, "perplexity": 2.0}, {"exact_match": 0.75}, {"perplexity": 1.5}):
        evaluation_job.record_evaluation("done", {"rows": 4, "metrics": metrics, "data": "rows.jsonl"}, None, "", 1.0)
    row = rows_of(looked.since(cursor, at_once=True)[0])[run.name]
    assert row["score"] == {"kind": "exact_match", "value": 0.75}


def test_a_page_is_told_only_what_changed(looked: Listing) -> None:
    first, second = finished_run("first"), finished_run("second")
    value, cursor = looked.since(ListCursor())
    assert value is not None and value["reset"] and set(rows_of(value)) == {"first", "second"}
    assert looked.since(cursor, at_once=True) == (None, cursor)

    second.append_event("eval", 33, eval_loss=0.01)
    value, after = looked.since(cursor, at_once=True)
    assert value is not None and not value["reset"] and set(rows_of(value)) == {"second"}

    runs.delete(first)
    value, last = looked.since(after, at_once=True)
    assert value is not None and (value["rows"], value["gone"]) == ([], ["first"])
    value, _ = looked.since(cursor, at_once=True)  # a page that missed both
    assert value is not None and set(rows_of(value)) == {"second"} and value["gone"] == ["first"]

    finished_run("first")
    value, _ = looked.since(last, at_once=True)
    assert value is not None and set(rows_of(value)) == {"first"} and value["gone"] == []


def test_a_lock_taken_or_let_go_changes_the_row_though_no_event_is_written(looked: Listing) -> None:
    run = runs.create(RunConfig.from_dict({"name": "killed"}))
    run.append_event("step", 1, loss=1.0)
    lock = locks.acquire(run.lock_path)
    assert lock is not None
    value, cursor = looked.since(ListCursor())
    assert rows_of(value)["killed"]["state"] == "running"
    lock.release()
    assert rows_of(looked.since(cursor, at_once=True)[0])["killed"]["state"] == "interrupted"


def test_another_run_under_the_same_name_is_told_anew(looked: Listing) -> None:
    run = finished_run("again")
    _, cursor = looked.since(ListCursor())
    runs.delete(run)
    runs.create(RunConfig.from_dict({"name": "again", "adapter": {"router": "topk"}}))
    row = rows_of(looked.since(cursor, at_once=True)[0])["again"]
    assert (row["state"], row["router"], row["loss"]) == ("queued", "topk", None)


def test_what_is_no_run_is_left_out(looked: Listing, home: Path) -> None:
    finished_run("good")
    (home / "runs" / "empty").mkdir()
    (home / "runs" / ".new-half").mkdir()
    (home / "runs" / "file").write_text("", encoding="utf-8")
    assert set(rows_of(looked.since(ListCursor())[0])) == {"good"}


@pytest.mark.timed
def test_a_thousand_runs_are_listed_in_a_second_and_looked_at_again_in_a_tenth(looked: Listing, home: Path) -> None:
    model = finished_run("run-0000")
    assert model.events_path.stat().st_size > 50_000, "the events must be as long as real ones"
    lines = model.events_path.read_text(encoding="utf-8")
    assert len(lines.splitlines()) >= 35 and json.loads(lines.splitlines()[10])["routing"]["layers"] == LAYERS
    for number in range(1, 1000):
        shutil.copytree(model.path, home / "runs" / f"run-{number:04d}")
    begun = time.process_time()
    value, cursor = looked.since(ListCursor())
    first = time.process_time() - begun
    assert len(rows_of(value)) == 1000
    begun = time.process_time()
    assert looked.since(cursor, at_once=True) == (None, cursor)
    steady = time.process_time() - begun
    assert first < 1.0 and steady < 0.1, (first, steady)
