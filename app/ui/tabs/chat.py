"""The Chat tab: a conversation with the base model or an adapter, the routing of every token beside it, others too."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import gradio as gr

from app import settings
from app.services import device_policy
from app.services.answering import BASE, LANES, Moment, Question, answer_all, lanes_of, name_of, targets
from app.services.conversation import parse, render, said, turn_at
from app.services.engine import ENGINE, STOPS
from app.services.steering_options import chosen_steering
from app.ui.panels import steering as panel
from app.ui.panels.steering import SteeringPanel
from app.ui.wiring import QUIET, on_change
from app.views.routing import routing_view
from mole.analysis.tables import escaped
from mole.core import limits
from mole.core.errors import MoleError

PLACEHOLDER = "### Ask something\nChoose an example, or write your own. The routing beside it moves with every token."
TARGETS = "A run, checkpoint, base, or a folder."
OTHER = "Answers the same message, with the same seed, when you send one or write the last one anew."
NOTHING: dict[str, Any] = {"meta": None}


@dataclass
class LaneView:
    """A column of the conversation: whose it is, what was said, and its routing in short."""

    column: gr.Column
    title: gr.Markdown
    chatbot: gr.Chatbot
    routing: gr.HTML


@dataclass
class ChatTab:
    """The tab's components; the other tabs and the page's start need `target` and `touched` of them."""

    target: gr.Dropdown
    touched: gr.State
    """Whether the person chose the target, so that the page does not choose for them any more."""
    compare: gr.Dropdown
    lanes: list[LaneView]
    status: gr.Markdown
    notice: gr.Markdown
    where: gr.Radio
    message: gr.Textbox
    stop: gr.Button
    again: gr.Button
    free: gr.Button
    steering: SteeringPanel
    options: list[Any]
    card: gr.Column
    view: gr.HTML
    reels: gr.State
    """The last reply's reel of each target, by id."""

    @property
    def chatbots(self) -> list[gr.Chatbot]:
        return [lane.chatbot for lane in self.lanes]

    @property
    def views(self) -> list[gr.HTML]:
        return [self.view, *(lane.routing for lane in self.lanes)]


def build() -> ChatTab:
    """Make the tab's components and handlers where we stand in the layout."""
    with gr.Row(elem_classes="two-columns"):
        with gr.Column(scale=11, min_width=320, elem_classes="card"):
            with gr.Row(elem_classes="chat-targets"):
                target = gr.Dropdown(
                    choices=[("Base model", BASE)],
                    value=BASE,
                    label="Chat with",
                    info="A run, a checkpoint or a base model." if settings.space_id() else TARGETS,
                    allow_custom_value=not settings.space_id(),
                    elem_id="target",
                )
                compare = gr.Dropdown(
                    choices=[("Base model", BASE)],
                    value=[],
                    multiselect=True,
                    max_choices=LANES - 1,
                    label="Compare with",
                    info="Same message, same seed, side by side.",
                    allow_custom_value=not settings.space_id(),
                    elem_id="compare-with",
                )
            with gr.Row(elem_classes="lanes"):
                lanes = [build_lane(place) for place in range(LANES)]
            status = gr.Markdown("", elem_classes=["quiet", "chat-status"], elem_id="chat-status")
            notice = gr.Markdown("", visible=False, elem_classes=["notice", "chat-notice"], elem_id="chat-notice")
            where = gr.Radio(
                device_policy.CHOICES,
                value=device_policy.CPU,
                show_label=False,
                visible=False,
                container=False,
                elem_id="where",
            )
            message = build_message()
            with gr.Row(elem_classes="buttons"):
                stop = gr.Button("Stop", size="md", visible=False, elem_id="chat-stop")
                again = gr.Button("New conversation", size="md", elem_id="chat-new")
            steering = panel.build()
            options, free = build_options()
        with gr.Column(scale=12, min_width=320, elem_classes=["card", "sticky"]) as card:
            view = routing_view(elem_id="routing-view")
    tab = ChatTab(
        target, gr.State(False), compare, lanes, status, notice, where, message, stop, again, free, steering, options,
        card, view, gr.State({}),
    )  # fmt: skip
    wire(tab)
    wire_choices(tab)
    return tab


def build_lane(place: int) -> LaneView:
    """One column; the first holds the conversation, the others are for comparison."""
    first = place == 0
    with gr.Column(min_width=260, visible=first, elem_classes="lane", elem_id=f"lane-{place + 1}") as column:
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
            examples=examples() if first else None,  # type: ignore[arg-type]
            elem_id="chatbot" if first else f"chatbot-{place + 1}",
            elem_classes="chatbot",
        )
        routing = routing_view(compact=True, visible=not first, elem_id=f"routing-{place + 1}")
    return LaneView(column, title, chatbot, routing)


