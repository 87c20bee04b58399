"""Bad run folders: events, records and run.yaml of any content are read past; page and command get an answer."""

from __future__ import annotations

import json
import shutil
from typing import Any

import pytest
from hostile import YAML_BITS, answer, attack, damaged, for_the_page, in_time, mole, mutated
from hypothesis import given
from hypothesis import strategies as st
from test_hostile_data import as_json

from app.services import endpoints, listing, live_updates
from app.ui.panels import live, preflight
from app.ui.tabs import runs as tab
from app.views.compare import comparison_value
from mole import runs
from mole.analysis import compare, health, tables
from mole.analysis.history import HISTORIES, History
from mole.config import RunConfig
from mole.core import locks
from mole.core.errors import InputError
from mole.evaluation import job as evaluation_job
from mole.preflight import job as preflight_job
from mole.runs.run import Run

ROUTING = {
    "layers": 2, "experts": 4, "load": [[0.4, 0.3, 0.2, 0.1]] * 2, "entropy": [0.7, 0.8], "active": [2.0, 1.5],
    "dead": [0, 1],
}  # fmt: skip
STEP = {
    "loss": 1.5, "aux_loss": 0.1, "learning_rate": 1e-3, "grad_norm": 1.0, "tokens_per_second": 900.5,
    "memory_mb": 512.0, "eta_s": 12.5, "routing": ROUTING,
}  # fmt: skip
HEAD = [
    {"time": 1e9, "type": "created", "step": 0, "router": "dynmole", "model": "tiny", "total_steps": 40, "group": "g"},
    {"time": 1e9 + 1, "type": "queued", "step": 0, "device": "cpu", "resume": False, "position": 1e9},
    {"time": 1e9 + 2, "type": "starting", "step": 0, "pid": 4711, "device": "cpu"},
    {"time": 1e9 + 3, "type": "started", "step": 0, "total_steps": 40, "resumed_from": None, "device": "cpu",
     "dtype": "float32", "trainable_parameters": 1000},
    {"time": 1e9 + 4, "type": "data", "step": 0, "fingerprint": "abc", "rows": 10},
]  # fmt: skip
STEPS = [{"time": 1e9 + 5 + step, "type": "step", "step": step, **STEP} for step in range(1, 13)]
TAIL = [
    {"time": 1e9 + 20, "type": "eval", "step": 12, "eval_loss": 1.25},
    {"time": 1e9 + 21, "type": "checkpoint", "step": 12, "path": "checkpoints/step-12"},
]
ENDS = [
    {"time": 1e9 + 22, "type": "finished", "step": 12, "metrics": {"loss": 1.0, "seconds": 10, "tokens_per_second": 9}},
    {"time": 1e9 + 22, "type": "failed", "step": 12, "error": "Out of memory.", "advice": "Use less."},
    {"time": 1e9 + 22, "type": "stopped", "step": 12},
    {"time": 1e9 + 22, "type": "queued", "step": 12, "device": "cpu", "resume": True, "position": 3.5},
]
EVENTS = [[*HEAD, *STEPS, *TAIL, end] for end in ENDS]
EVENTS += [HEAD, HEAD[:2], HEAD[:1], [*HEAD[:4], *STEPS, *HEAD[3:], *STEPS]]
EVALUATION = {
    "target": "attacked", "checkpoint": "final", "data": "/rows.jsonl", "sha256": "abc", "limit": None, "rows": 10,
    "date": "2024-01-01T00:00:00+00:00", "metrics": {"accuracy": 0.5, "perplexity": 3.0}, "seconds": 1.5, "columns": {},
}  # fmt: skip
CHECK = {"kind": "estimate", "phase": "done", "text": "", "share": 1.0, "time": 1e9}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Two runs in a home of their own, of which the first is attacked."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOLE_HOME", str(tmp_path_factory.mktemp("attacked-home")))
        made = [runs.create(RunConfig.from_dict({"name": name})) for name in ("attacked", "sound")]
        write(made[1], map(as_json, EVENTS[0]))
        yield made


def write(run: Run, lines: Any) -> None:
    run.events_path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def look(pair: list[Run]) -> None:
    """Everything that reads a run, as the commands and the page do: an answer that can be shown, or one clear line."""
    run = runs.get(pair[0].name)
    with in_time():
        assert {found.name for found in runs.list_runs()} == {one.name for one in pair}
        assert run.state in runs.STATES
        for_the_page([run.status(), run.group, run.events(), run.last_event, *runs.waiting_runs()[:0]])
        answer(lambda: runs.ahead_of(run))
        details = answer(run.details)
        if not isinstance(details, InputError):
            for_the_page(details)
            json.dumps(details, allow_nan=False)
        history = History(run)
        history.advance(9.0)
        for_the_page([history.steps.rows(), history.evals.rows(), *history.marks, *history.newest])
        for step in (0, 5, 10**9):
            for_the_page(history.routing_at(step))
        look_at_page(run)
        comparison = compare.compare([one.name for one in pair])
        json.dumps(comparison.to_dict(), allow_nan=False)
        assert tables.markdown(comparison) and tables.terminal(comparison)
        for_the_page(comparison_value(comparison))


