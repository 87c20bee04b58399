"""The Chat tab: a conversation with a model, the routing of every token, and other models beside it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import gradio as gr

from app import settings
from app.services import device_policy
from app.services.answering import MAX_COLUMNS, LastRecords, ReplyRequest, UIUpdate, answer_columns, chat_columns
from app.services.chat_targets import DEFAULT_TARGET, chat_targets, target_label
from app.services.conversation import Turn, history_of, message_text, turn_index, turns_of
from app.services.engine import ACTIVE_REPLIES, ENGINE
from app.services.steering_options import chosen_steering
from app.ui.panels import steering as panel
from app.ui.panels.chat_options import ChatOptions, build_chat_options, chosen_settings
from app.ui.panels.replay import wire_replay
from app.ui.panels.steering import SteeringPanel
from app.ui.wiring import QUIET, on_change
from app.views.routing import routing_view
from mole.analysis.tables import escaped
from mole.core import limits
from mole.core.errors import MoleError

PLACEHOLDER = "### Ask something\nChoose an example or write a message. The routing view follows every token."
TARGETS = "A run, checkpoint, base model or folder."
OTHER = "Answers the same message with the same seed, when you send or regenerate one."
NO_ROUTING: dict[str, Any] = {"meta": None}


@dataclass
class ColumnView:
    """A column of the conversation: its title, its messages, and its routing in a small view."""

    column: gr.Column
    title: gr.Markdown
    chatbot: gr.Chatbot
    routing: gr.HTML


@dataclass
class ChatTab:
    """The tab's components; the page itself needs `target` and `touched`."""

    target: gr.Dropdown
    touched: gr.State
    """Whether the person chose the target; until then the page chooses it."""
    compare: gr.Dropdown
    columns: list[ColumnView]
    status: gr.Markdown
    notice: gr.Markdown
    where: gr.Radio
    message: gr.Textbox
    stop: gr.Button
    again: gr.Button
    steering: SteeringPanel
    options: ChatOptions
    card: gr.Column
    view: gr.HTML
    records: gr.State
    """The `LastRecords` of the conversation."""

    @property
    def chatbots(self) -> list[gr.Chatbot]:
        return [column.chatbot for column in self.columns]

    @property
    def views(self) -> list[gr.HTML]:
        return [self.view, *(column.routing for column in self.columns)]

    @property
    def replies(self) -> list[Any]:
        """The outputs of `stream_replies`."""
        return [*self.chatbots, *self.views, self.status, self.records]


def build_chat_tab(own: Any) -> ChatTab:
    """Create the tab's components and handlers in the current layout block; `own` holds the visitor's runs."""
    with gr.Row(elem_classes="two-columns"):
        with gr.Column(scale=11, min_width=320, elem_classes="card"):
            with gr.Row(elem_classes="chat-targets"):
                target, compare = build_targets()
            with gr.Row(elem_classes="lanes"):
                columns = [build_column(number) for number in range(MAX_COLUMNS)]
            status = gr.Markdown("", elem_classes=["quiet", "chat-status"], elem_id="chat-status")
            notice = gr.Markdown("", visible=False, elem_classes=["notice", "chat-notice"], elem_id="chat-notice")
            where = gr.Radio(
                device_policy.DEVICE_CHOICES,
                value=device_policy.CPU,
                show_label=False,
                visible=False,
                container=False,
                elem_id="where",
            )
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
                replay = gr.Button("Save replay", size="md", elem_id="chat-replay")
            steering = panel.build_steering()
            options = build_chat_options()
        with gr.Column(scale=12, min_width=320, elem_classes=["card", "sticky"]) as card:
            view = routing_view(elem_id="routing-view")
    tab = ChatTab(
        target, gr.State(False), compare, columns, status, notice, where, message, stop, again, steering, options, card,
        view, gr.State(LastRecords()),
    )  # fmt: skip
    wire_messages(tab)
    wire_choices(tab, own)
    wire_replay(replay, tab.chatbots, [tab.target, tab.compare, tab.records, tab.options.system])
    return tab


def build_targets() -> tuple[gr.Dropdown, gr.Dropdown]:
    """The model to chat with, and those to compare it with."""
    on_space = bool(settings.space_id())
    target = gr.Dropdown(
        choices=[("Base model", DEFAULT_TARGET)],
        value=DEFAULT_TARGET,
        label="Chat with",
        info="A run, a checkpoint or a base model." if on_space else TARGETS,
        allow_custom_value=not on_space,
        elem_id="target",
    )
    compare = gr.Dropdown(
        choices=[("Base model", DEFAULT_TARGET)],
        value=[],
        multiselect=True,
        max_choices=MAX_COLUMNS - 1,
        label="Compare with",
        info="Same message, same seed, side by side.",
        allow_custom_value=not on_space,
        elem_id="compare-with",
    )
    return target, compare


