"""The Atlas tab in a browser: the demo's atlas at once, one computed from the page, two side by side, exports."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from browsing import quiet
from playwright.sync_api import Page, expect
from run_configs import finished_run
from serving import Studio, free_port, serve, studio_command

pytestmark = pytest.mark.ui
SKILLS = ("units", "sorting", "tone")


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Iterator[Studio]:
    """A studio with one finished run, `alpha`, whose rows have a skill each."""
    home = tmp_path_factory.mktemp("home")
    data = home / "rows.jsonl"
    rows = [{"prompt": f"Say {n}", "completion": str(n), "skill": SKILLS[n % 3]} for n in range(12)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOLE_HOME", str(home))
        settings = {"adapter.router": "dynmole", "data.eval_path": str(data)}
        finished_run("alpha", tiny_folder, data, experts=2, **settings)
    port = free_port()
    with serve(studio_command(port), port, home) as running:
        yield running


def test_the_demo_s_atlas_is_seen_at_once_and_goes_out_as_one_file(studio: Studio, page: Page, tmp_path: Path) -> None:
    studio.open(page, "tab=atlas")
    view = page.locator("#atlas-view")
    expect(view).to_contain_text("demo: router dynmole, up to 8 experts in 210 projections")
    page.get_by_role("region", name=re.compile("^Bits that the choice of experts tells of skill")).wait_for()
    chosen = view.locator('td.cell button[aria-pressed="true"]')
    expect(chosen).to_have_attribute("title", re.compile("layers.13.self_attn.o_proj"))  # tells most of the skills
    chosen.focus()
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")  # the next projection of the layer
    expect(chosen).to_have_attribute("title", re.compile("layers.13.mlp.gate_proj"))
    expect(chosen).to_be_focused()
    expect(view.locator(".router select")).to_have_js_property("selectedIndex", 13 * 7 + 4)
    with page.expect_download() as download:
        page.click("#atlas-html")
    text = Path(download.value.path()).read_text(encoding="utf-8")
    assert text.startswith("<!doctype html>") and "Atlas of demo" in text
    page.goto("about:blank")


def test_one_is_computed_from_the_page_over_columns_of_a_file_and_set_beside_another(
    studio: Studio, page: Page
) -> None:
    studio.open(page, "tab=atlas")
    page.get_by_role("button", name="Compute an atlas").click()
    expect(page.locator("#atlas-target input")).to_have_value("alpha · dynmole")
    page.fill("#atlas-data input", "/nowhere/rows.jsonl")
    page.keyboard.press("Tab")
    page.click("#atlas-start")
    expect(page.locator("#atlas-data .field-message")).to_contain_text("There is no file /nowhere/rows.jsonl")
    page.click("#atlas-data input")
    page.get_by_role("option", name="This run's held-out file: rows.jsonl").click()
    expect(page.locator("#atlas-by .token")).to_have_text(re.compile("skill"))
    page.click("#atlas-start")
    expect(page.locator("#atlas-jobs tr[data-state=finished]")).to_contain_text("by skill · quick")
    expect(page.locator("#atlas-first input")).to_have_value(re.compile("alpha · rows.jsonl · 12 rows"))
    expect(page.locator("#atlas-view")).to_contain_text("alpha: router dynmole, up to 2 experts in 14 projections")
    expect(page.locator("#atlas-data .field-message")).to_have_count(0)
    page.click("#atlas-second input")
    page.get_by_role("option", name="Demo: four skills").click()
    expect(page.locator("#atlas-first .field-message")).to_contain_text("are not of the same rows")
    quiet(page)
    page.reload()
    expect(page.locator("#atlas-first input")).to_have_value(re.compile("alpha · rows.jsonl · 12 rows"))
