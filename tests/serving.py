"""The studio as its users meet it: a real `mole studio` process and a real Chromium; conftest.py offers the fixtures.

def test_something(studio, page):         # a studio with an empty $MOLE_HOME of its own
    page.goto(studio.url)                 # afterwards: nothing on the console, no request left the machine
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

ROOT = Path(__file__).resolve().parents[1]
ARGUMENTS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip


PATIENCE = 30_000
"""Milliseconds that what is expected of a page may take on a busy machine, unless a test says so."""
expect.set_options(timeout=PATIENCE)
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
"""On two cores torch's threads would wait for each other by spinning, in the browser's way: many times slower."""


@dataclass
class Studio:
    """A running studio."""

    url: str
    home: Path
    seconds: float
    """From starting the process to the page being served."""

    def open(self, page: Page, query: str = "") -> None:
        """Open the page and wait until it can be used."""
        page.goto(f"{self.url}/{query and '?'}{query}")
        page.wait_for_selector("[role=tab]", timeout=60_000)
        page.wait_for_timeout(1000)  # what the page asks for when it opens arrives; its stream never ends, so no "idle"


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@contextmanager
def serve(command: list[str], port: int, home: Path, **environment: str) -> Iterator[Studio]:
    """Run a command that serves a page on `port`, until the block ends."""
    begun = time.monotonic()
    log = (home / "studio.log").open("w+")
    settings = {**os.environ, "MOLE_HOME": str(home), "PYTHONUNBUFFERED": "1", **ONE_THREAD, **environment}
    process = subprocess.Popen(command, cwd=ROOT, env=settings, stdout=log, stderr=subprocess.STDOUT)
    url = f"http://127.0.0.1:{port}"
    try:
        while True:
            try:
                urllib.request.urlopen(url, timeout=5).read()
                break
            except OSError:
                log.seek(0)
                assert process.poll() is None and time.monotonic() < begun + 60, log.read()
                time.sleep(0.02)
        yield Studio(url, home, time.monotonic() - begun)
    finally:
        process.terminate()
        process.wait(20)
        log.close()


def studio_command(port: int) -> list[str]:
    return [sys.executable, "-m", "mole.cli", "studio", "--port", str(port)]


@pytest.fixture
def studio(home: Path) -> Iterator[Studio]:
    """A studio with an empty home of its own."""
    port = free_port()
    with serve(studio_command(port), port, home) as running:
        yield running


@pytest.fixture(scope="module")
def shared_studio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Studio]:
    """One studio for those tests of a module that leave nothing behind for each other."""
    port = free_port()
    with serve(studio_command(port), port, tmp_path_factory.mktemp("home")) as running:
        yield running


@pytest.fixture
def studio_with_model(embedded_home: Path) -> Iterator[Studio]:
    """A studio in whose home the embedded model is ready."""
    port = free_port()
    with serve(studio_command(port), port, embedded_home) as running:
        yield running


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """Chromium; without one these tests fail, they do not pass unseen."""
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    assert found, "These tests drive a real browser: install chromium (on Debian: apt-get install chromium)."
    with sync_playwright() as driver:
        running = driver.chromium.launch(executable_path=found, args=ARGUMENTS)
        yield running
        running.close()


LEAVING = "addEventListener('beforeunload', () => { console.error = () => {} })"
"""Gradio's client aborts its own stream when a page is left, and reports that as an error."""


@pytest.fixture
def open_page(browser: Browser) -> Iterator[Callable[..., Page]]:
    """`open_page(width=1280, height=900)`: a page of its own; in the end no complaint and no request to elsewhere."""
    contexts: list[Any] = []
    complaints: list[str] = []

    def make(width: int = 1280, height: int = 900) -> Page:
        context = browser.new_context(viewport={"width": width, "height": height})
        contexts.append(context)
        context.add_init_script(LEAVING)
        page = context.new_page()
        page.set_default_timeout(30_000)
        page.on("console", lambda said: said.type == "error" and complaints.append(f"console: {said.text}"))
        page.on("pageerror", lambda error: complaints.append(f"error: {error}"))
        page.on("request", lambda request: is_elsewhere(request.url) and complaints.append(f"left: {request.url}"))
        return page

    yield make
    for context in contexts:
        context.close()
    assert not complaints, complaints


def is_elsewhere(url: str) -> bool:
    return not url.startswith(("http://127.0.0.1", "data:", "blob:"))


@pytest.fixture
def page(open_page: Callable[..., Page]) -> Page:
    """One page, 1280 × 900."""
    return open_page()
