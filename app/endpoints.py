"""The studio for programs: what `gradio_client` can call, with plain values in and out."""

from __future__ import annotations

from typing import Any

import gradio as gr

from app import settings
from app.engine import ENGINE
from app.tabs import chat, train
from mole import runs
from mole.config import RunConfig
from mole.errors import MoleError


def build() -> None:
    """Register the endpoints on the page that is being built."""
    gr.api(list_runs, api_name="list_runs")
    gr.api(show_run, api_name="show_run")
    gr.api(read_events, api_name="read_events")
    gr.api(start_run, api_name="start_run", concurrency_limit=4)
    gr.api(stop_run, api_name="stop_run")
    gr.api(reply, api_name="chat", concurrency_limit=1, concurrency_id="model")


def list_runs() -> list[dict[str, Any]]:
    """Every run's name, state, step, total_steps, router, model and created."""
    return [run.status() for run in runs.list_runs()]


def show_run(name: str) -> dict[str, Any]:
    """A run's status with its config, metrics and error."""
    return answered(lambda: runs.get(name).details())


def read_events(name: str, offset: int = 0) -> dict[str, Any]:
    """The events from a byte offset on, and the offset to ask for next."""
    events, following = answered(lambda: runs.get(name).read_events(int(offset)))
    return {"events": events, "offset": following}


def start_run(config: dict[str, Any]) -> dict[str, Any]:
    """Start a run with a config as in `run.yaml`; returns its status at once."""
    return answered(lambda: runs.get(train.begin_run(lambda: RunConfig.from_dict(config))).status(), training=True)


def stop_run(name: str) -> dict[str, Any]:
    """Ask a run to save and stop; returns its status."""
    answered(lambda: runs.stop(runs.get(name)), training=True)
    return show_run(name)


def reply(target: str, message: str, max_new_tokens: int = 128, temperature: float = 0.0) -> dict[str, Any]:
    """Answer one message: `text`, and the routing as the page's bytes in base64 (`Reel.since`)."""
    chosen = {"max_new_tokens": int(max_new_tokens), "temperature": float(temperature)}

    def say() -> dict[str, Any]:
        chat.check_allowed(target)
        *_, last = ENGINE.say(target, [{"role": "user", "content": message}], chosen, lambda: False)
        return {"text": last.text, "routing": last.reel.since(0)}

    return answered(say)


def answered(action: Any, training: bool = False) -> Any:
    """Do it; an error of ours becomes Gradio's, with its one line."""
    try:
        if training:
            settings.forbid_on_space()
        return action()
    except MoleError as error:
        raise gr.Error(str(error), print_exception=False) from None
