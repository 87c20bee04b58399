"""The page: its four tabs, and how they interact."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from app import guard, settings
from app.services import endpoints, visitors
from app.services.chat_targets import chat_targets
from app.services.engine import ENGINE
from app.services.listing import LISTING
from app.ui.panels.compare import (
    ComparisonPanel,
    build_comparison,
    existing_runs,
    pause_comparison,
    show_comparison,
)
from app.ui.panels.live import ACTIVE_STATES, pause_live, show_live
from app.ui.panels.own_runs import build_own_runs
from app.ui.tabs.atlas import AtlasTab, build_atlas_tab, pause_atlas_tab, show_atlas_tab
from app.ui.tabs.chat import ChatTab, build_chat_tab, refresh_targets
from app.ui.tabs.runs import RunsTab, build_runs_tab, show_runs_tab, skip_runs_tab
from app.ui.tabs.train import TrainTab, build_train_tab
from app.ui.wiring import QUIET, run_or_warn, toast_text
from app.views.tour import tour
from mole import runs
from mole.core.errors import MoleError, RunError

import gradio as gr  # isort: skip  after `app`, which speeds up its import

TABS = ("train", "runs", "chat", "atlas")
SKIPPED = gr.skip()
HEADER = (
    f'<div class="masthead"><h1>{settings.TITLE}</h1><p>{settings.CLAIM}</p>'
    '<button type="button" id="tour-again">Tour</button></div>'
)
NOT_KEPT = '<p class="quiet" id="not-kept">This Space has no storage: runs and uploads are gone when it restarts.</p>'
MARK_ARRIVED = "() => { document.body.dataset.arrived = true; }"
KEEP_TAB_IN_ADDRESS = """() => {
  if (!document.body.dataset.arrived) return;  // until then Gradio itself opens the first tab
  // Not the tab of the event: this may run late, when its answer was slow and another tab is shown by now.
  const shown = document.querySelector("#tabs [role=tab][aria-selected=true]").dataset.tabId;
  const url = new URL(window.location); url.searchParams.set("tab", shown); history.replaceState(null, "", url); }"""


@dataclass
class PageParts:
    """The parts of the page that interact."""

    tabs: gr.Tabs
    train: TrainTab
    runs: RunsTab
    comparison: ComparisonPanel
    chat: ChatTab
    atlas: AtlasTab
    own: Any
    """Holds the names of the visitor's runs."""
    ready: gr.State
    """The tab in the address; empty until it is read, and before that no tab has anything to show."""

    @property
    def given(self) -> list[Any]:
        """The inputs of `enter_tab`."""
        live_names = [self.train.live.name, self.runs.live.name]
        shown = [self.atlas.form.target, self.atlas.first, self.atlas.second]
        return [self.ready, self.own, *live_names, self.runs.compared, self.chat.target, self.chat.touched, *shown]

    @property
    def shown(self) -> list[Any]:
        """The outputs of `enter_tab`."""
        train, runs_tab = self.train, self.runs
        return [
            *train.live.shown, *train.shown,
            runs_tab.live.name, *runs_tab.live.shown, *runs_tab.shown, runs_tab.timer, *self.comparison.shown,
            self.chat.target, *self.atlas.shown, self.atlas.timer,
        ]  # fmt: skip

    def enter_tab(
        self,
        tab: str,
        ready: str,
        own: Any,
        train_run: str,
        runs_run: str,
        compared: list[str],
        target: str,
        touched: bool,
        *atlases: str | None,
    ) -> list[Any]:
        """What the active tab shows, and polling in it alone; the runs are those chosen in Train and in Runs."""
        if not ready:
            return [gr.skip()] * len(self.shown)
        if tab == "chat":
            ENGINE.warm_up()
        runs_run = runs_run or train_run or LISTING.newest(*runs.STATES)
        if tab == "train":
            in_train = [*show_live(train_run), *self.train.resume()]
        else:
            in_train = [*pause_live(), *self.train.pause()]
        if tab == "runs":
            in_runs = [*show_live(runs_run), *show_runs_tab(runs_run, compared, own), gr.Timer(active=True)]
            in_runs += show_comparison(compared)
        else:
            in_runs = [*pause_live(), *skip_runs_tab(), gr.Timer(active=False), *pause_comparison()]
        in_chat = refresh_targets(target, touched, own) if tab == "chat" else gr.skip()
        in_atlas = show_atlas_tab(*atlases) if tab == "atlas" else pause_atlas_tab()
        return [*in_train, runs_run, *in_runs, in_chat, *in_atlas]


