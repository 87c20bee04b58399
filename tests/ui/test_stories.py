"""The days a studio is judged by: the page goes away, the studio dies, there is only a keyboard."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Page, expect
from serving import ONE_THREAD, ROOT, Studio, free_port, is_served, serve, studio_command, until

from mole import runs

pytestmark = [pytest.mark.ui, pytest.mark.slow]
ENDLESS = 20_000
"""Steps of a run that is stopped, not waited for."""


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Rows that the tiny model can be trained on."""
    rows = [{"prompt": f"Sort: {n} apple, {n} fig", "completion": f"{n} apple, {n} fig"} for n in range(40)]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


def fill(page: Page, model: Path, data: Path, name: str, steps: int) -> None:
    """The form, for a run of a tiny model."""
    page.get_by_role("tab", name="Train").click()
    for field, value in (("model-name", model), ("data-path", data)):
        page.fill(f"#field-{field} input", str(value))
        page.keyboard.press("Enter")
    page.fill("#field-adapter-num_experts textarea", "4")
    page.fill("#field-training-max_steps input", str(steps))
    page.fill("#field-training-per_device_train_batch_size input", "4")
    page.fill("#field-name textarea", name)
    page.keyboard.press("Tab")


def start(page: Page, model: Path, data: Path, name: str, steps: int) -> None:
    fill(page, model, data, name, steps)
    page.click("#start")
    expect(page.locator("#train-run .name")).to_have_text(name)
    expect(page.locator("#train-run .state")).to_have_attribute("data-state", "running")


def wait_for_steps(name: str, more: int = 5) -> None:
    """Wait until the run has done some more steps."""
    before = runs.get(name).step
    until(lambda: runs.get(name).step >= before + more)


@pytest.fixture
def stop_all(home: Path) -> Iterator[None]:
    """No run is left behind, however the test ends."""
    yield
    for run in runs.list_runs():
        if run.state in ("queued", "running"):
            pid = [event["pid"] for event in run.events() if "pid" in event][-1]
            os.kill(pid, signal.SIGKILL)


@pytest.mark.soak
def test_the_tab_is_closed_and_another_browser_finds_the_run(
    studio: Studio, stop_all: None, open_page: Callable[..., Page], tiny_folder: Path, data: Path
) -> None:
    first = open_page()
    studio.open(first, "tab=train")
    start(first, tiny_folder, data, "left-alone", ENDLESS)
    address = first.url
    first.close()
    wait_for_steps("left-alone", 20)

    second = open_page()
    second.goto(address)
    expect(second.locator("#train-run .name")).to_have_text("left-alone")
    expect(second.locator("#train-run .state")).to_have_attribute("data-state", "running")
    expect(second.locator("#train-run [data-tile=loss]")).not_to_have_text("–")
    shown = second.locator("#train-run .progress").text_content()
    expect(second.locator("#train-run .progress")).not_to_have_text(str(shown))
    second.reload()
    expect(second.locator("#train-run .name")).to_have_text("left-alone")
    second.click("#train-stop")
    expect(second.locator("#train-run .state")).to_have_attribute("data-state", "stopped")
    second.click("#train-resume")
    expect(second.locator("#train-run .state")).to_have_attribute("data-state", "running")
    wait_for_steps("left-alone")


def test_the_studio_is_killed_and_started_again_while_a_run_goes_on(
    home: Path, stop_all: None, open_page: Callable[..., Page], tiny_folder: Path, data: Path
) -> None:
    port = free_port()
    page = open_page()
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    studio = subprocess.Popen(studio_command(port), cwd=ROOT, env={**os.environ, **ONE_THREAD}, **quiet)
    try:
        opened = Studio(f"http://127.0.0.1:{port}", home, 0)
        until(lambda: is_served(opened.url))
        opened.open(page, "tab=train")
        start(page, tiny_folder, data, "survivor", ENDLESS)
        page.close()
    finally:
        studio.kill()
        studio.wait()
    wait_for_steps("survivor", 20)
    pid = next(event["pid"] for event in runs.get("survivor").events() if event["type"] == "started")

    with serve(studio_command(port), port, home) as again:
        page = open_page()
        again.open(page, "tab=train")
        expect(page.locator("#train-run .name")).to_have_text("survivor")
        expect(page.locator("#train-run .state")).to_have_attribute("data-state", "running")
        page.click("#train-stop")
        expect(page.locator("#train-run .state")).to_have_attribute("data-state", "stopped")
        assert not Path(f"/proc/{pid}").exists() or not runs.get("survivor").held
        page.goto("about:blank")


def tab_to(page: Page, selector: str, most: int = 250) -> None:
    """Press Tab until the focus is in an element."""
    inside = "selector => Boolean(document.activeElement && document.activeElement.closest(selector))"
    for _ in range(most):
        if page.evaluate(inside, selector):
            return
        page.keyboard.press("Tab")
    raise AssertionError(f"{selector} cannot be reached with the Tab key")


def test_training_and_chat_need_no_mouse(
    studio: Studio, stop_all: None, page: Page, tiny_folder: Path, data: Path
) -> None:
    studio.open(page, "tab=train")
    for field, value in (("model-name", tiny_folder), ("data-path", data), ("name", "by-hand")):
        tab_to(page, f"#field-{field}")
        page.keyboard.press("Control+a")
        page.keyboard.type(str(value))
        page.keyboard.press("Tab")
    page.evaluate("document.activeElement.blur()")
    tab_to(page, "#field-training-max_steps")
    page.keyboard.press("Control+a")
    page.keyboard.type("6")
    tab_to(page, "#start")
    page.keyboard.press("Enter")
    expect(page.locator("#train-run .state")).to_have_attribute("data-state", "finished")
    tab_to(page, "#train-chat")
    page.keyboard.press("Enter")
    expect(page.locator("#target input")).to_have_value("by-hand · dynmole")
    tab_to(page, "#message")
    page.keyboard.type("Hello")
    page.keyboard.press("Enter")
    expect(page.locator("#routing-view .strip span").first).to_be_attached()
    expect(page.locator("#chat-stop")).to_be_hidden()
    tab_to(page, "#routing-view .strip")
    page.keyboard.press("Home")
    expect(page.locator("#routing-view .summary")).to_contain_text("Token 1")


def test_the_script_in_the_documentation_trains_watches_and_chats(studio: Studio, tiny_folder: Path) -> None:
    """As it stands but for the address, and a tiny base model: the default one is trained in test_story.py."""
    page = (ROOT / "docs" / "python-api.md").read_text(encoding="utf-8")
    (script,) = [block for block in page.split("```python\n") if "gradio_client" in block]
    config, tiny = "config = {", f"config = {{'model': {{'name': {str(tiny_folder)!r}, 'device': 'cpu'}},"
    assert script.count(config) == script.count("http://127.0.0.1:7860") == 1
    code = script.partition("```")[0].replace(config, tiny).replace("http://127.0.0.1:7860", studio.url)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) > 8, done.stdout
