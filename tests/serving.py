"""The studio as its users meet it: a real `mole studio` process; conftest.py offers the fixtures.

def test_something(studio, page):         # a studio with an empty $MOLE_HOME of its own; the page is of browsing.py
    studio.open(page, "tab=chat")
"""

from __future__ import annotations

import os
import random
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from browsing import LOGS, PATIENCE, quiet
from playwright.sync_api import Page

ROOT = Path(__file__).resolve().parents[1]
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
        page.wait_for_selector("body[data-arrived]")
        quiet(page)


WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
PORTS = iter(random.sample(range(20_000 + WORKER % 8, 32_000, 8), 1_500))
"""Ports of this process alone; the system gives none of them to a connection, which could take it before a server."""


def free_port() -> int:
    """A port that nobody has, another one each time."""
    for port in PORTS:
        with socket.socket() as tried:
            try:
                tried.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise AssertionError("there is no free port")


def until(happened: Callable[[], bool], seconds: float = PATIENCE / 1000) -> None:
    """Wait for what no page shows."""
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def is_served(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=60).read()
    except OSError:
        return False
    return True


@contextmanager
def serve(command: list[str], port: int, home: Path, **environment: str) -> Iterator[Studio]:
    """Run a command that serves a page on `port`, until the block ends."""
    begun = time.monotonic()
    log = (home / "studio.log").open("w+")
    settings = {**os.environ, "MOLE_HOME": str(home), "PYTHONUNBUFFERED": "1", **ONE_THREAD, **environment}
    process = subprocess.Popen(command, cwd=ROOT, env=settings, stdout=log, stderr=subprocess.STDOUT)
    url = f"http://127.0.0.1:{port}"
    try:
        until(lambda: is_served(url) or process.poll() is not None)
        assert process.poll() is None, (home / "studio.log").read_text()
        LOGS[url] = home / "studio.log"
        yield Studio(url, home, time.monotonic() - begun)
    finally:
        LOGS.pop(url, None)
        process.terminate()
        process.wait(60)
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
