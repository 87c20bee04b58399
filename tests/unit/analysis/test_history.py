"""A run's past: read a slice at a time, kept small, and never wrong about what is in the events."""

from __future__ import annotations

import gc
import json
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from app.services import live_updates
from mole.analysis.history import MAX_CURVE_ROWS, RECENT, STEP_COLUMNS, Histories, History, StepOffsets
from mole.runs.event_reader import parse_without_routing
from mole.runs.run import Run

LAYERS, EXPERTS = 30, 8
COLUMN = {name: place for place, name in enumerate(STEP_COLUMNS)}


def routing(step: int, layers: int = LAYERS, experts: int = EXPERTS) -> dict[str, Any]:
    """Statistics of the real size that carry the step they belong to."""
    load = [[round(1 / experts + (step % 97) * 1e-5, 4)] * experts for _ in range(layers)]
    values = {"entropy": [round(step % 1000 / 1000, 4)] * layers, "active": [2.0] * layers, "dead": [0] * layers}
    return {"layers": layers, "experts": experts, "load": load, **values}


def step_line(step: int, loss: float | None = None, routed: dict[str, Any] | None = None) -> str:
    """A `step` event as `mole.training.callbacks` writes it."""
    event = {
        "time": 1_700_000_000.0 + step, "type": "step", "step": step, "loss": 1 / step if loss is None else loss,
        "aux_loss": 0.0109, "learning_rate": 1e-3, "grad_norm": 0.92, "tokens_per_second": 119.0,
        "memory_mb": 4384.4, "eta_s": 213.2, "routing": routed,
    }  # fmt: skip
    return json.dumps(event)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A run's folder with nothing in it."""
    return Run("some", tmp_path)


def write(run: Run, *lines: str) -> None:
    with run.events_path.open("a", encoding="utf-8") as file:
        file.writelines(f"{line}\n" for line in lines)


def read(run: Run) -> History:
    """All of it."""
    history = History(run)
    while history.advance():
        pass
    return history


def column(history: History, name: str) -> list[Any]:
    return [row[COLUMN[name]] for row in history.steps.rows()]


def test_a_short_run_is_there_point_by_point(run: Run) -> None:
    for step in range(1, 41):
        run.append_event("step", step, loss=1 / step, learning_rate=0.1 * step, routing=routing(step, 2, 4))
        if step % 10 == 0:
            run.append_event("eval", step, eval_loss=step / 100)
            run.append_event("checkpoint", step, path=f"step-{step}")
    history = read(run)
    assert column(history, "step") == list(range(1, 41))
    assert column(history, "loss") == column(history, "loss_low") == [1 / step for step in range(1, 41)]
    assert column(history, "learning_rate") == [0.1 * step for step in range(1, 41)]
    assert column(history, "grad_norm") == [None] * 40
    assert history.evals.rows() == [[step, step / 100] for step in (10, 20, 30, 40)]
    assert list(history.marks) == [[step, "checkpoint"] for step in (10, 20, 30, 40)]
    assert [event["step"] for event in history.newest] == list(range(41 - RECENT, 41))
    assert history.newest[-1]["routing"] == routing(40, 2, 4)


def test_a_long_run_keeps_its_last_point_its_extremes_and_its_mean(run: Run) -> None:
    losses = [2 + math.sin(step) / step for step in range(1, 20_001)]
    losses[13_336] = 99.0
    write(run, *(step_line(step, loss) for step, loss in enumerate(losses, 1)))
    history = read(run)
    counts, means = column(history, "count"), column(history, "loss")
    assert MAX_CURVE_ROWS / 2 <= len(counts) <= MAX_CURVE_ROWS
    assert sum(counts) == 20_000 and column(history, "step")[-1] == 20_000
    assert max(column(history, "loss_high")) == 99.0 and min(column(history, "loss_low")) == min(losses)
    assert sum(c * m for c, m in zip(counts, means, strict=True)) / 20_000 == pytest.approx(sum(losses) / 20_000)
    steps = column(history, "step")
    assert steps == sorted(set(steps))


def test_reading_as_it_grows_is_reading_it_at_once(run: Run) -> None:
    grown = History(run)
    for step in range(1, 3_001):
        write(run, step_line(step))
        if step % 7 == 0:
            grown.advance()
    grown.advance()
    whole = read(run)
    assert grown.steps.rows() == whole.steps.rows()
    assert list(grown.newest) == list(whole.newest)


