"""Real runs side by side in a browser: numbers, curves, differing settings and routing, in a link to share."""

from __future__ import annotations

import csv
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from browsing import quiet
from playwright.sync_api import Page, expect
from serving import Studio, free_port, serve

from mole import runs
from mole.cli import parser

pytestmark = pytest.mark.ui
HOSTILE = "<img src=x onerror=alert(1)> | **held out**"
TRAINED = {
    "sweep-topk-s0": ["--router", "topk", "--experts", "3", "--seed", "0"],
    "sweep-topk-s1": ["--router", "topk", "--experts", "3", "--seed", "1"],
    "dyn": ["--router", "dynmole", "--experts", "2,4", "--lr", "0.01"],
    "plain": ["--router", "lora"],
}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Iterator[Studio]:
    """The page, in a home with four runs that have really been trained."""
    home = tmp_path_factory.mktemp("home")
    data = home / "rows.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"Say {n}", "completion": str(n)}) + "\n" for n in range(40)))
    common = ["--model", str(tiny_folder), "--data", str(data), "--steps", "6", "--batch-size", "4", "--rank", "2"]
    settings = ["model.device=cpu", "training.eval_steps=2", "data.eval_fraction=0.2"]
    common += [word for setting in settings for word in ("--set", setting)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOLE_HOME", str(home))
        for name, flags in TRAINED.items():
            assert parser.main(["train", "--name", name, *common, *flags]) == 0
        hostile = runs.get("dyn").config_path
        hostile.write_text(hostile.read_text().replace("eval_path: null", f"eval_path: '{HOSTILE}'"))
    port = free_port()
    with serve([sys.executable, str(Path(__file__).with_name("compare_page.py")), str(port)], port, home) as running:
        yield running


def compared(site: Studio, page: Page, *names: str, query: str = "") -> None:
    page.goto(f"{site.url}/?compare={','.join(names)}{query}")
    expect(page.locator("#compare .metrics table")).to_be_visible()


def table(page: Page, name: str) -> dict[str, list[str]]:
    rows = page.locator(f"#compare .{name} tbody tr").all()
    return {row.locator("th").inner_text(): row.locator("td").all_inner_texts() for row in rows}


def test_two_runs_side_by_side(site: Studio, page: Page) -> None:
    compared(site, page, "sweep-topk-s0", "plain")
    metrics, settings = table(page, "metrics"), table(page, "settings")
    assert set(metrics) == {"sweep-topk-s0", "plain"}
    assert all(re.match(r"(★ )?\d", values[0]) for values in metrics.values())
    assert page.locator("#compare .metrics td.best").count() > 2
    assert settings == {
        "adapter.router": ["topk", "lora"],
        "adapter.num_experts": ["3", "1"],
        "adapter.balance_loss_coef": ["0.001", "0"],
        "adapter.renormalize": ["not set", "–"],
        "adapter.top_k": ["2", "–"],
    }
    figures = page.locator("#compare figure")
    expect(figures.nth(0).locator(".readout")).to_contain_text("2 of 3 experts active")
    expect(figures.nth(1)).to_contain_text("LoRA has one expert and no router")


def test_the_curves_are_drawn_and_can_be_read_hidden_and_changed(site: Studio, page: Page) -> None:
    compared(site, page, "dyn", "plain")
    picture = "document.querySelector('#compare .curves').toDataURL()"
    page.wait_for_function("+document.querySelector('#compare .curves').dataset.draws > 0")
    seen = [page.evaluate(picture)]
    for button in ("Time", "Tokens", "Linear", "Log"):
        page.get_by_role("button", name=button, exact=True).click()
        expect(page.get_by_role("button", name=button, exact=True)).to_have_attribute("aria-pressed", "true")
        quiet(page)
        seen.append(page.evaluate(picture))
    assert len(set(seen)) >= 4, "each axis has a picture of its own"
    page.get_by_role("button", name="plain").press("Enter")
    expect(page.get_by_role("button", name="plain")).to_have_attribute("aria-pressed", "false")
    page.wait_for_function(f"last => {picture} !== last", arg=seen[-1])


def test_a_key_pressed_right_after_a_change_of_axis_reads_by_the_new_one(site: Studio, page: Page) -> None:
    compared(site, page, "dyn", "plain")
    page.wait_for_function("+document.querySelector('#compare .curves').dataset.draws > 0")
    page.get_by_role("button", name="Tokens", exact=True).click()
    page.get_by_role("button", name="Steps", exact=True).evaluate(
        """button => {
            button.click();
            const curves = document.querySelector('#compare .curves');
            curves.focus();
            for (let i = 0; i < 4; i++) curves.dispatchEvent(new KeyboardEvent('keydown', { key: 'ArrowRight' }));
        }"""
    )
    expect(page.locator("#compare .curves-readout")).to_have_text(re.compile(r"4 steps: dyn \d.*\(held-out \d"))


def test_seeds_of_a_group_are_one_line_with_mean_and_deviation(site: Studio, page: Page) -> None:
    compared(site, page, "sweep-topk-s0", "plain", "sweep-topk-s1")
    expect(page.locator("#compare h3")).to_have_text("3 runs compared, in 2 groups")
    metrics = table(page, "metrics")
    assert list(metrics)[:3] == ["sweep-topk (n\u00a0=\u00a02)", "sweep-topk-s0 (seed 0)", "sweep-topk-s1 (seed 1)"]
    assert re.search(r"\d ± \d", next(iter(metrics.values()))[0])
    assert table(page, "settings")["training.seed"] == ["0, 1", "0"]
    expect(page.locator("#compare .lines button")).to_have_text(["sweep-topk, mean of 2", "plain"])
    expect(page.locator("#compare figure canvas")).to_have_count(2)


def test_routings_of_different_shapes_share_a_scale_and_the_pointer(site: Studio, page: Page) -> None:
    compared(site, page, "dyn", "sweep-topk-s0")
    canvases, readouts = page.locator("#compare figure canvas"), page.locator("#compare figure .readout")
    canvases.nth(1).hover(position={"x": 60, "y": 30})
    expect(readouts.nth(0)).to_contain_text("Layer 1, expert 2: share")
    expect(readouts.nth(1)).to_contain_text("Layer 1, expert 2: share")
    expect(readouts.nth(1)).to_contain_text("(even: 0.333)")
    canvases.nth(0).hover(position={"x": 60, "y": 75})
    expect(readouts.nth(0)).to_contain_text("Layer 1 has no expert 4")
    expect(readouts.nth(1)).to_contain_text("Mean entropy")


def test_what_a_run_says_is_never_html_nor_markdown(site: Studio, page: Page) -> None:
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    compared(site, page, "dyn", "plain")
    assert table(page, "settings")["data.eval_path"] == [HOSTILE, "not set"]
    assert page.locator("#compare img").count() == 0
    page.get_by_role("button", name="Copy as Markdown").click()
    expect(page.get_by_role("button", name="Copied")).to_be_visible()
    copied = page.evaluate("navigator.clipboard.readText()")
    assert r"| data.eval_path | \<img src=x onerror=alert(1)\> \| \*\*held out\*\*" in copied


def test_the_curves_as_csv_are_those_of_the_events(site: Studio, page: Page) -> None:
    compared(site, page, "dyn", "plain")
    with page.expect_download() as download:
        page.get_by_role("button", name="Curves as CSV").click()
    rows = list(csv.DictReader(download.value.path().open(encoding="utf-8")))
    events = [json.loads(line) for line in (site.home / "runs" / "dyn" / "events.jsonl").open()]
    for kind, type, key in (("training", "step", "loss"), ("held-out", "eval", "eval_loss")):
        told = [(int(row["step"]), float(row["loss"])) for row in rows if (row["run"], row["kind"]) == ("dyn", kind)]
        assert told == [(event["step"], round(event[key], 6)) for event in events if event["type"] == type]


def test_the_address_keeps_the_runs_and_forgets_those_that_are_gone(site: Studio, page: Page) -> None:
    compared(site, page, "dyn", "nobody", "plain")
    expect(page).to_have_url(re.compile(r"compare=dyn,plain$"))
    page.reload()
    expect(page.locator("#compare h3")).to_have_text("2 runs compared")
    page.goto(f"{site.url}/?compare=dyn")
    expect(page.locator("#compare .empty")).to_contain_text("two or more runs")


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_all_runs_fit_the_window(site: Studio, page: Page, theme: str) -> None:
    compared(site, page, *TRAINED, query=f"&__theme={theme}")
    expect(page.locator("#compare .active")).to_be_visible()
    for width in (390, 1280):
        page.set_viewport_size({"width": width, "height": 900})
        assert page.evaluate("document.documentElement.scrollWidth") <= width
