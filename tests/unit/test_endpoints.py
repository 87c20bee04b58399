"""What programs can call: these names, plain values, and our errors in one line."""

from __future__ import annotations

from pathlib import Path

import gradio as gr
import pytest

from app import endpoints, main


def test_the_public_endpoints_are_these() -> None:
    names = main.build().get_api_info()["named_endpoints"]
    assert set(names) == {"/list_runs", "/show_run", "/read_events", "/start_run", "/stop_run", "/chat"}


def test_errors_come_as_one_line(home: Path) -> None:
    with pytest.raises(gr.Error, match=r"adapter\.router is 'nope'; it must be one of: dynmole"):
        endpoints.start_run({"adapter": {"router": "nope"}})
    with pytest.raises(gr.Error, match="There is no run called 'nope'"):
        endpoints.show_run("nope")
    with pytest.raises(gr.Error, match="not allowed"):
        endpoints.stop_run("../x")
    assert endpoints.list_runs() == []


def test_on_a_space_nobody_trains(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPACE_ID", "someone/mole")
    for call in (lambda: endpoints.start_run({}), lambda: endpoints.stop_run("a")):
        with pytest.raises(gr.Error, match=r"someone/mole\?duplicate=true"):
            call()
    with pytest.raises(gr.Error, match="no such model"):
        endpoints.reply("base:/etc", "hello")