def look_at_page(run: Run) -> None:
    """What the page is told of a run."""
    HISTORIES._known.clear()
    value, cursor = live_updates.run_update(run, live_updates.LiveCursor())
    for_the_page([value, live_updates.run_update(run, cursor)[0], live_updates.fetch_step_routing([run.name, 3])])
    assert value["status"]["state"] in runs.STATES
    for_the_page(
        [live.refresh_live(run.name, live.LiveShown())[0], listing.Listing().rows(), endpoints.api_list_runs()]
    )
    for_the_page(endpoints.api_read_events(run.name))
    for_the_page([evaluation_job.list_evaluations(run), tab.run_facts(run.name), tab.log_tail(run.name)])
    newest = list(HISTORIES.of(run).newest)
    try:
        for router in ("dynmole", "threshold", "topk", "lora"):
            config = RunConfig.from_dict({"adapter": {"router": router, "num_experts": [2, 4]}})
            health.alarms(config, newest, 13)
    finally:
        HISTORIES._known.clear()


events = st.sampled_from(EVENTS).flatmap(mutated)


@attack(60)
@given(events)
def test_events_of_wrong_kinds_are_read_past(pair: list[Run], found: list[Any]) -> None:
    write(pair[0], map(as_json, found))
    look(pair)


@attack(40)
@given(mutated(STEP, most=2), st.sampled_from([*ENDS, STEPS[0]]))
def test_a_training_of_odd_numbers_is_drawn_without_them(pair: list[Run], step: dict[str, Any], end: Any) -> None:
    steps = [{**event, **step} for event in STEPS] if isinstance(step, dict) else STEPS
    write(pair[0], map(as_json, [*HEAD, *steps, *TAIL, end]))
    look(pair)


@attack(40)
@given(st.sampled_from(EVENTS).flatmap(lambda known: damaged("\n".join(map(json.dumps, known)).encode())))
def test_events_of_damaged_bytes_are_read_past(pair: list[Run], content: bytes) -> None:
    pair[0].events_path.write_bytes(content)
    look(pair)


def test_lines_without_end_and_depth_are_read_past(pair: list[Run]) -> None:
    whole = "\n".join(map(json.dumps, EVENTS[0]))
    for line in (
        "x" * 30_000_000,
        "[" * 1_000_000,
        '{"routing":' * 300_000,
        "\x00" * 3_000_000,
        '{"eval_loss":' * 99_999,
    ):
        pair[0].events_path.write_text(f"{line}\n{whole}\n{line}\n{line}")
        look(pair)
    assert pair[0].step == 12


@attack(40)
@given(mutated(EVALUATION), mutated(CHECK), st.one_of(st.none(), damaged(json.dumps(EVALUATION).encode())))
def test_records_of_wrong_kinds_are_read_past(pair: list[Run], record: Any, check: Any, content: bytes | None) -> None:
    write(pair[0], map(as_json, EVENTS[0]))
    folder = pair[0].path / evaluation_job.FOLDER
    folder.mkdir(exist_ok=True)
    (folder / "1.json").write_bytes(as_json(record).encode() if content is None else content)
    look(pair)
    found = preflight_job.PreflightJob(runs.home() / "preflight" / "attacked")
    found.folder.mkdir(parents=True, exist_ok=True)
    (found.folder / "state.json").write_text(as_json(check))
    for_the_page(preflight.preflight_value(found))
    assert not found.alive
    (folder / "1.json").unlink()


@attack(20)
@given(
    st.one_of(
        damaged(b'{"pid": 4711, "since": 1.5, "run": "a"}'),
        st.sampled_from([b'{"pid": -1}', b'{"pid": 0}']),
    )
)
def test_a_lock_with_a_note_of_any_content_names_no_process_group(pair: list[Run], content: bytes) -> None:
    pair[0].lock_path.write_bytes(content)
    assert locks.holder(pair[0].lock_path).get("pid", 2) > 1
    for_the_page(locks.describe_holder(pair[0].lock_path)) if b"\\" not in content else None
    look(pair)


@attack(40)
@given(damaged(RunConfig().to_yaml().encode(), YAML_BITS), st.sampled_from(EVENTS))
def test_a_damaged_run_yaml_is_said_in_one_line(
    pair: list[Run], capsys: pytest.CaptureFixture[str], content: bytes, known: list[Any]
) -> None:
    whole = pair[0].config_path.read_bytes()
    try:
        pair[0].config_path.write_bytes(content)
        write(pair[0], map(as_json, known))
        look(pair)
        mole(capsys, "runs", "show", "attacked")
        mole(capsys, "runs", "show", "attacked", "--json")
    finally:
        pair[0].config_path.write_bytes(whole)


@attack(20)
@given(events)
def test_the_commands_about_a_run_of_damaged_events_answer(
    pair: list[Run], capsys: pytest.CaptureFixture[str], found: list[Any]
) -> None:
    write(pair[0], map(as_json, found))
    for arguments in (["list"], ["list", "--json"], ["show", "attacked"], ["queue"], ["compare", "attacked", "sound"]):
        assert mole(capsys, "runs", *arguments) == 0


def test_what_is_no_file_where_one_should_be(pair: list[Run]) -> None:
    for path in (pair[0].events_path, pair[0].log_path, pair[0].path / "adapter", pair[0].path / evaluation_job.FOLDER):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        if path.suffix:
            path.mkdir()
        else:
            path.write_text("no folder")
        look(pair)
        path.rmdir() if path.is_dir() else path.unlink()
    write(pair[0], map(as_json, EVENTS[0]))
    look(pair)
