"""A real Chromium: pages that complain, that can be waited for, and whose failures leave something to look at.

def test_something(page):                  # 1280 × 900; afterwards: nothing on the console, no request left the machine
def test_two(open_page):                   # open_page(width=390) for every further browser, with a storage of its own

A test that fails leaves `build/browser/<test>/`: of each page a screenshot, its HTML and the trace of what was done
(`playwright show-trace trace-1.zip`), what they said on the console, and the logs of the servers. With $MOLE_SNAPSHOTS
the trace shows the page at each step, which takes every browser test a tenth longer.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from playwright.sync_api import Browser, BrowserContext, Error, Page, Request, expect, sync_playwright

ARGUMENTS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip
BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
"""The first is the same browser without a window around its pages, which saves a quarter of the work."""
PATIENCE = 180_000
"""Milliseconds after which a page hangs; what is expected of it comes much sooner, but the machine may be busy."""
expect.set_options(timeout=PATIENCE)

LOGS: dict[str, Path] = {}
"""Of the servers that run: what they print, by address."""

LEAVING = "addEventListener('beforeunload', () => { console.error = () => {} })"
"""Gradio's client aborts its own stream when a page is left, and reports that as an error."""

CALLS = """
// What the page has asked of the server and not been answered: requests, and events that went into the queue.
// Timers ask for ever, so theirs do not count.
window.calls ??= (() => {
  const open = new Set(), early = new Set();  // early: events that ended before the answer to `join` named them
  const fetched = window.fetch;
  let [begun, seen, frames] = [0, 0, 0];

  const ended = (event) => open.delete(event) || early.add(event);
  const isTimer = (body) => {
    if (typeof body !== "string") return false;
    const { trigger_id } = JSON.parse(body);
    return window.gradio_config.components.some(({ id, type }) => id === trigger_id && type === "timer");
  };

  async function follow(stream) {
    const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
    let text = "";
    for (let part = await reader.read(); !part.done; part = await reader.read()) {
      const messages = (text + part.value).split("\\n\\n");
      text = messages.pop();
      for (const message of messages) {
        const { msg, event_id } = JSON.parse(message.replace(/^data:/, ""));
        if (msg === "process_completed") ended(event_id);
      }
    }
  }

  async function ask(path, input, init) {
    const call = ++begun;
    open.add(call);
    try {
      const answer = await fetched(input, init);
      const text = await answer.clone().text();
      if (answer.ok && path.endsWith("/queue/join")) {
        const { event_id } = JSON.parse(text);
        if (!early.delete(event_id)) open.add(event_id);
      }
      return answer;
    } finally {
      open.delete(call);
    }
  }

  window.fetch = async (input, init = {}) => {
    const path = new URL(input.url ?? input, location).pathname;
    if (path.endsWith("/queue/data")) {
      const answer = await fetched(input, init);
      const [mine, theirs] = answer.body.tee();
      follow(mine).catch(() => {});  // the page was left
      return new Response(theirs, answer);
    }
    const counts = init.method === "POST" && path.includes("/gradio_api/") && !isTimer(init.body);
    return counts ? ask(path, input, init) : fetched(input, init);
  };

  // An answer changes components, whose change asks again within a frame: only several quiet ones are the end.
  function quiet() {
    if (open.size || begun !== seen) [seen, frames] = [begun, 0];
    else frames++;
    return frames > 4;
  }
  return { quiet, begun: () => begun };
})();
"""


def quiet(page: Page) -> None:
    """Wait until the page has got, and drawn, everything it has asked the server for; its timers go on."""
    page.wait_for_function("window.calls && calls.quiet()")


