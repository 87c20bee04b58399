"""The Chat tab: a conversation with the base model or a finished run, and beside it the routing of every token."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from app import settings
from app.engine import ENGINE, STOPS, Saying
from app.live import QUIET
from app.routing_view import routing_view
from mole import runs
from mole.config import ModelConfig
from mole.errors import InputError, ModelError, MoleError

BASE = f"base:{ModelConfig().name}"
SHOW_EVERY = 0.04
"""Seconds between two updates of the page at least: faster than this nobody reads, and the browser falls behind."""
PLACEHOLDER = "### Ask something\nChoose an example, or write your own. The routing beside it moves with every token."


@dataclass
class ChatTab:
    """What the other tabs and the page's start need of this one."""

    target: gr.Dropdown
    touched: gr.State
    """Whether the person chose the target, so that the page does not choose for them any more."""


def build() -> ChatTab:
    """Make the tab's components and handlers where we stand in the layout."""
    with gr.Row(elem_classes="two-columns"):
        with gr.Column(scale=11, min_width=320, elem_classes="card"):
            target = gr.Dropdown(
                choices=[("Base model", BASE)],
                value=BASE,
                label="Chat with",
                info="A finished run, or the base model alone.",
                allow_custom_value=not settings.space_id(),
                elem_id="target",
            )
            chatbot = gr.Chatbot(
                show_label=False,
                height=430,
                allow_tags=False,
                sanitize_html=True,
                layout="bubble",
                buttons=["copy"],
                feedback_options=None,
                placeholder=PLACEHOLDER,
                examples=examples(),  # type: ignore[arg-type]
                elem_id="chatbot",
            )
            status = gr.Markdown("", elem_classes=["quiet", "chat-status"], elem_id="chat-status")
            message = gr.Textbox(
                label="Message",
                show_label=False,
                placeholder="Write a message",
                submit_btn=True,
                lines=1,
                max_lines=8,
                container=False,
                elem_id="message",
            )
            with gr.Row(elem_classes="buttons"):
                stop = gr.Button("Stop", size="md", visible=False, elem_id="chat-stop")
                again = gr.Button("New conversation", size="md", elem_id="chat-new")
            options = build_options()
        with gr.Column(scale=12, min_width=320, elem_classes=["card", "sticky"]):
            view = routing_view(elem_id="routing-view")
    wire(target, chatbot, status, message, stop, again, options, view)
    touched = gr.State(False)
    target.input(lambda: True, None, touched, queue=False, **QUIET)
    return ChatTab(target, touched)


def build_options() -> list[Any]:
    """System prompt, length, temperature, top-p and seed; in the order `settings_of` takes them."""
    with gr.Accordion("Options", open=False, elem_classes="accordion-card", elem_id="chat-options"):
        system = gr.Textbox(label="System prompt", info="Empty: the model's own.", lines=2)
        with gr.Row():
            length = gr.Slider(1, 1024, value=128, step=1, label="Longest reply", info="In tokens.", buttons=[])
            temperature = gr.Slider(
                0, 2, value=0.0, step=0.05, label="Temperature", info="0 takes the likeliest token.", buttons=[]
            )
        with gr.Row():
            top_p = gr.Slider(
                0.05, 1, value=1.0, step=0.05, label="Top p", info="Of the tokens drawn among.", buttons=[]
            )
            seed = gr.Number(0, precision=0, label="Seed", info="The same seed draws the same reply.")
    return [system, length, temperature, top_p, seed]


def examples() -> list[dict[str, str]]:
    """One prompt of each skill in the held-out sample data."""
    path = settings.sample("skills_heldout.jsonl")
    found: dict[str, str] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path else ():
        row = json.loads(line)
        found.setdefault(row["skill"], row["prompt"])
    return [{"text": prompt, "display_text": prompt} for prompt in found.values()]


def targets() -> list[tuple[str, str]]:
    """What there is to chat with: the finished runs, the newest first, and the base models they stand on."""
    finished = [run.status() for run in reversed(runs.list_runs()) if run.state == "finished"]
    bases = dict.fromkeys([ModelConfig().name, *(status["model"] for status in finished)])
    adapters = [(f"{status['name']} · {status['router']}", status["name"]) for status in finished]
    return [*adapters, *((f"Base model: {Path(base).name}", f"base:{base}") for base in bases)]


def refreshed(chosen: str, touched: bool) -> Any:
    """The targets as they are now; the choice stays if somebody made it, else the newest run is it."""
    known = targets()
    values = [value for _, value in known]
    keep = touched and (chosen in values or not settings.space_id())
    return gr.Dropdown(choices=known, value=chosen if keep else values[0])