def test_a_line_that_is_still_written_waits_and_garbage_is_passed_over(run: Run) -> None:
    half = step_line(3, routed=routing(3))
    write(run, step_line(1), "not json", '{"type": "step"}', "[1, 2]", "\x00")
    write(
        run,
        '{"time": 1, "type": "step", "step": -4}',
        '{"time": 1, "type": "step", "step": 1e400}',
        "[" * 100_000,
        step_line(2),
    )
    with run.events_path.open("a") as file:
        file.write(half[:900])
    history = read(run)
    assert column(history, "step") == [1, 2] and [event["step"] for event in history.newest] == [1, 2]
    with run.events_path.open("a") as file:
        file.write(half[900:] + "\n")
    history.advance()
    assert column(history, "step") == [1, 2, 3] and history.newest[-1]["routing"] == routing(3)


def test_values_that_are_no_numbers_are_gaps(run: Run) -> None:
    odd = '{"time": 1, "type": "step", "step": %d, "loss": %s, "routing": %s}'
    values = ("NaN", "Infinity", '"<b>"', "[]", "null", "1" + "0" * 400)
    write(run, *(odd % (step, value, '{"layers": 2}') for step, value in enumerate(values, 1)))
    history = read(run)
    assert column(history, "loss") == [None] * 6
    assert [event["routing"] for event in history.newest] == [None] * 6 and history.routing_at(3) is None


@pytest.mark.parametrize("change", ["shorter", "another file", "another run of the same size"])
def test_a_file_that_is_not_the_same_any_more_starts_over(run: Run, change: str) -> None:
    write(run, *(step_line(step, routed=routing(step)) for step in range(1, 31)))
    history, before = read(run), run.events_path.read_text(encoding="utf-8")
    generation = history.generation
    if change == "another file":
        run.events_path.rename(run.path / "old")
        write(run, *(step_line(step + 1) for step in range(1, 60)))
    else:
        kept = 10 if change == "shorter" else 30
        other = before.replace("17000000", "18000000").splitlines(keepends=True)[:kept]
        run.events_path.write_text("".join(other), encoding="utf-8")
    history.advance()
    assert history.generation != generation
    assert history.steps.rows() == read(run).steps.rows() and list(history.newest) == list(read(run).newest)


def test_a_run_that_disappears_leaves_nothing(run: Run) -> None:
    write(run, step_line(1))
    history = read(run)
    run.events_path.unlink()
    assert not history.advance()
    assert history.steps.rows() == [] and not history.newest and history.routing_at(1) is None


def test_what_was_trained_past_the_checkpoint_is_forgotten_on_resume(run: Run) -> None:
    run.append_event("started", 0, total_steps=9, resumed_from=None)
    for step in (1, 2, 3, 4, 5):
        run.append_event("step", step, loss=1.0, routing=routing(step, 2, 4))
    run.append_event("checkpoint", 3, path="step-3")
    run.append_event("eval", 5, eval_loss=0.5)
    history = read(run)
    generation = history.generation
    run.append_event("started", 3, total_steps=9, resumed_from="step-3")
    run.append_event("step", 4, loss=2.0, routing=routing(40, 2, 4))
    history.advance()
    assert column(history, "step") == [1, 2, 3, 4] and column(history, "loss")[-1] == 2.0
    assert history.generation != generation and history.evals.rows() == []
    assert list(history.marks) == [[3, "checkpoint"], [3, "resumed"]]
    assert [event["step"] for event in history.newest] == [1, 2, 3, 4]
    assert history.routing_at(5) == {"step": 4, "routing": routing(40, 2, 4)}


# Routing on demand


def test_the_routing_of_the_nearest_logged_step_is_read(run: Run) -> None:
    write(run, *(step_line(step, routed=routing(step)) for step in range(10, 1_010, 10)))
    history = read(run)
    for asked, nearest in ((0, 10), (10, 10), (14, 10), (16, 20), (505, 500), (777, 780), (10**9, 1_000)):
        assert history.routing_at(asked) == {"step": nearest, "routing": routing(nearest)}


def test_before_the_past_is_read_the_newest_step_is_known(run: Run) -> None:
    write(run, *(step_line(step, routed=routing(step)) for step in range(1, 2_001)))
    history = History(run)
    assert history.advance(budget_s=0)
    assert history.share < 0.5 and history.newest[-1]["step"] == 2_000
    assert history.routing_at(2_000) == {"step": 2_000, "routing": routing(2_000)}


def test_of_very_many_steps_evenly_spaced_places_are_kept() -> None:
    places = StepOffsets(most=64)
    for step in range(1, 10_001):
        places.add(step, 3 * step)
    assert len(places.steps) < 64 and places.stride == 256
    for step in (1, 5_000, 10_000):
        found = places.nearest(step)
        assert found is not None and abs(found / 3 - step) <= places.stride


