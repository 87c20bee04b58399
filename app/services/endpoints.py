"""The studio for programs: the endpoints for `gradio_client`, with plain values in and out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import gradio as gr

from app import settings
from app.services import device_policy, run_control
from app.services.chat_targets import chat_targets, check_target
from app.services.conversation import Turn, model_messages
from app.services.engine import ENGINE, PartialReply
from app.services.messages import short_message
from mole import runs
from mole.analysis.compare import flatten
from mole.config import RunConfig, coerce
from mole.core import limits
from mole.core.errors import MoleError
from mole.mixture.steering import Steering

_T = TypeVar("_T")


def register_endpoints() -> None:
    """Register the endpoints on the page that is being built."""
    gr.api(api_list_runs, api_name="list_runs")
    gr.api(api_show_run, api_name="show_run")
    gr.api(api_read_events, api_name="read_events")
    gr.api(api_start_run, api_name="start_run", concurrency_limit=4)
    gr.api(api_stop_run, api_name="stop_run")
    gr.api(api_resume_run, api_name="resume_run", concurrency_limit=4)
    gr.api(api_continue_run, api_name="continue_run", concurrency_limit=4)
    gr.api(api_list_targets, api_name="list_targets")
    gr.api(api_chat, api_name="chat", concurrency_limit=4)


def api_list_runs() -> list[dict[str, Any]]:
    """Every run's name, state, step, total_steps, router, model and created."""
    return [run.status() for run in runs.list_runs()]


def api_show_run(name: str) -> dict[str, Any]:
    """A run's status with its config by dotted name (`"training.seed": 0`), its metrics and error."""
    details = with_api_errors(lambda: runs.get(name).details())
    return {**details, "config": flatten(details["config"])}


def api_read_events(name: str, offset: int = 0) -> dict[str, Any]:
    """The events from a byte offset on, at most about 4 MB of them, and the offset to continue from."""
    events, following = with_api_errors(
        lambda: runs.get(name).read_events(max(0, coerce(int, offset, "offset")), limits.EVENT_BYTES)
    )
    return {"events": [not_a_file(event) for event in events], "offset": following}


def not_a_file(event: dict[str, Any]) -> dict[str, Any]:
    """An event without the key `path`, because `gradio_client` would take it for a file and try to download it."""
    return {"folder" if key == "path" else key: value for key, value in event.items()}


def api_start_run(config: dict[str, Any]) -> dict[str, Any]:
    """Start a run with a config as in `run.yaml`; returns its status at once."""
    return with_api_errors(lambda: run_control.start_new_run(lambda: RunConfig.from_dict(config)).status())


def api_stop_run(name: str) -> dict[str, Any]:
    """Ask a run to save and stop; returns its status."""
    with_api_errors(lambda: run_control.stop_training(name))
    return api_show_run(name)


def api_resume_run(name: str) -> dict[str, Any]:
    """Continue a run that was stopped or failed from its last checkpoint; returns its status at once."""
    with_api_errors(lambda: run_control.resume_training(name))
    return api_show_run(name)


def api_continue_run(name: str, steps: int, schedule: str = "restart") -> dict[str, Any]:
    """Train a finished run for so many more steps, as a new run; returns that run's status at once.

    `schedule` is `restart` (warm-up and decay of the learning rate begin again) or `extend` (as if planned that long).
    """
    return with_api_errors(lambda: run_control.continue_training(name, steps, schedule).status())


def api_list_targets() -> list[dict[str, str]]:
    """What there is to chat with: `target`, as `chat` takes it, and `label`."""
    return [{"target": target, "label": label} for label, target in chat_targets()]


def api_chat(
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
        parts = ENGINE.reply(
            target,
            model_messages([Turn(message)], system),
            {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p, "seed": seed},
            steering=Steering.from_dict(steering),
            device=device_policy.reply_device(device_policy.CPU, device_policy.competing_run()),
            with_trace=True,
        )
        *_, last = (part for part in parts if isinstance(part, PartialReply))
        return {"text": last.text, "trace": last.trace}

    return with_api_errors(generate)


def with_api_errors(action: Callable[[], _T]) -> _T:
    """Run an action; a `MoleError` becomes Gradio's error, in one line."""
    try:
        return action()
    except MoleError as error:
        raise gr.Error(short_message(str(error)), print_exception=False) from None