def build_message() -> gr.Textbox:
    """The box to write in."""
    return gr.Textbox(
        label="Message",
        show_label=False,
        placeholder="Write a message",
        submit_btn=True,
        lines=1,
        max_lines=8,
        container=False,
        elem_id="message",
    )


def build_options() -> tuple[list[Any], gr.Button]:
    """System prompt, length, temperature, top-p and seed, in the order `respond` takes them; a button for memory."""
    with gr.Accordion("Options", open=False, elem_classes="accordion-card", elem_id="chat-options"):
        system = gr.Textbox(label="System prompt", info="Empty: the model's own.", lines=2)
        with gr.Row():
            length = gr.Slider(
                1, limits.NEW_TOKENS, value=128, step=1, label="Longest reply", info="In tokens.", buttons=[]
            )
            temperature = gr.Slider(
                0, 2, value=0.0, step=0.05, label="Temperature", info="0 takes the likeliest token.", buttons=[]
            )
        with gr.Row():
            top_p = gr.Slider(
                0.05, 1, value=1.0, step=0.05, label="Top p", info="Of the tokens drawn among.", buttons=[]
            )
            seed = gr.Number(0, precision=0, label="Seed", info="The same seed draws the same reply.")
        with gr.Row(elem_classes="buttons"):
            free = gr.Button("Unload the models", size="md", elem_id="chat-unload")
    return [system, length, temperature, top_p, seed], free


def examples() -> list[dict[str, str]]:
    """One prompt of each skill in the held-out sample data."""
    path = settings.sample("skills_heldout.jsonl")
    found: dict[str, str] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path else ():
        row = json.loads(line)
        found.setdefault(row["skill"], row["prompt"])
    return [{"text": prompt, "display_text": prompt} for prompt in found.values()]


# ---------------------------------------------------------------------------------------------------------
# Wiring


def wire(tab: ChatTab) -> None:
    """Sending, editing, writing anew, stopping. Whatever asks, the same handler answers."""
    main, before = tab.chatbots[0], [tab.message, *tab.chatbots, tab.status, tab.stop]
    asking = [
        tab.message.submit(ask, [tab.message, main], before, queue=False, **QUIET),
        main.example_select(pick, main, before, queue=False, **QUIET),
        main.edit(edit, main, before, queue=False, **QUIET),
        main.retry(retry, main, before, queue=False, **QUIET),
    ]
    given = [*tab.chatbots, tab.target, tab.compare, tab.steering.view, tab.where, tab.reels, *tab.options]
    for event in asking:
        answered = event.then(
            respond, given, [*tab.chatbots, *tab.views, tab.status, tab.reels], concurrency_limit=limits.CHATS, **QUIET
        )
        answered.then(ready, None, [tab.message, tab.stop], queue=False, **QUIET)
    main.undo(undo, tab.chatbots, [tab.message, *tab.chatbots], queue=False, **QUIET)
    tab.stop.click(ask_to_stop, None, None, queue=False, **QUIET)
    tab.again.click(start_anew, None, [*tab.chatbots, *tab.views, tab.status, tab.reels], queue=False, **QUIET)
    tab.free.click(unload, None, tab.status, **QUIET)


def wire_choices(tab: ChatTab) -> None:
    """What follows from the chosen targets: the panel, the columns, where to compute."""
    tab.target.input(lambda: True, None, tab.touched, queue=False, **QUIET)
    on_change([tab.target], panel.show, tab.target, tab.steering.shown, queue=False)
    on_change([tab.target], comparable, None, tab.compare, queue=False)
    tab.compare.focus(comparable, None, tab.compare, queue=False, **QUIET)
    columns = [part for lane in tab.lanes for part in (lane.column, lane.title, lane.routing)]
    on_change([tab.target, tab.compare], arrange, [tab.target, tab.compare], [tab.card, *columns], queue=False)
    on_change([tab.target], place, tab.target, [tab.notice, tab.where])
    tab.message.focus(place, tab.target, [tab.notice, tab.where], **QUIET)


def comparable() -> Any:
    """What may be compared with, as it is now."""
    return gr.Dropdown(choices=targets())


def refreshed(chosen: str, touched: bool) -> Any:
    """The targets as they are now; the choice stays if somebody made it, else the first one is it."""
    known = targets()
    values = [value for _, value in known]
    keep = touched and (chosen in values or not settings.space_id())
    return gr.Dropdown(choices=known, value=chosen if keep else values[0])