def wire(
    target: gr.Dropdown, chatbot: gr.Chatbot, status: gr.Markdown, message: gr.Textbox,
    stop: gr.Button, again: gr.Button, options: list[Any], view: gr.HTML,
) -> None:  # fmt: skip
    """Sending, stopping, starting anew. A reply is written by one handler at a time, whoever asks."""
    asked = message.submit(ask, [message, chatbot], [message, chatbot, stop], queue=False, **QUIET)
    picked = chatbot.example_select(pick, chatbot, [message, chatbot, stop], queue=False, **QUIET)
    for event in (asked, picked):
        answered = event.then(
            respond,
            [chatbot, target, *options],
            [chatbot, view, status],
            concurrency_limit=1,
            concurrency_id="model",
            **QUIET,
        )
        answered.then(ready, None, [message, stop], queue=False, **QUIET)
    stop.click(ask_to_stop, None, None, queue=False, **QUIET)
    again.click(start_anew, None, [chatbot, view, status], queue=False, **QUIET)


def ask(text: str, history: list[Any]) -> tuple[Any, list[Any], Any]:
    """Put the message into the conversation, and keep the next one out until it is answered."""
    if not text.strip():
        return gr.skip(), history, gr.skip()
    return waiting([*history, {"role": "user", "content": text}])


def pick(history: list[Any], event: gr.SelectData) -> tuple[Any, list[Any], Any]:
    """Ask the chosen example."""
    return waiting([*history, {"role": "user", "content": event.value["text"]}])


def waiting(history: list[Any]) -> tuple[Any, list[Any], Any]:
    """Message box, conversation and Stop button while a reply is written."""
    return gr.Textbox(value="", interactive=False), history, gr.Button(visible=True)


def ready() -> tuple[Any, Any]:
    """Message box and Stop button when it is the person's turn."""
    return gr.Textbox(interactive=True), gr.Button(visible=False)


def start_anew() -> tuple[list[Any], dict[str, Any], str]:
    """An empty conversation."""
    return [], {"meta": None}, ""


def ask_to_stop(request: gr.Request) -> None:
    """End this session's reply after the token it is at."""
    STOPS.ask(request.session_hash or "")


def plain(history: list[Any]) -> list[dict[str, str]]:
    """The conversation as role and text, without what the chat component adds."""

    def text(content: Any) -> str:
        parts = content if isinstance(content, list) else [content]
        return "".join(part if isinstance(part, str) else str(part.get("text", "")) for part in parts)

    return [{"role": entry["role"], "content": text(entry["content"])} for entry in history]


def respond(
    history: list[Any], target: str, system: str | None, length: float, temperature: float, top_p: float,
    seed: float | None, request: gr.Request,
) -> Iterator[tuple[Any, Any, str]]:  # fmt: skip
    """Write the reply: conversation, routing delta and status line, some times a second."""
    conversation = plain(history)
    if not conversation or conversation[-1]["role"] != "user":
        return
    session = request.session_hash or ""
    STOPS.clear(session)
    system = (system or "").strip()
    opening = [{"role": "system", "content": system}] if system else []
    chosen = {"max_new_tokens": int(length), "temperature": temperature, "top_p": top_p, "seed": int(seed or 0)}
    shown, sent = 0.0, 0
    try:
        check_allowed(target)
        if not ENGINE.holds(target):
            yield gr.skip(), gr.skip(), f"Loading {target.removeprefix('base:')} …"
        for saying in ENGINE.say(target, [*opening, *conversation], chosen, lambda: STOPS.asked(session)):
            if saying.finished or time.monotonic() - shown >= SHOW_EVERY:
                answer = [{"role": "assistant", "content": saying.text}] if saying.text else []
                yield [*conversation, *answer], saying.reel.since(sent), status_text(saying)
                shown, sent = time.monotonic(), len(saying.reel.tokens)
    except MoleError as error:
        yield gr.skip(), gr.skip(), f"**Not answered.** {error}"


def status_text(saying: Saying) -> str:
    """How far the reply is, and how fast."""
    if saying.count:
        return f"{saying.count} tokens · {saying.count / max(saying.seconds, 1e-3):.1f} a second"
    return "The model ended its reply at once." if saying.finished else "Reading the prompt …"


def check_allowed(target: str) -> None:
    """On a Space, visitors choose among what is there; they do not make it load anything else."""
    if settings.space_id() and target not in {value for _, value in targets()}:
        raise ModelError("This Space has no such model to chat with.", field="target")
    if not target:
        raise InputError("Choose what to chat with first.", field="target")