@pytest.mark.parametrize(
    "line",
    [
        step_line(5, routed=routing(5)),
        step_line(5, routed=None),
        '{"routing": {"layers": 1}, "time": 1, "type": "step", "step": 5, "loss": 2}',
        '{"time": 1, "type": "step", "step": 5, "routing": {"layers": 1}, "loss": 2}',
        '{"time": 1, "type": "step", "step": 5, "routing": null, "loss": 2}',
        '{"time": 1, "type": "step", "step": 5, "routing": 7, "loss": {"a": 2}}',
        '{"time": 1, "type": "step", "step": 5, "routing": {"layers": {"a": 2}}, "loss": 2}',
        '{"time": 1, "type": "step", "inner": {"routing": {}}, "step": 5}',
        '{"time": 1, "type": "failed", "step": 5, "error": "a \\"routing\\": {}"}',
        '{"time": 1, "type": "step", "step": 5,"routing":{"layers":1}}',
        '{"time": 1, "type": "step", "step": 5, "routing": {"layers": 1',
        '{"time": 1, "type": "step", "step": 5, "loss": 0.1, "rout',
        "{}",
    ],
)
def test_cutting_the_routing_off_reads_the_same_as_parsing_everything(line: str) -> None:
    event, routed = parse_without_routing(line.encode())
    try:
        whole = json.loads(line)
    except ValueError:
        whole = {}
    given = whole.pop("routing", None)
    assert event == (whole if "step" in whole else None)
    assert routed == (bool(given) and event is not None)


def test_only_the_last_used_histories_are_kept(tmp_path: Path) -> None:
    histories = Histories(keep=2)
    runs = [Run(name, tmp_path / name) for name in "abc"]
    first = [histories.of(run) for run in runs]
    assert histories.of(runs[2]) is first[2] and histories.of(runs[1]) is first[1]
    assert histories.of(runs[0]) is not first[0]


# Cost


@pytest.fixture(scope="module")
def long_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """100,000 logged steps of 30 layers × 8 experts, with held-out losses and checkpoints: about 280 MB."""
    run = Run("long", tmp_path_factory.mktemp("long"))
    tails = [step_line(1, routed=routing(step)).partition('"learning_rate"')[2] for step in range(100)]
    with run.events_path.open("w", encoding="utf-8") as file:
        file.write('{"time": 1.5, "type": "created", "step": 0, "router": "topk", "model": "m"}\n')
        for step in range(1, 100_001):
            head = f'{{"time": {step}.5, "type": "step", "step": {step}, "loss": {1 + 1 / step:.6f}, "learning_rate"'
            file.write(f"{head}{tails[step % 100]}\n")
            if step % 500 == 0:
                file.write(f'{{"time": {step}.6, "type": "eval", "step": {step}, "eval_loss": {2 / step}}}\n')
    return run


@pytest.fixture
def no_garbage_of_others() -> Iterator[None]:
    """What earlier tests have left is not looked through by the garbage collector in the middle of a measurement."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.timed
def test_no_look_at_100_000_steps_takes_100_ms(
    long_run: Run, monkeypatch: pytest.MonkeyPatch, no_garbage_of_others: None
) -> None:
    """CPU time of this thread, so that neither a busy machine nor an earlier test can fail it; `whole` looks
    are those of a page that has just been opened."""
    monkeypatch.setattr(live_updates, "HISTORIES", Histories())
    assert os.path.getsize(long_run.events_path) > 250_000_000
    costs: list[float] = []

    def look(cursor: live_updates.LiveCursor) -> tuple[dict[str, Any], live_updates.LiveCursor]:
        began = time.thread_time()
        value, following = live_updates.run_update(long_run, cursor)
        json.dumps(value)
        costs.append(time.thread_time() - began)
        return value, following

    value, cursor = look(live_updates.LiveCursor())
    assert value["last"]["step"] == 100_000 and value["routing"]["step"] == 100_000, "the newest state at once"
    while value["reading"] is not None:
        value, cursor = look(cursor)
    reading = len(costs)
    for _ in range(20):
        value, cursor = look(cursor)
        assert value["rows"]["rows"] == [] or len(value["rows"]["rows"]) == 1, "only what is new travels"
    for _ in range(5):
        value, _ = look(live_updates.LiveCursor())
    assert len(value["rows"]["rows"]) <= MAX_CURVE_ROWS + 1 and value["rows"]["rows"][-1][0] == 100_000
    assert sum(row[COLUMN["count"]] for row in value["rows"]["rows"]) == 100_000
    median = sorted(costs[reading : reading + 20])[10]
    print(f"\n{reading} looks to read all, longest {max(costs):.3f} s; steady {median:.4f} s of CPU")
    assert max(costs) < 0.1 and median < 0.02


@pytest.mark.timed
def test_any_step_of_100_000_is_found_in_one_read(long_run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    history = read(long_run)
    began = time.process_time()
    found = [history.routing_at(step) for step in range(1, 100_000, 1_000)]
    assert (time.process_time() - began) / len(found) < 0.02
    assert [each and each["step"] for each in found] == list(range(1, 100_000, 1_000))
