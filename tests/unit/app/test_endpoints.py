"""What programs can call: these names, plain values, and our errors in one line."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import gradio as gr
import pytest
from gradio_client import utils

from app import main
from app.services import endpoints
from mole import runs
from mole.config import ModelConfig, RunConfig
from mole.core import checkpoint


def test_the_public_endpoints_are_these() -> None:
    names = main.build_page().get_api_info()["named_endpoints"]
    about_runs = {"/list_runs", "/show_run", "/read_events", "/start_run", "/stop_run", "/resume_run", "/continue_run"}
    assert set(names) == about_runs | {"/list_targets", "/chat"}


def test_no_two_handlers_wait_on_one_event() -> None:
    """Gradio repeats the whole event for one that has waited, and so these two would wake each other for ever."""
    waiting = Counter(
        target
        for handler in main.build_page().config["dependencies"]
        if handler["backend_fn"] and handler["trigger_mode"] == "always_last"
        for target in map(tuple, handler["targets"])
        if target[1] not in ("then", "load")
    )
    assert [target for target, times in waiting.items() if times > 1] == []


def test_a_reply_comes_with_its_trace(home: Path, tiny_adapter: Path) -> None:
    target = str(tiny_adapter)
    plain = endpoints.api_chat(target, "hello", max_new_tokens=5)
    trace = plain["trace"]
    assert {"router", "experts", "layers", "modules", "tokens", "prompt_tokens", "weights", "entropy", "active"} <= {
        *trace
    }
    assert (trace["router"], trace["experts"]) == ("dynmole", 3)
    assert plain["text"] == "".join(trace["tokens"][trace["prompt_tokens"] :])
    muted = endpoints.api_chat(target, "hello", max_new_tokens=5, steering={"muted": [2], "settings": {"top_p": 0.9}})
    assert not any(layer[2] for token in muted["trace"]["weights"] for layer in token)
    told = endpoints.api_chat(target, "hello", max_new_tokens=5, system="Answer in rhyme.")
    assert told["trace"]["prompt_tokens"] > trace["prompt_tokens"]
    drawn = [endpoints.api_chat(target, "hello", 12, temperature=2.0, top_p=0.99, seed=s)["text"] for s in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    with pytest.raises(gr.Error, match="steering.muted has 3; this adapter's experts are 0 to 2"):
        endpoints.api_chat(target, "hello", steering={"muted": [3]})
    with pytest.raises(gr.Error, match=r"top_p is 0\.0; it must be|top_p is 0; it must be"):
        endpoints.api_chat(target, "hello", top_p=0)


def test_the_targets_are_runs_their_checkpoints_and_bases(home: Path, tiny_adapter: Path, tiny_folder: Path) -> None:
    run = runs.create(RunConfig(name="mine", model=ModelConfig(name=str(tiny_folder))))
    for step in (2, 4):
        checkpoint.write(
            run.checkpoints_dir, step, lambda aside: shutil.copytree(tiny_adapter, aside, dirs_exist_ok=True)
        )
    run.append_event("stopped", 4)
    there = [row["target"] for row in endpoints.api_list_targets() if "demo" not in row["target"]]
    assert there == ["mine@2", "mine@4", "base:smollm2-135m"], "stopped: its checkpoints can be chatted with"
    checkpoint.write_folder(
        run.adapter_dir, lambda aside: shutil.copytree(tiny_adapter, aside, dirs_exist_ok=True), step=4
    )
    run.append_event("finished", 4, metrics={})
    there = [row["target"] for row in endpoints.api_list_targets() if "demo" not in row["target"]]
    assert there == ["mine", "mine@2", "base:smollm2-135m", f"base:{tiny_folder}"]
    assert endpoints.api_chat("mine@2", "hello", max_new_tokens=2)["trace"]["router"] == "dynmole"


def test_errors_come_as_one_line(home: Path) -> None:
    with pytest.raises(gr.Error, match=r"adapter\.router is 'nope'; it must be one of: dynmole"):
        endpoints.api_start_run({"adapter": {"router": "nope"}})
    with pytest.raises(gr.Error, match="There is no run called 'nope'"):
        endpoints.api_show_run("nope")
    with pytest.raises(gr.Error, match="not allowed"):
        endpoints.api_stop_run("../x")
    assert endpoints.api_list_runs() == []


def test_on_a_space_nobody_trains(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPACE_ID", "someone/mole")
    for call in (
        lambda: endpoints.api_start_run({}),
        lambda: endpoints.api_stop_run("a"),
        lambda: endpoints.api_resume_run("a"),
        lambda: endpoints.api_continue_run("a", 4),
    ):
        with pytest.raises(gr.Error, match=r"someone/mole\?duplicate=true"):
            call()
    with pytest.raises(gr.Error, match="no such model"):
        endpoints.api_chat("base:/etc", "hello")


def test_nothing_that_is_answered_looks_like_a_file_to_fetch(home: Path) -> None:
    run = runs.create(RunConfig.from_dict({"name": "mine", "data": {"path": "rows.jsonl"}}))
    run.append_event("checkpoint", 20, path="step-20")
    details, news = endpoints.api_show_run("mine"), endpoints.api_read_events("mine")
    assert not [part for part in (details["config"], *news["events"]) if utils.is_file_obj(part)]
    assert details["config"]["data.path"].endswith("rows.jsonl") and news["events"][-1]["folder"] == "step-20"
