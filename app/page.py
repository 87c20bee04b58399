"""The page: its three tabs, and what goes on between them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from app import guard, settings
from app.services import endpoints
from app.services.chat_targets import chat_targets
from app.services.engine import ENGINE
from app.services.listing import LISTING
from app.ui.panels import compare, live
from app.ui.panels.compare import Compare
from app.ui.tabs import runs, train
from app.ui.tabs.chat import ChatTab, build_chat_tab, refresh_targets
from app.ui.tabs.runs import RunsTab
from app.ui.tabs.train import TrainTab
from app.ui.wiring import QUIET, run_or_warn, toast_text
from app.views.tour import tour
from mole import runs as library
from mole.core.errors import MoleError, RunError

import gradio as gr  # isort: skip  after `app`, which imports it the quick way

TABS = ("train", "runs", "chat")
SKIPPED = gr.skip()
MASTHEAD = (
    f'<div class="masthead"><h1>{settings.TITLE}</h1><p>{settings.CLAIM}</p>'
    '<button type="button" id="tour-again">Tour</button></div>'
)
ARRIVED = "() => { document.body.dataset.arrived = true; }"
KEEP_TAB = """() => { if (!document.body.dataset.arrived) return;  // before, Gradio opens the first tab
  const url = new URL(window.location); url.searchParams.set("tab", "%s"); history.replaceState(null, "", url); }"""


@dataclass
class Parts:
    """The page's parts as the events between them need them."""

    tabs: gr.Tabs
    training: TrainTab
    listing: RunsTab
    comparing: Compare
    chatting: ChatTab
    ready: gr.State
    """The tab in the address, empty until that is read: a tab in front before has nothing to show yet."""

    @property
    def given(self) -> list[Any]:
        """The inputs of `entered`."""
        chatting, listing = self.chatting, self.listing
        return [
            self.ready, self.training.live.name, listing.live.name, listing.compared, chatting.target, chatting.touched,
        ]  # fmt: skip

    @property
    def shown(self) -> list[Any]:
        """The outputs of `entered`."""
        training, listing = self.training, self.listing
        return [
            *training.live.shown, *training.shown,
            listing.live.name, *listing.live.shown, *listing.shown, listing.timer, *self.comparing.shown,
            self.chatting.target,
        ]  # fmt: skip

    def entered(
        self, tab: str, ready: str, first: str, second: str, compared: list[str], target: str, touched: bool
    ) -> list[Any]:
        """What a tab shows that came to the front; only its clocks tick."""
        if not ready:
            return [gr.skip()] * len(self.shown)
        if tab == "chat":
            ENGINE.warm_up()
        second = second or first or LISTING.newest(*library.STATES)
        return [
            *(self.train_tab(first) if tab == "train" else [*live.hide(), *self.training.left()]),
            second,
            *(runs_tab(second, compared) if tab == "runs" else runs_left()),
            refresh_targets(target, touched) if tab == "chat" else gr.skip(),
        ]

    def train_tab(self, name: str) -> list[Any]:
        """The Train tab in front."""
        return [*live.show(name), *self.training.entered()]


def runs_tab(name: str, compared: list[str]) -> list[Any]:
    """The Runs tab in front."""
    listed, *rest = runs.refresh(name, runs.Seen())
    return [*live.show(name), {**listed, "marked": compared}, *rest, gr.Timer(active=True), *compare.show(compared)]


def runs_left() -> list[Any]:
    """The Runs tab behind another one."""
    return [*live.hide(), *runs.skipped(), gr.Timer(active=False), *compare.hide()]


class Page(gr.Blocks):
    """A page whose errors are one line, to whoever asks and in the log, and whose skipped outputs cost nothing."""

    async def process_api(self, block_fn: Any, *given: Any, **named: Any) -> dict[str, Any]:
        try:
            return await super().process_api(block_fn, *given, **named)
        except Exception as error:
            if isinstance(error, gr.Error) and not error.print_exception:
                raise
            if not isinstance(error, MoleError):
                guard.report(error, getattr(block_fn, "name", "") or "event")
            raise gr.Error(toast_text(str(error) or type(error).__name__), print_exception=False) from None

    async def postprocess_data(self, block_fn: Any, predictions: Any, state: Any) -> list[Any]:
        """Gradio makes every output anew that is skipped, milliseconds each; clocks and replies of ours skip most."""
        outputs = block_fn.outputs
        several = isinstance(predictions, (list, tuple)) and len(predictions) == len(outputs) > 1
        kept = [place for place, value in enumerate(predictions) if not is_skipped(value)] if several else []
        if not several or len(kept) == len(outputs):
            return await super().postprocess_data(block_fn, predictions, state)
        made: list[Any] = [None if output.stateful else dict(SKIPPED) for output in outputs]
        if kept:
            part = copy.copy(block_fn)
            part.outputs = [outputs[place] for place in kept]
            values = [predictions[place] for place in kept]
            found = await super().postprocess_data(part, values if len(kept) > 1 else values[0], state)
            for place, value in zip(kept, found, strict=True):
                made[place] = value
        return made


