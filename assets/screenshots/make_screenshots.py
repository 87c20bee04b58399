"""Take the pictures of the README from a real studio in a real browser.

    python assets/screenshots/make_screenshots.py

Run it from the repository's root with finished runs in $MOLE_HOME; it needs Chromium and the test dependencies.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

from playwright.sync_api import Browser, Page, sync_playwright

HERE = Path(__file__).resolve().parent
PORT = 7941
URL = f"http://127.0.0.1:{PORT}"
QUESTION = "We met Rachel at the station in London. Give name and city as JSON."
SIZE = {"width": 1280, "height": 960}


def opened(browser: Browser, tab: str, theme: str = "light") -> Page:
    """A fresh page with a tab in front and the tour put away."""
    page = browser.new_context(viewport=SIZE, device_scale_factor=1).new_page()
    page.set_default_timeout(120_000)
    page.goto(f"{URL}/?tab={tab}&__theme={theme}")
    page.wait_for_selector("[role=tab]")
    page.wait_for_timeout(3000)
    page.get_by_role("button", name="Not now").click()
    return page


def chat(browser: Browser, theme: str, name: str) -> None:
    """A reply and the routing of one of its tokens."""
    page = opened(browser, "chat", theme)
    page.locator("#message textarea").fill(QUESTION)
    page.keyboard.press("Enter")
    page.get_by_text("tokens/s").wait_for(timeout=120_000)
    page.wait_for_timeout(6000)
    page.locator("#routing-view .strip span", has_text="London").last.hover()
    page.wait_for_timeout(500)
    page.screenshot(path=HERE / name)


def runs(browser: Browser) -> None:
    """The list and the newest run's curves and routing."""
    page = opened(browser, "runs")
    page.locator("#runs-run .heatmap").first.wait_for()
    page.wait_for_timeout(3000)
    page.screenshot(path=HERE / "runs.png")


def train(browser: Browser) -> None:
    """The form, and the estimate of what the run takes."""
    page = opened(browser, "train")
    page.get_by_role("button", name="Check before starting").click()
    page.locator("button:disabled", has_text="Check before starting").wait_for()
    page.locator("button:enabled", has_text="Check before starting").wait_for()
    page.wait_for_timeout(1500)
    page.screenshot(path=HERE / "train.png")


def atlas(browser: Browser) -> None:
    """The demo adapter's atlas."""
    page = opened(browser, "atlas")
    page.locator("#atlas-view table").first.wait_for()
    page.screenshot(path=HERE / "atlas.png")


def main() -> None:
    """Serve, take the pictures, stop."""
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    studio = subprocess.Popen([sys.executable, "-m", "mole.cli", "studio", "--port", str(PORT)])
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(URL, timeout=5).read()
                break
            except OSError:
                time.sleep(0.1)
        with sync_playwright() as driver:
            browser = driver.chromium.launch(executable_path=found, args=["--headless", "--no-sandbox"])
            chat(browser, "light", "chat.png")
            chat(browser, "dark", "chat-dark.png")
            runs(browser)
            train(browser)
            atlas(browser)
    finally:
        studio.terminate()
        studio.wait(20)


if __name__ == "__main__":
    main()
