"""The studio for programs: what `gradio_client` can call, with plain values in and out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import gradio as gr

from app import settings
from app.services import device_policy, run_control
from app.services.chat_targets import chat_targets, check_target
from app.services.conversation import Turn, model_messages
from app.services.engine import ENGINE
from app.services.messages import short_message
from mole import runs
from mole.analysis.compare import flatten
from mole.config import RunConfig, coerce
from mole.core.errors import MoleError
from mole.mixture.steering import Steering

T = TypeVar("T")


def build() -> None:
    """Register the endpoints on the page that is being built."""
    gr.api(list_runs, api_name="list_runs")
    gr.api(show_run, api_name="show_run")
    gr.api(read_events, api_name="read_events")
    gr.api(start_run, api_name="start_run", concurrency_limit=4)
    gr.api(stop_run, api_name="stop_run")
    gr.api(resume_run, api_name="resume_run", concurrency_limit=4)
    gr.api(list_targets, api_name="list_targets")
    gr.api(reply, api_name="chat", concurrency_limit=4)


def list_runs() -> list[dict[str, Any]]:
    """Every run's name, state, step, total_steps, router, model and created."""
    return [run.status() for run in runs.list_runs()]


def show_run(name: str) -> dict[str, Any]:
    """A run's status with its config by dotted name (`"training.seed": 0`), its metrics and error."""
    details = answered(lambda: runs.get(name).details())
    return {**details, "config": flatten(details["config"])}


def read_events(name: str, offset: int = 0) -> dict[str, Any]:
    """The events from a byte offset on, and the offset to ask for next."""
    events, following = answered(lambda: runs.get(name).read_events(max(0, coerce(int, offset, "offset"))))
    return {"events": [not_a_file(event) for event in events], "offset": following}


def not_a_file(event: dict[str, Any]) -> dict[str, Any]:
    """An event without the key `path`: `gradio_client` takes whatever has one for a file, and tries to fetch it."""
    return {"folder" if key == "path" else key: value for key, value in event.items()}


def start_run(config: dict[str, Any]) -> dict[str, Any]:
    """Start a run with a config as in `run.yaml`; returns its status at once."""
    return answered(lambda: run_control.start_new_run(lambda: RunConfig.from_dict(config)).status())


def stop_run(name: str) -> dict[str, Any]:
    """Ask a run to save and stop; returns its status."""
    answered(lambda: run_control.stop_training(name))
    return show_run(name)


def resume_run(name: str) -> dict[str, Any]:
    """Go on with a run that was stopped or failed, from its last checkpoint; returns its status at once."""
    answered(lambda: run_control.resume_training(name))
    return show_run(name)


def list_targets() -> list[dict[str, str]]:
    """What there is to chat with: `target`, as `chat` takes it, and `label`."""
    return [{"target": target, "label": label} for label, target in chat_targets()]


def reply(
    target: str,
    message: str,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    system: str = "",
    steering: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Answer one message: `text`, and `trace`, the routing as `mole chat --trace` writes it.

    `steering` changes the routing of this reply: `{"settings": {"top_p": 0.5}, "muted": [1], "pinned": []}`, experts
    counted from 0. While a run trains on the GPU the reply is computed on the CPU.
    """

    def generate() -> dict[str, Any]:
        check_target(target)
        settings.check_asked(message, system, max_new_tokens)
        *_, last = ENGINE.reply(
            target,
            model_messages([Turn(message)], system),
            {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p, "seed": seed},
            steering=Steering.from_dict(steering),
            device=device_policy.reply_device(device_policy.CPU, device_policy.competing_run()),
        )
        return {"text": last.text, "trace": last.trace_json()}

    return answered(generate)


def answered(action: Callable[[], T]) -> T:
    """Do it; an error of ours becomes Gradio's, with its one line."""
    try:
        return action()
    except MoleError as error:
        raise gr.Error(short_message(str(error)), print_exception=False) from None