def build_column(number: int) -> ColumnView:
    """One column; the first holds the conversation, the others are for comparison."""
    first = number == 0
    with gr.Column(min_width=260, visible=first, elem_classes="lane", elem_id=f"lane-{number + 1}") as column:
        title = gr.Markdown("", visible=False, elem_classes="lane-title")
        chatbot = gr.Chatbot(
            show_label=False,
            height="min(430px, 62vh)",
            allow_tags=False,
            sanitize_html=True,
            layout="bubble",
            buttons=["copy"],
            feedback_options=None,
            editable="user" if first else None,
            placeholder=PLACEHOLDER if first else OTHER,
            examples=example_prompts() if first else None,  # type: ignore[arg-type]
            elem_id="chatbot" if first else f"chatbot-{number + 1}",
            elem_classes="chatbot",
        )
        routing = routing_view(compact=True, visible=not first, elem_id=f"routing-{number + 1}")
    return ColumnView(column, title, chatbot, routing)


def example_prompts() -> list[dict[str, str]]:
    """One prompt of each skill in the held-out sample data."""
    path = settings.sample("skills_heldout.jsonl")
    prompts: dict[str, str] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path else ():
        row = json.loads(line)
        prompts.setdefault(row["skill"], row["prompt"])
    return [{"text": prompt, "display_text": prompt} for prompt in prompts.values()]


# ---------------------------------------------------------------------------------------------------------
# Wiring


def wire_messages(tab: ChatTab) -> None:
    """Sending, editing, regenerating and stopping: all of them end in `stream_replies`."""
    main, asked = tab.chatbots[0], [tab.message, *tab.chatbots, tab.status, tab.stop]
    questions = [
        tab.message.submit(submit_message, [tab.message, main], asked, queue=False, **QUIET),
        main.example_select(pick_example, main, asked, queue=False, **QUIET),
        main.edit(edit_message, main, asked, queue=False, **QUIET),
        main.retry(retry_message, main, asked, queue=False, **QUIET),
    ]
    given = [*tab.chatbots, tab.target, tab.compare, tab.steering.view, tab.where, tab.records, *tab.options.inputs]
    for question in questions:
        question.then(stream_replies, given, tab.replies, concurrency_limit=limits.CHATS, **QUIET).then(
            lambda: (gr.Textbox(interactive=True), gr.Button(visible=False)),
            None,
            [tab.message, tab.stop],
            queue=False,
            **QUIET,
        )
    main.undo(undo_message, tab.chatbots, [tab.message, *tab.chatbots, tab.records], queue=False, **QUIET)
    tab.stop.click(stop_reply, None, None, queue=False, **QUIET)
    tab.again.click(new_conversation, None, tab.replies, queue=False, **QUIET)
    tab.options.free.click(unload_models, None, tab.status, **QUIET)


def wire_choices(tab: ChatTab, own: Any) -> None:
    """What depends on the chosen targets: the overrides, the columns, where to compute."""
    tab.target.input(lambda: True, None, tab.touched, queue=False, **QUIET)
    on_change([tab.target], panel.show_steering, tab.target, tab.steering.shown, queue=False)
    on_change([tab.target], comparable, own, tab.compare, queue=False)
    tab.compare.focus(comparable, own, tab.compare, queue=False, **QUIET)
    parts = [part for column in tab.columns for part in (column.column, column.title, column.routing)]
    on_change([tab.target, tab.compare], arrange_columns, [tab.target, tab.compare], [tab.card, *parts], queue=False)
    on_change([tab.target], show_device_hint, tab.target, [tab.notice, tab.where])
    tab.message.focus(show_device_hint, tab.target, [tab.notice, tab.where], **QUIET)


def comparable(own: Any) -> Any:
    """The models to compare with, as of now."""
    return gr.Dropdown(choices=chat_targets(own))


def refresh_targets(chosen: str, touched: bool, own: Any = ()) -> Any:
    """The targets as of now; the choice stays if the person made it, else it becomes the first target."""
    choices = chat_targets(own)
    values = [value for _, value in choices]
    keep = touched and (chosen in values or not settings.space_id())
    return gr.Dropdown(choices=choices, value=chosen if keep else values[0])


def arrange_columns(target: str, compare: list[str]) -> list[Any]:
    """The columns for the compared models; a single conversation has the large routing view beside it."""
    targets = [target, *compare[: MAX_COLUMNS - 1]]
    several = len(targets) > 1
    parts: list[Any] = [gr.Column(visible=not several)]
    for number in range(MAX_COLUMNS):
        used = number < len(targets)
        title = f"**{escaped(target_label(targets[number]))}**" if used and several else ""
        if used and number and targets[number] == target:
            title += " · as trained"
        parts += [gr.Column(visible=used), gr.Markdown(title, visible=several), gr.HTML(visible=several and used)]
    return parts


