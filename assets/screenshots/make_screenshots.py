"""Take the pictures of the README and of docs/ from a real studio in a real browser.

    python assets/screenshots/make_screenshots.py [NAME …]

Run it from the repository's root with two finished runs or more in $MOLE_HOME; it needs Chromium and the test
dependencies. With names, such as `steering`, only those pictures are taken.
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


def opened(browser: Browser, tab: str) -> Page:
    """A fresh page with a tab in front and the tour put away."""
    page = browser.new_context(viewport=SIZE, device_scale_factor=1).new_page()
    page.set_default_timeout(240_000)
    page.goto(f"{URL}/?tab={tab}")
    page.wait_for_selector("body[data-arrived]")
    page.wait_for_timeout(3000)
    page.get_by_role("button", name="Not now").click()
    return page


def ask(page: Page) -> None:
    """Ask, and wait for the whole reply."""
    page.locator("#message textarea").fill(QUESTION)
    page.keyboard.press("Enter")
    page.locator("#chat-status", has_text="tokens/s").wait_for()
    page.locator("#chat-stop").wait_for(state="hidden")
    page.wait_for_timeout(4000)


def picture(page: Page, name: str) -> None:
    """Save what the page shows."""
    page.wait_for_timeout(800)
    page.screenshot(path=HERE / f"{name}.png")


def chat(browser: Browser) -> None:
    """A reply and the routing of one of its tokens."""
    page = opened(browser, "chat")
    ask(page)
    page.locator("#routing-view .strip span", has_text="London").last.hover()
    picture(page, "chat")


def routing(browser: Browser) -> None:
    """The layers of a token, one of them open, and the reply over time."""
    page = opened(browser, "chat")
    ask(page)
    page.locator("#routing-view .strip span", has_text="London").last.click()
    page.locator("#routing-view .heatmap").click(position={"x": 330, "y": 60})
    page.locator("#routing-view .layer tbody tr").first.wait_for()
    page.locator("#routing-view .summary").evaluate("e => window.scrollBy(0, e.getBoundingClientRect().top - 20)")
    picture(page, "routing")


def steering(browser: Browser) -> None:
    """Two muted experts and another threshold, and the reply with them."""
    page = opened(browser, "chat")
    page.locator("#steering > button").click()
    for expert in (2, 5):
        page.get_by_role("button", name=f"Expert {expert}: as trained").click()
    page.locator("#steer-entropy_threshold").focus()
    for _ in range(60):
        page.keyboard.press("ArrowLeft")
    ask(page)
    picture(page, "steering")


def runs(browser: Browser) -> None:
    """The list and the newest run's curves and routing."""
    page = opened(browser, "runs")
    page.locator("#runs-run .heatmap").first.wait_for()
    picture(page, "runs")


def compare(browser: Browser) -> None:
    """The two newest runs side by side."""
    page = opened(browser, "runs")
    marks = page.locator("#run-list input[aria-label^='Compare ']:not([aria-label^='Compare all '])")
    for place in (0, 1):
        marks.nth(place).click()
    page.locator("#compare .metrics table").wait_for()
    page.wait_for_timeout(2000)
    page.locator("#compare").evaluate("e => window.scrollBy(0, e.getBoundingClientRect().top - 20)")
    picture(page, "compare")


def train(browser: Browser) -> None:
    """The form, and the estimate of what the run takes."""
    page = opened(browser, "train")
    page.get_by_role("button", name="Check before starting").click()
    page.locator("button:disabled", has_text="Check before starting").wait_for()
    page.locator("button:enabled", has_text="Check before starting").wait_for()
    picture(page, "train")


def atlas(browser: Browser) -> None:
    """The demo adapter's atlas."""
    page = opened(browser, "atlas")
    page.locator("#atlas-view table").first.wait_for()
    picture(page, "atlas")


PICTURES = {shown.__name__: shown for shown in (chat, routing, steering, runs, compare, train, atlas)}


def main() -> None:
    """Serve, take the pictures, stop."""
    names = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
    found = next(filter(None, map(shutil.which, names)), None)
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
            for name in sys.argv[1:] or PICTURES:
                PICTURES[name](browser)
    finally:
        studio.terminate()
        studio.wait(20)


if __name__ == "__main__":
    main()