class Page(gr.Blocks):
    """A page whose errors are one line, on the page and in the log, and whose skipped outputs cost no time."""

    async def process_api(self, block_fn: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        try:
            return await super().process_api(block_fn, *args, **kwargs)
        except Exception as error:
            if isinstance(error, gr.Error) and not error.print_exception:
                raise
            if not isinstance(error, MoleError):
                guard.log_error(error, getattr(block_fn, "name", "") or "event")
            raise gr.Error(toast_text(str(error) or type(error).__name__), print_exception=False) from None

    async def postprocess_data(self, block_fn: Any, predictions: Any, state: Any) -> list[Any]:
        """Gradio builds each skipped output again, which takes milliseconds each; most updates skip most outputs."""
        outputs = block_fn.outputs
        several = isinstance(predictions, (list, tuple)) and len(predictions) == len(outputs) > 1
        kept = [place for place, value in enumerate(predictions) if not is_skipped(value)] if several else []
        if not several or len(kept) == len(outputs):
            return await super().postprocess_data(block_fn, predictions, state)
        processed: list[Any] = [None if output.stateful else dict(SKIPPED) for output in outputs]
        if kept:
            part = copy.copy(block_fn)
            part.outputs = [outputs[place] for place in kept]
            values = [predictions[place] for place in kept]
            found = await super().postprocess_data(part, values if len(kept) > 1 else values[0], state)
            for place, value in zip(kept, found, strict=True):
                processed[place] = value
        return processed


def is_skipped(value: Any) -> bool:
    """Whether a handler leaves an output unchanged."""
    return isinstance(value, dict) and value == SKIPPED


def build_page() -> gr.Blocks:
    """The whole page."""
    with Page(title=settings.TITLE, analytics_enabled=False, delete_cache=settings.delete_cache()) as page:
        gr.HTML(HEADER, apply_default_css=False)
        if not settings.home_is_kept():
            gr.HTML(NOT_KEPT, apply_default_css=False)
        tour()
        own = build_own_runs()
        with gr.Tabs(elem_id="tabs") as tabs:
            with gr.Tab("Train", id="train") as train_tab:
                train = build_train_tab(own)
            with gr.Tab("Runs", id="runs") as runs_tab:
                listing = build_runs_tab(own)
                with gr.Column(elem_classes="card"):
                    comparison = build_comparison(listing.compared)
            with gr.Tab("Chat", id="chat") as chat_tab:
                chat = build_chat_tab(own)
            with gr.Tab("Atlas", id="atlas") as atlas_tab:
                atlas = build_atlas_tab()
        parts = PageParts(tabs, train, listing, comparison, chat, atlas, own, gr.State(""))
        wire_tabs(page, parts, (train_tab, runs_tab, chat_tab, atlas_tab))
        wire_links(parts)
        endpoints.register_endpoints()
    return page


def wire_tabs(page: gr.Blocks, parts: PageParts, each: tuple[gr.Tab, ...]) -> None:
    """What a tab shows when it becomes active, and when the page is opened."""

    def enter(tab: str) -> Callable[..., list[Any]]:
        return lambda *values: parts.enter_tab(tab, *values)

    def enter_first(tab: str, *values: Any) -> list[Any]:
        return parts.enter_tab(tab, tab, *values)

    for name, tab in zip(TABS, each, strict=True):
        tab.select(enter(name), parts.given, parts.shown, queue=False, **QUIET)
        tab.select(None, None, None, js=KEEP_TAB_IN_ADDRESS, **QUIET)
    names = [parts.train.live.name, parts.runs.live.name]
    arrived = page.load(read_address, parts.own, [*names, parts.runs.compared, parts.tabs, parts.ready], **QUIET)
    arrived.then(None, None, None, js=MARK_ARRIVED, **QUIET)
    arrived.then(enter_first, parts.given, parts.shown, **QUIET)


def read_address(own: Any, request: gr.Request) -> tuple[str, str, list[str], Any, str]:
    """The run (for Train and for Runs), the compared runs and the tab in the page's address.

    Without a run, the newest of the visitor's runs, of which `own` has the names, or the newest active one; without a
    tab Train, or Chat on a Space.
    """
    query = dict(request.query_params)
    name, tab = str(query.get("run", "")), str(query.get("tab", ""))
    if tab not in TABS:
        tab = "chat" if settings.space_id() else "train"
    try:
        runs.get(name)
    except RunError:
        mine = visitors.own_runs(own)
        name = mine[-1].name if mine else LISTING.newest(*ACTIVE_STATES)
    return name, name, existing_runs(str(query.get("compare", ""))), gr.Tabs(selected=tab), tab


def wire_links(parts: PageParts) -> None:
    """The links between tabs: chat with a run or a checkpoint, and train a run again with changes."""
    train, listing, chat = parts.train, parts.runs, parts.chat
    to_chat = [parts.tabs, chat.target, chat.touched]
    for live in (train.live, listing.live):
        live.chat.click(chat_with, [live.name, parts.own], to_chat, **QUIET)
    listing.open_checkpoint.click(chat_with, [listing.checkpoint, parts.own], to_chat, **QUIET)

    def retry(name: str) -> list[Any]:
        values = run_or_warn(lambda: train.fill_from(name))
        skipped = [gr.skip()] * (len(train.form.inputs) + 1)
        return skipped if values is None else [gr.Tabs(selected="train"), *values]

    listing.retry.click(retry, listing.live.name, [parts.tabs, *train.form.inputs], **QUIET)


def chat_with(target: str, own: Any = ()) -> tuple[Any, Any, bool]:
    """The Chat tab with this target chosen: `tabs`, `target` and `touched`."""
    return gr.Tabs(selected="chat"), gr.Dropdown(choices=chat_targets(own), value=target), True
