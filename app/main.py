"""The studio's page, put together and served: `mole studio`, `python app/main.py`, or a Hugging Face Space."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from app import endpoints, live, settings, theme
from app.engine import ENGINE
from app.live import QUIET
from app.tabs import chat, runs, train
from app.tabs.chat import ChatTab
from app.tabs.runs import RunsTab
from app.tabs.train import TrainTab
from mole import runs as library

import gradio as gr  # isort: skip  after `app`, which imports it the quick way

TABS = ("train", "runs", "chat")
KEEP_TAB = """(tab) => { const url = new URL(window.location); url.searchParams.set("tab", "%s");
  history.replaceState(null, "", url); }"""


def build() -> gr.Blocks:
    """The whole page."""
    with gr.Blocks(title=settings.TITLE, analytics_enabled=False, delete_cache=settings.DELETE_CACHE) as page:
        gr.HTML(
            f'<div class="masthead"><h1>{settings.TITLE}</h1><p>{settings.CLAIM}</p></div>',
            apply_default_css=False,
        )
        with gr.Tabs(elem_id="tabs") as tabs:
            with gr.Tab("Train", id="train") as train_tab:
                training = train.build()
            with gr.Tab("Runs", id="runs") as runs_tab:
                listing = runs.build()
            with gr.Tab("Chat", id="chat") as chat_tab:
                chatting = chat.build()
        wire(page, tabs, (train_tab, runs_tab, chat_tab), training, listing, chatting)
        endpoints.build()
    return page


def wire(
    page: gr.Blocks, tabs: gr.Tabs, each: tuple[gr.Tab, ...], training: TrainTab, listing: RunsTab, chatting: ChatTab
) -> None:
    """What goes on between the tabs: the run in the address, the clocks of the tab in front, the way into the chat."""
    first, second = training.live, listing.live
    clocks = [*first.shown, *second.shown, second.name, *listing.shown, listing.timer, chatting.target]

    def enter(tab: str) -> Any:
        return lambda *values: entered(tab, *values)

    for name, tab in zip(TABS, each, strict=True):
        given = [first.name, second.name, chatting.target, chatting.touched]
        tab.select(enter(name), given, clocks, queue=False, **QUIET)
        tab.select(None, None, None, js=KEEP_TAB % name, **QUIET)
    for view in (first, second):
        view.chat.click(chat_with, view.name, [tabs, chatting.target, chatting.touched], **QUIET)
    page.load(arrive, None, [first.name, second.name, tabs], **QUIET).then(
        entered_first, [first.name, second.name, chatting.target, chatting.touched], clocks, **QUIET
    )


def chat_with(name: str) -> tuple[Any, Any, bool]:
    """To the Chat tab, with this run chosen."""
    return gr.Tabs(selected="chat"), gr.Dropdown(choices=chat.targets(), value=name), True


def arrive(request: gr.Request) -> tuple[str, str, Any]:
    """The run and the tab in the address; without one, the newest run that is alive."""
    asked = dict(request.query_params)
    name = asked.get("run", "")
    try:
        library.get(name)
    except library.RunError:
        name = live.newest(*live.ALIVE)
    tab = asked.get("tab", "")
    return name, name, gr.Tabs(selected=tab) if tab in TABS else gr.skip()


def entered_first(first: str, second: str, target: str, touched: bool, request: gr.Request) -> list[Any]:
    """The tab in front when the page has just been opened."""
    tab = dict(request.query_params).get("tab", TABS[0])
    return entered(tab if tab in TABS else TABS[0], first, second, target, touched)


def entered(tab: str, first: str, second: str, target: str, touched: bool) -> list[Any]:
    """The outputs for a tab that came to the front: what it shows is fresh, and only its clocks tick."""
    if tab == "chat":
        ENGINE.warm_up()
    second = second or first or live.newest(*library.STATES)
    train_view = live.show(first) if tab == "train" else live.hide()
    runs_view = live.show(second) if tab == "runs" else live.hide()
    listed = runs.refresh(second, {}) if tab == "runs" else [gr.skip()] * 4
    chat_target = chat.refreshed(target, touched) if tab == "chat" else gr.skip()
    return [*train_view, *runs_view, second, *listed, gr.Timer(active=tab == "runs"), chat_target]


def launch(host: str = "127.0.0.1", port: int = 7860, auth: tuple[str, str] | None = None, share: bool = False) -> None:
    """Serve the studio until it is interrupted; on a Space, on all addresses."""
    host = "0.0.0.0" if settings.space_id() else host
    page = build()
    page.queue(max_size=settings.MAX_QUEUE, default_concurrency_limit=4)
    page.launch(
        server_name=host,
        server_port=port,
        auth=auth,
        share=share,
        theme=theme.theme(),
        head=theme.head(),
        ssr_mode=False,
        run_history=False,
        footer_links=["api", "settings"],
        max_file_size=settings.MAX_UPLOAD,
        show_error=True,
        quiet=True,
        prevent_thread_lock=True,
    )
    print(f"{settings.TITLE} is ready: http://{host}:{port}", flush=True)
    library.wake_queued()
    page.block_thread()


if __name__ == "__main__":
    launch(port=int(os.environ.get("GRADIO_SERVER_PORT", "7860")))