@dataclass
class Windows:
    """The browser's windows of one test, each with a storage of its own.

    Attributes:
        browser: in which they are opened.
        trace: what is done is recorded.
        complaints: errors of the pages that are to have none, and their requests to elsewhere.
        console: what the pages said, with errors that nobody caught.
    """

    browser: Browser
    trace: bool = True
    complaints: list[str] = field(default_factory=list)
    console: list[str] = field(default_factory=list)
    _opened: list[tuple[BrowserContext, Page, Callable[[Page], None]]] = field(default_factory=list)

    def open(
        self, width: int = 1280, height: int = 900, strict: bool = True, leave: Callable[[Page], None] = lambda _: None
    ) -> Page:
        """A new window with an empty page.

        Unless `strict`, it may have errors and ask for other hosts. `leave` looks at it once the test has passed.
        """
        context = self.browser.new_context(viewport={"width": width, "height": height})
        if self.trace:
            context.tracing.start(snapshots="MOLE_SNAPSHOTS" in os.environ)
        context.add_init_script(LEAVING)
        context.add_init_script(CALLS)
        page = context.new_page()
        page.set_default_timeout(PATIENCE)
        self._opened.append((context, page, leave))

        def said(line: str, wrong: bool = True) -> None:
            self.console.append(line)
            if strict and wrong:
                self.complaints.append(line)

        page.on("console", lambda message: said(f"console {message.type}: {message.text}", message.type == "error"))
        page.on("pageerror", lambda error: said(f"error: {error}"))
        page.on("request", lambda sent: is_elsewhere(sent) and said(f"left: {sent.url}"))
        return page

    def check(self) -> None:
        """See that every window was left as it should be."""
        for _, page, leave in self._opened:
            leave(page)
        assert not self.complaints, self.complaints

    def keep(self, folder: Path) -> None:
        """Write down what can be seen of every window."""
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        (folder / "console.txt").write_text("\n".join(self.console), encoding="utf-8")
        for number, (context, page, _) in enumerate(self._opened, start=1):
            try:
                if not page.is_closed():
                    page.screenshot(path=folder / f"page-{number}.png", timeout=30_000)
                    (folder / f"page-{number}.html").write_text(page.content(), encoding="utf-8")
                if self.trace:
                    context.tracing.stop(path=folder / f"trace-{number}.zip")
            except Error as error:  # the test's own failure is the one to be told
                (folder / f"page-{number}.txt").write_text(str(error), encoding="utf-8")
        for url, log in LOGS.items():
            shutil.copy(log, folder / f"server-{url.rpartition(':')[2]}.log")
        print(f"What the browser showed is in {folder}")

    def close(self) -> None:
        for context, _, _ in self._opened:
            context.close()


def is_elsewhere(sent: Request) -> bool:
    opened = sent.is_navigation_request() and sent.url.startswith("file:")  # a page that was saved
    return not opened and not sent.url.startswith(("http://127.0.0.1", "data:", "blob:"))


FAILED = pytest.StashKey[bool]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Tell `windows`, which are closed after the test, whether it has failed."""
    report = yield
    if report.failed:
        item.stash[FAILED] = True
    return report


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """Chromium; without one these tests fail, they do not pass unseen."""
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    assert found, f"These tests drive a real browser: install one of {', '.join(BROWSERS)}."
    with sync_playwright() as driver:
        running = driver.chromium.launch(executable_path=found, args=ARGUMENTS)
        yield running
        running.close()


@pytest.fixture
def windows(browser: Browser, request: pytest.FixtureRequest) -> Iterator[Windows]:
    """The windows of this test; in the end no complaint, and evidence if it has failed."""
    opened = Windows(browser, trace=request.node.get_closest_marker("timed") is None)
    yield opened
    failed = request.node.stash.get(FAILED, False)
    try:
        if not failed:
            opened.check()
    except BaseException:
        failed = True
        raise
    finally:
        if failed:
            name = re.sub(r"[^\w.-]+", "-", request.node.name).strip("-")
            opened.keep(request.config.rootpath / "build" / "browser" / name)
        opened.close()


@pytest.fixture
def open_page(windows: Windows) -> Callable[..., Page]:
    """`open_page(width=1280, height=900)`: a window of its own."""
    return windows.open


@pytest.fixture
def page(open_page: Callable[..., Page]) -> Page:
    """One window, 1280 × 900."""
    return open_page()