def is_skipped(value: Any) -> bool:
    """Whether a handler leaves an output as it is."""
    return isinstance(value, dict) and value == SKIPPED


def build() -> gr.Blocks:
    """The whole page."""
    with Page(title=settings.TITLE, analytics_enabled=False, delete_cache=settings.DELETE_CACHE) as page:
        gr.HTML(MASTHEAD, apply_default_css=False)
        tour()
        with gr.Tabs(elem_id="tabs") as tabs:
            with gr.Tab("Train", id="train") as train_tab:
                training = train.build()
            with gr.Tab("Runs", id="runs") as runs_tab:
                listing = runs.build()
                with gr.Column(elem_classes="card"):
                    comparing = compare.build(listing.compared)
            with gr.Tab("Chat", id="chat") as chat_tab:
                chatting = build_chat_tab()
        parts = Parts(tabs, training, listing, comparing, chatting, gr.State(""))
        wire_tabs(page, parts, (train_tab, runs_tab, chat_tab))
        wire_ways(parts)
        endpoints.build()
    return page


def wire_tabs(page: gr.Blocks, parts: Parts, each: tuple[gr.Tab, ...]) -> None:
    """What a tab shows when it comes to the front, and when the page is opened."""

    def enter(tab: str) -> Callable[..., list[Any]]:
        return lambda *values: parts.entered(tab, *values)

    def first(tab: str, *values: Any) -> list[Any]:
        return parts.entered(tab, tab, *values)

    for name, tab in zip(TABS, each, strict=True):
        tab.select(enter(name), parts.given, parts.shown, queue=False, **QUIET)
        tab.select(None, None, None, js=KEEP_TAB % name, **QUIET)
    names = [parts.training.live.name, parts.listing.live.name]
    arrived = page.load(arrive, None, [*names, parts.listing.compared, parts.tabs, parts.ready], **QUIET)
    arrived.then(None, None, None, js=ARRIVED, **QUIET)
    arrived.then(first, parts.given, parts.shown, **QUIET)


def tab_of(request: gr.Request) -> str:
    """The tab in the address; without one Train, and on a Space, where nothing can be trained, Chat."""
    tab = str(dict(request.query_params).get("tab", ""))
    return tab if tab in TABS else "chat" if settings.space_id() else "train"


def arrive(request: gr.Request) -> tuple[str, str, list[str], Any, str]:
    """The run, the compared runs and the tab in the address; without a run there, the newest one that is alive."""
    asked, tab = dict(request.query_params), tab_of(request)
    name = str(asked.get("run", ""))
    try:
        library.get(name)
    except RunError:
        name = LISTING.newest(*live.ALIVE)
    return name, name, compare.asked_for(str(asked.get("compare", ""))), gr.Tabs(selected=tab), tab


def wire_ways(parts: Parts) -> None:
    """The ways from one tab into another: chat with a run or a checkpoint, train a run again with changes."""
    training, listing, chatting = parts.training, parts.listing, parts.chatting
    to_chat = [parts.tabs, chatting.target, chatting.touched]
    for view in (training.live, listing.live):
        view.chat.click(chat_with, view.name, to_chat, **QUIET)
    listing.open_checkpoint.click(chat_with, listing.checkpoint, to_chat, **QUIET)

    def retry(name: str) -> list[Any]:
        values = run_or_warn(lambda: training.fill_from(name))
        skipped = [gr.skip()] * (len(training.form.inputs) + 1)
        return skipped if values is None else [gr.Tabs(selected="train"), *values]

    listing.retry.click(retry, listing.live.name, [parts.tabs, *training.form.inputs], **QUIET)


def chat_with(target: str) -> tuple[Any, Any, bool]:
    """To the Chat tab, with this target chosen."""
    return gr.Tabs(selected="chat"), gr.Dropdown(choices=chat_targets(), value=target), True
