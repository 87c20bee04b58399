"""Run folders that version 0.1.0 wrote are listed, shown, resumed, used, compared and deleted as today's are.

`tests/assets/make_runs_0_1_0.py` made them.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from app.services.listing import Listing
from mole import runs
from mole.analysis.history import History
from mole.cli import parser
from mole.core import checkpoint
from mole.training.worker import perform

ARCHIVE = Path(__file__).resolve().parents[1] / "assets" / "runs-0.1.0.zip"
STATES = {
    "finished-dynmole": "finished",
    "finished-lora": "finished",
    "killed-topk": "interrupted",
    "queued-dense": "imported",  # it cannot be told that it was queued in this home
    "stopped-adamole": "stopped",
}
FINISHED = [name for name in STATES if name.startswith("finished")]
OTHERS = [name for name in STATES if not name.startswith("finished")]
STEPS = 6

Mole = Callable[..., str]


@pytest.fixture
def mole(home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Mole]:
    """The command `mole` in a home with the runs of 0.1.0 → what it prints."""
    with zipfile.ZipFile(ARCHIVE) as archive:
        archive.extractall(home)
    monkeypatch.chdir(home)  # the paths in the runs are relative to it

    def mole(*arguments: str) -> str:
        code = parser.main(arguments)
        out, err = capsys.readouterr()
        assert code == 0, err
        return out

    yield mole


def test_they_are_listed(mole: Mole) -> None:
    rows = json.loads(mole("runs", "list", "--json"))
    assert {row["name"]: row["state"] for row in rows} == STATES
    assert {row["step"] for row in rows if row["state"] == "finished"} == {STEPS}
    assert all(row["model"] == "base" and row["router"] in row["name"] for row in rows)
    assert {row["name"]: row["state"] for row in Listing().rows()} == STATES
    assert runs.wake_queued() == []


@pytest.mark.parametrize("name", STATES)
def test_each_is_shown_with_its_curves(mole: Mole, name: str) -> None:
    shown = json.loads(mole("runs", "show", name, "--json"))
    assert shown["state"] == STATES[name] and shown["config"]["adapter"]["router"] in name
    history = History(runs.get(name))
    assert not history.advance()
    steps = [row[0] for row in history.steps.rows()]
    assert steps == list(range(1, shown["step"] + 1))
    if steps:
        assert shown["metrics"]["loss"] > 0
        assert (history.routing_at(1) is None) == ("lora" in name)


@pytest.mark.parametrize("name", OTHERS)
def test_what_had_not_ended_is_resumed_and_finished(mole: Mole, name: str) -> None:
    run = runs.get(name)
    runs.enqueue(run, resume=True)
    perform(run, resume=True)
    assert run.state == "finished", run.log_path.read_text()
    checkpoint.verify(run.adapter_dir)
    last = {event["step"]: event["loss"] for event in run.events() if event["type"] == "step"}
    assert sorted(last) == list(range(1, STEPS + 1))
    if name != "queued-dense":
        assert [event for event in run.events() if event["type"] == "started"][-1]["resumed_from"]


@pytest.mark.parametrize("name", FINISHED)
def test_the_adapters_chat_and_are_evaluated(mole: Mole, name: str, tmp_path: Path) -> None:
    trace, scores = tmp_path / "trace.json", tmp_path / "scores.json"
    mole("chat", name, "--prompt", "fig plum", "--max-new-tokens", "4", *traced(name, trace))
    mole("eval", name, "--data", "rows.jsonl", "--limit", "4", "--json", str(scores))
    result: dict[str, Any] = json.loads(scores.read_text())
    assert result["rows"] == 4 and result["metrics"]["perplexity"] > 1
    assert json.loads(mole("runs", "show", name, "--json"))["state"] == "finished"


def traced(name: str, to: Path) -> list[str]:
    return [] if "lora" in name else ["--trace", str(to)]


def test_they_are_compared_with_one_another_and_with_a_run_of_today(mole: Mole) -> None:
    config = str(runs.get("finished-dynmole").config_path)
    mole("train", "--config", config, "--name", "today")
    found = json.loads(mole("runs", "compare", *FINISHED, "stopped-adamole", "today", "--json"))
    assert {run["name"] for run in found["runs"]} == {*FINISHED, "stopped-adamole", "today"}
    losses = {run["name"]: run["metrics"]["eval_loss"] for run in found["runs"] if "stopped" not in run["name"]}
    assert losses["today"] == pytest.approx(losses["finished-dynmole"], rel=0.05)


def test_they_are_exported_and_deleted(mole: Mole, tmp_path: Path) -> None:
    mole("runs", "export", "finished-dynmole", str(tmp_path / "out.zip"))
    for name in STATES:
        mole("runs", "delete", name, "--yes")
    assert runs.list_runs() == []
