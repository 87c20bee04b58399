"""The main job in a browser: train on one's own file, come back, chat with it, see the routing move, tidy up."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect
from serving import ROOT, Studio

pytestmark = [pytest.mark.ui, pytest.mark.model, pytest.mark.slow]
PICTURE = "document.querySelector('#routing-view .heatmap').toDataURL()"


def own_data(path: Path, rows: int = 50) -> Path:
    """The first rows of the sample data, as a file somebody uploads."""
    lines = (ROOT / "assets" / "data" / "skills_train.jsonl").read_text(encoding="utf-8").splitlines()[:rows]
    assert all(json.loads(line)["completion"] for line in lines)
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def start_training(studio: Studio, page: Page, data: Path, more: Path) -> None:
    studio.open(page)
    with page.expect_file_chooser() as chooser:
        page.click("#upload")
    chooser.value.set_files(data)
    expect(page.locator("#field-data-path input")).to_have_value(re.compile("^mine-"))
    page.click("#add-file")
    with page.expect_file_chooser() as chooser:
        page.click("#file-2-upload")
    chooser.value.set_files(more)
    expect(page.locator("#field-data-path-2 input")).to_have_value(re.compile("^more-"))
    page.fill("#field-data-path-2-weight input", "0.5")
    # So gently trained, the model still tells stories afterwards: a reply of one word would have no routing to watch.
    for field, value in (("max_steps", "4"), ("per_device_train_batch_size", "2"), ("learning_rate", "0.0001")):
        page.fill(f"#field-training-{field} input", value)
    page.fill("#field-adapter-num_experts textarea", "4")
    page.fill("#field-name textarea", "story")
    page.keyboard.press("Tab")
    begun = time.monotonic()
    page.click("#start")
    expect(page.locator("#train-run .name")).to_have_text("story")
    assert time.monotonic() - begun < 20, "Start comes back at once, it does not wait for the training"


def test_train_come_back_chat_and_see_the_routing_move(studio_with_model: Studio, page: Page, tmp_path: Path) -> None:
    studio = studio_with_model
    (tmp_path / "more.csv").write_text("question,answer\nWhat is it?,A dog.\nWhere is it?,At home.\n")
    start_training(studio, page, own_data(tmp_path / "mine.jsonl"), tmp_path / "more.csv")
    assert "run=story" in page.url

    studio.open(page)  # anew, without the run in the address: the page finds the run that is going on
    expect(page.locator("#train-run .name")).to_have_text("story")
    expect(page.locator("#train-run .load")).to_be_visible()
    expect(page.locator("#train-run .state")).to_have_text("finished", timeout=600_000)
    expect(page.locator("#train-run .progress")).to_contain_text("Step 4 of 4")
    expect(page.locator("#train-run [data-tile=eval]")).not_to_have_text("–")
    assert int(page.locator("#train-run .heatmap").get_attribute("data-draws") or 0) > 1

    page.click("#train-chat")
    expect(page.locator("#target input")).to_have_value(re.compile("^story"))
    page.fill("#message textarea", "Write a long story about a dog and a cat.")
    page.keyboard.press("Enter")
    tokens = page.locator("#routing-view .strip span:not(.from-prompt)")
    expect(tokens.nth(2)).to_be_attached()
    early = page.evaluate(PICTURE)
    expect(tokens.nth(6)).to_be_attached()
    page.wait_for_function("(early) => " + PICTURE + " !== early", arg=early)  # the heatmap moves with the tokens
    end_reply(page)
    expect(page.locator("#routing-view .about")).to_contain_text("dynmole on smollm2-135m · 4 experts · 30 layers")
    last = page.evaluate(PICTURE)
    page.locator("#routing-view .strip").focus()
    page.keyboard.press("Home")
    expect(page.locator("#routing-view .summary")).to_contain_text("Token 1")
    page.wait_for_function("(last) => " + PICTURE + " !== last", arg=last)  # another token, another routing

    ask_the_base(page)
    delete_the_run(studio, page)


def end_reply(page: Page) -> None:
    """Stop the reply, unless it has just ended by itself."""
    page.evaluate("document.querySelector('#chat-stop')?.click()")
    expect(page.locator("#chat-stop")).to_be_hidden()


def ask_the_base(page: Page) -> None:
    """The base model answers too, and the view says why there is nothing to see."""
    page.click("#chat-new")
    page.click("#target input")
    page.get_by_role("option", name="Base model: smollm2-135m").click()
    page.fill("#message textarea", "Hello")
    page.keyboard.press("Enter")
    expect(page.locator("#routing-view .empty")).to_contain_text("no experts")
    expect(page.locator("#routing-view .views")).to_be_hidden()
    end_reply(page)


def delete_the_run(studio: Studio, page: Page) -> None:
    """Deleting asks first."""
    page.get_by_role("tab", name="Runs").click()
    expect(page.locator("#run-list button[data-run]")).to_have_attribute("data-run", "story")
    page.click("#runs-delete")
    assert (studio.home / "runs" / "story").is_dir()
    page.click("#runs-delete-yes")
    expect(page.locator("#run-list button[data-run]")).to_have_count(0)
    assert not (studio.home / "runs" / "story").exists()