def arrange(target: str, compare: list[str]) -> list[Any]:
    """The columns for what is compared; alone, the conversation has the large routing view beside it."""
    chosen = [target, *compare[: LANES - 1]]
    several = len(chosen) > 1
    parts: list[Any] = [gr.Column(visible=not several)]
    for number in range(LANES):
        here = number < len(chosen)
        title = f"**{escaped(name_of(chosen[number]))}**" if here and several else ""
        if here and number and chosen[number] == target:
            title += " · as trained"
        parts += [gr.Column(visible=here), gr.Markdown(title, visible=several), gr.HTML(visible=several and here)]
    return parts


def place(target: str) -> tuple[Any, Any]:
    """What a training means for the next reply, and what there is to choose."""
    advice = device_policy.advise(device_policy.look(target))
    return gr.Markdown(escaped(advice.text), visible=bool(advice.text)), gr.Radio(visible=advice.choose)


# ---------------------------------------------------------------------------------------------------------
# Asking


def waiting(turns: list[Any]) -> list[Any]:
    """Message box, conversation and Stop button while a reply is written; the other columns follow with it."""
    others = [gr.skip()] * (LANES - 1)
    return [gr.Textbox(value="", interactive=False), render(turns), *others, "", gr.Button(visible=True)]


def asking(history: list[Any], keep: int, text: str, request: gr.Request) -> list[Any]:
    """Ask `text` after the first `keep` turns; a reply that is still being written ends."""
    STOPS.ask(request.session_hash or "")
    return waiting([*parse(history)[:keep], *parse([{"role": "user", "content": text}])])


def ask(text: str, history: list[Any], request: gr.Request) -> list[Any]:
    """Put the message into the conversation, and keep the next one out until it is answered."""
    if not text.strip():
        return [gr.skip()] * (LANES + 3)
    return asking(history, len(history), text, request)


def pick(history: list[Any], event: gr.SelectData, request: gr.Request) -> list[Any]:
    """Ask the chosen example."""
    return asking(history, len(history), event.value["text"], request)


def edit(history: list[Any], event: gr.EditData, request: gr.Request) -> list[Any]:
    """Ask the changed message instead; what came after it is gone."""
    return asking(history, turn_at(history, event.index), said(event.value), request)


def retry(history: list[Any], event: gr.RetryData, request: gr.Request) -> list[Any]:
    """Ask the message once more."""
    number = turn_at(history, event.index)
    return asking(history, number, parse(history)[number].user, request)


def undo(event: gr.UndoData, *histories: list[Any]) -> list[Any]:
    """Take the last message back into the box, with its answers."""
    number = turn_at(histories[0], event.index)
    return [parse(histories[0])[number].user, *(render(parse(history)[:number]) for history in histories)]


def ready() -> tuple[Any, Any]:
    """Message box and Stop button when it is the person's turn."""
    return gr.Textbox(interactive=True), gr.Button(visible=False)


def start_anew() -> list[Any]:
    """An empty conversation."""
    return [*[[]] * LANES, *[NOTHING] * (LANES + 1), "", {}]


def unload() -> str:
    """Give the memory of all models back."""
    ENGINE.unload()
    return "The models are unloaded; the next reply loads what it needs."


def ask_to_stop(request: gr.Request) -> None:
    """End this session's reply after the token it is at."""
    STOPS.ask(request.session_hash or "")


def respond(request: gr.Request, *given: Any) -> Iterator[list[Any]]:
    """Write the replies: conversations, routing deltas and status line, some times a second.

    `given` are the columns' conversations, target, compared targets, steering, where to compute, the last reels, and
    the values of `build_options`.
    """
    histories, (target, compare, steering, where, reels), options = given[:LANES], given[LANES:-5], given[-5:]
    if not histories[0] or histories[0][-1]["role"] != "user":
        return
    session = request.session_hash or ""
    should_stop = STOPS.begin(session)
    system, length, temperature, top_p, seed = options
    chosen = {"max_new_tokens": int(length), "temperature": temperature, "top_p": top_p, "seed": int(seed or 0)}
    try:
        lanes = lanes_of(target, compare, chosen_steering(steering), list(histories))
        question = Question(chosen, system or "", where, should_stop)
        for moment in answer_all(lanes, question, reels):
            yield outputs(moment, len(lanes) > 1)
    except MoleError as error:
        yield outputs(Moment(status=f"**Not answered.** {escaped(str(error))}"), False)
    finally:
        if not should_stop():
            STOPS.ask(session)


def outputs(moment: Moment, several: bool) -> list[Any]:
    """A moment for the outputs of `respond`; alone, the first column's routing is in the large view."""
    chatbots, views = [gr.skip()] * LANES, [gr.skip()] * (LANES + 1)
    if moment.history is not None:
        chatbots[moment.place] = moment.history
    if moment.view is not None:
        views[moment.place + 1 if several else 0] = moment.view
    status = gr.skip() if moment.status is None else moment.status
    return [*chatbots, *views, status, gr.skip() if moment.reels is None else moment.reels]