def show_device_hint(target: str) -> tuple[Any, Any]:
    """What a training run means for the next reply, and what there is to choose."""
    hint = device_policy.device_hint(device_policy.device_status(target))
    return gr.Markdown(escaped(hint.text), visible=bool(hint.text)), gr.Radio(visible=hint.choose)


# ---------------------------------------------------------------------------------------------------------
# Asking


def ask(history: list[Any], keep: int, text: str, request: gr.Request) -> list[Any]:
    """Ask `text` after the first `keep` turns, for the outputs `asked`; a reply still being generated ends.

    The message box stays disabled until the reply is complete; the other columns follow with it.
    """
    stop_reply(request)
    turns = [*turns_of(history)[:keep], Turn(message_text(text))]
    others = [gr.skip()] * (MAX_COLUMNS - 1)
    return [gr.Textbox(value="", interactive=False), history_of(turns), *others, "", gr.Button(visible=True)]


def submit_message(text: str, history: list[Any], request: gr.Request) -> list[Any]:
    """Ask the message in the box; nothing happens when it is empty."""
    return ask(history, len(history), text, request) if text.strip() else [gr.skip()] * (MAX_COLUMNS + 3)


def pick_example(history: list[Any], event: gr.SelectData, request: gr.Request) -> list[Any]:
    """Ask the chosen example."""
    return ask(history, len(history), event.value["text"], request)


def edit_message(history: list[Any], event: gr.EditData, request: gr.Request) -> list[Any]:
    """Ask the edited message instead; the turns after it are removed."""
    return ask(history, turn_index(history, event.index), message_text(event.value), request)


def retry_message(history: list[Any], event: gr.RetryData, request: gr.Request) -> list[Any]:
    """Ask the message again."""
    number = turn_index(history, event.index)
    return ask(history, number, turns_of(history)[number].user, request)


def undo_message(event: gr.UndoData, *histories: list[Any]) -> list[Any]:
    """Take the last message, with its answers and their routing records, back into the box."""
    number = turn_index(histories[0], event.index)
    kept = [history_of(turns_of(history)[:number]) for history in histories]
    return [turns_of(histories[0])[number].user, *kept, LastRecords()]


def new_conversation() -> list[Any]:
    """An empty conversation, for `ChatTab.replies`."""
    return [*[[]] * MAX_COLUMNS, *[NO_ROUTING] * (MAX_COLUMNS + 1), "", LastRecords()]


def unload_models() -> str:
    """Release the memory of all models."""
    ENGINE.unload()
    return "All models are unloaded; the next reply loads its model again."


def stop_reply(request: gr.Request) -> None:
    """End this session's reply after its current token."""
    ACTIVE_REPLIES.stop(request.session_hash or "")


def stream_replies(request: gr.Request, *given: Any) -> Iterator[list[Any]]:
    """Generate the replies: conversations, routing and status line for `ChatTab.replies`, several times a second.

    `given` are the columns' conversations, target, compared targets, overrides, where to compute, the last records, and
    the values of `ChatOptions.inputs`.
    """
    histories = list(given[:MAX_COLUMNS])
    target, compare, steering, where, records, system, *options = given[MAX_COLUMNS:]
    if not histories[0] or histories[0][-1]["role"] != "user":
        return
    session = request.session_hash or ""
    should_stop = ACTIVE_REPLIES.start(session)
    try:
        columns = chat_columns(target, compare, chosen_steering(steering), histories)
        question = ReplyRequest(chosen_settings(options), system or "", where, should_stop)
        for update in answer_columns(columns, question, records):
            yield update_outputs(update, several=len(columns) > 1)
    except MoleError as error:
        yield update_outputs(UIUpdate(status=f"**Not answered.** {escaped(str(error))}"), several=False)
    finally:
        if not should_stop():
            ACTIVE_REPLIES.stop(session)


def update_outputs(update: UIUpdate, several: bool) -> list[Any]:
    """An update for `ChatTab.replies`; the routing of a single conversation is shown in the large view."""
    chatbots, views = [gr.skip()] * MAX_COLUMNS, [gr.skip()] * (MAX_COLUMNS + 1)
    if update.history is not None:
        chatbots[update.place] = update.history
    if update.view is not None:
        views[update.place + 1 if several else 0] = update.view
    status = gr.skip() if update.status is None else update.status
    return [*chatbots, *views, status, gr.skip() if update.records is None else update.records]
