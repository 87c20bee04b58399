"""The routing view on its own: fast enough, complete, safe with any token text, usable without a mouse."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from .conftest import Studio, free_port, serve
from .routing_page import HOSTILE, PROMPT

pytestmark = pytest.mark.ui
TOKENS = 164
SHAPE = re.compile("16 experts in 32 layers")


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Studio]:
    port = free_port()
    command = [sys.executable, str(Path(__file__).with_name("routing_page.py")), str(port), str(TOKENS)]
    with serve(command, port, tmp_path_factory.mktemp("home")) as running:
        yield running


def play(scratch: Studio, page: Page, button: str, tokens: int) -> None:
    page.goto(scratch.url)
    page.click(button)
    expect(page.locator("#routing-view .strip span")).to_have_count(tokens, timeout=60_000)


def test_ten_updates_a_second_at_32_layers_of_16_experts(scratch: Studio, page: Page) -> None:
    page.goto(scratch.url)
    page.click("#play")
    count = "() => [performance.now(), +(document.querySelector('#routing-view .heatmap').dataset.draws || 0)]"
    page.wait_for_function(f"({count})()[1] > 3")
    begun, before = page.evaluate(count)
    expect(page.locator("#routing-view .strip span")).to_have_count(TOKENS, timeout=60_000)
    ended, after = page.evaluate(count)
    updates = (after - before) / ((ended - begun) / 1000)
    assert updates >= 10, updates
    print(f"{updates:.1f} updates a second")


def test_tokens_whose_delta_was_lost_are_fetched(scratch: Studio, page: Page) -> None:
    play(scratch, page, "#lose", 40)
    shown = page.locator("#routing-view .strip span").all_text_contents()
    assert shown[PROMPT + 2 :] == [f" t{index}" for index in range(PROMPT + 2, 40)]


def test_the_text_of_a_token_is_never_html(scratch: Studio, page: Page) -> None:
    play(scratch, page, "#play", TOKENS)
    assert page.locator("#routing-view .strip span").nth(PROMPT + 1).text_content() == HOSTILE
    assert page.locator("#routing-view img").count() == 0


def test_arrow_keys_and_hovering_choose_the_token_that_is_drawn(scratch: Studio, page: Page) -> None:
    play(scratch, page, "#play", TOKENS)
    strip, summary = page.locator("#routing-view .strip"), page.locator("#routing-view .summary")
    picture = "document.querySelector('#routing-view .heatmap').toDataURL()"
    strip.focus()
    page.keyboard.press("Home")
    expect(summary).to_contain_text("Token 1 “t4”")
    first = page.evaluate(picture)
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    expect(summary).to_contain_text("Token 3 “t6”")
    assert page.evaluate(picture) != first
    strip.locator("span").nth(PROMPT + 6).hover()
    expect(summary).to_contain_text("Token 7")
    page.mouse.move(5, 5)
    expect(summary).to_contain_text("Token 3")
    page.get_by_role("button", name="Whole reply").click()
    expect(summary).to_contain_text(f"Whole reply, {TOKENS - PROMPT} tokens")
    expect(page.locator("#routing-view .heatmap")).to_have_attribute("aria-label", SHAPE)
