"""The page itself: what it shows, what it refuses, and that it needs nobody else."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
from browsing import quiet
from gradio_client import Client
from playwright.sync_api import Page, expect
from serving import Studio, free_port, serve, studio_command

from mole.config import ROUTERS

pytestmark = pytest.mark.ui


def choose_router(page: Page, title: str) -> None:
    page.click("#field-adapter-router input")
    page.get_by_role("option", name=title, exact=True).click()


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_every_tab_fits_its_window_and_needs_no_other_host(shared_studio: Studio, page: Page, theme: str) -> None:
    shared_studio.open(page, f"__theme={theme}")
    for tab, card in (("Train", "#start"), ("Runs", "#run-list"), ("Chat", "#message"), ("Atlas", "#atlas-view table")):
        page.get_by_role("tab", name=tab).click()
        expect(page.locator(card).first).to_be_visible()
        quiet(page)
        for width in (390, 1280):
            page.set_viewport_size({"width": width, "height": 900})
            assert page.evaluate("document.documentElement.scrollWidth") <= width


RECORD_ADDRESSES = """window.addresses = []; const replace = history.replaceState;
    history.replaceState = (...given) => { addresses.push(String(given[2])); replace.apply(history, given); };
"""
ANSWER_TRAIN_LATE = """const fetched = window.fetch;  // holds the answer for the first tab until another is shown
    window.fetch = async (...given) => {
      const body = typeof given[1]?.body === "string" ? JSON.parse(given[1].body) : {};
      const asking = window.gradio_config?.components.find(({ id }) => id === body.trigger_id);
      const answer = await fetched(...given);
      while (asking?.props.label === "Train" && !addresses.length) await new Promise((done) => setTimeout(done, 20));
      return answer;
    };"""


def test_the_address_tells_the_tab_at_any_moment(shared_studio: Studio, page: Page) -> None:
    """Whoever reloads, or copies the address, before the page has come to rest gets the same tab."""
    page.add_init_script(RECORD_ADDRESSES)
    shared_studio.open(page, "tab=runs")
    expect(page.locator("#run-list")).to_be_visible()
    assert all("tab=runs" in address for address in page.evaluate("addresses"))
    page.get_by_role("tab", name="Chat").click()
    page.wait_for_url("**/?tab=chat*")
    page.reload()
    expect(page.locator("#message")).to_be_visible()


def test_a_late_answer_for_another_tab_leaves_the_address(shared_studio: Studio, page: Page) -> None:
    page.add_init_script(RECORD_ADDRESSES + ANSWER_TRAIN_LATE)
    shared_studio.open(page, "tab=runs")
    page.wait_for_function("addresses.length === 2")  # of the tab that is shown, and of the late answer
    assert all("tab=runs" in address for address in page.evaluate("addresses"))


def test_each_router_shows_its_own_fields_only(shared_studio: Studio, page: Page) -> None:
    shared_studio.open(page)
    for name, params in reversed(ROUTERS.items()):
        choose_router(page, params.title)
        expect(page.locator("#router-summary")).to_contain_text(params.summary.split(":")[0][:40])
        expect(page.locator(f"#router-{name}")).to_be_visible()
        shown = page.locator(".own-fields").evaluate_all("all => all.filter(e => e.offsetParent).map(e => e.id)")
        assert shown == [f"router-{name}"]
        page.locator(f"#router-{name}").get_by_role("button", name="Loss weights").click()
        for item in dataclasses.fields(params):
            expect(page.locator(f"#field-adapter-{name}-{item.name}")).to_have_count(1)


def test_a_wrong_value_is_said_beside_its_field_and_nothing_starts(shared_studio: Studio, page: Page) -> None:
    shared_studio.open(page)
    page.fill("#field-adapter-num_experts textarea", "0")
    page.click("#start")
    message = page.locator("#field-adapter-num_experts .field-message")
    expect(message).to_contain_text("adapter.num_experts is 0")
    expect(page.locator("#problem [role=alert]")).to_contain_text("at least 1")
    assert not (shared_studio.home / "runs").exists()
    page.fill("#field-adapter-num_experts textarea", "2,4")
    page.keyboard.press("Tab")
    expect(message).to_have_count(0)


def test_a_bad_row_of_an_uploaded_file_is_said_by_its_line(shared_studio: Studio, page: Page, tmp_path: Path) -> None:
    rows = [json.dumps({"prompt": f"Say {n}", "completion": str(n)}) for n in range(9)]
    rows[6] = '{"prompt": "broken'
    (tmp_path / "mine.jsonl").write_text("\n".join(rows), encoding="utf-8")
    shared_studio.open(page)
    with page.expect_file_chooser() as chooser:
        page.click("#upload")
    chooser.value.set_files(tmp_path / "mine.jsonl")
    expect(page.locator("#field-data-path input")).to_have_value(re.compile("^mine-.*jsonl"))
    page.click("#start")
    expect(page.locator("#field-data-path .field-message")).to_contain_text("line 7")


def test_the_command_line_follows_the_form(shared_studio: Studio, page: Page) -> None:
    shared_studio.open(page)
    choose_router(page, ROUTERS["topk"].title)
    page.fill("#field-adapter-topk-top_k input", "3")
    page.fill("#field-training-max_steps input", "7")
    page.keyboard.press("Tab")
    page.get_by_role("button", name="As a command").click()
    command = page.locator("#command textarea")
    for part in ("mole train", "--router topk", "--set adapter.top_k=3", "--steps 7"):
        expect(command).to_have_value(re.compile(re.escape(part)))


def test_on_a_space_training_is_locked_and_the_page_says_what_to_do(home: Path, page: Page) -> None:
    port = free_port()
    with serve(studio_command(port), port, home, SPACE_ID="someone/mole") as space:
        space.open(page)
        expect(page.locator("#space-notice")).to_contain_text("huggingface.co/spaces/someone/mole?duplicate=true")
        expect(page.locator("#start")).to_be_disabled()
        page.get_by_role("tab", name="Atlas").click()
        expect(page.locator("#atlas-view")).to_contain_text("demo: router dynmole")
        page.get_by_role("button", name="Compute an atlas").click()
        expect(page.locator("#atlas-start")).to_be_disabled()
        client = Client(space.url, verbose=False)
        with pytest.raises(Exception, match="switched off on this Space"):
            client.predict({"data": {"path": "assets/data/skills_train.jsonl"}}, api_name="/start_run")
        with pytest.raises(Exception, match="no such model"):
            client.predict("base:/etc", "hello", api_name="/chat")
        assert not (home / "runs").exists()
        page.goto("about:blank")
