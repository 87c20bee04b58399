"""The preflight in a browser: the estimate, a suggestion that changes the form, real steps, and their end."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect
from serving import Studio

pytestmark = [pytest.mark.ui, pytest.mark.slow]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A small data file."""
    path = tmp_path / "mine.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": f"Say {n} " * 8, "completion": str(n)}) for n in range(1100)))
    return path


def choose(page: Page, field: str, value: str) -> None:
    """Type into a field of the form."""
    page.fill(f"#field-{field} :is(input, textarea)", value)
    page.keyboard.press("Enter" if field in ("model-name", "data-path") else "Tab")


def ready(studio: Studio, page: Page, folder: Path, data: Path, batch: str = "8") -> None:
    """The page with a tiny model and a small file chosen."""
    studio.open(page)
    choose(page, "model-name", str(folder))
    choose(page, "data-path", str(data))
    choose(page, "training-per_device_train_batch_size", batch)


def test_the_estimate_is_there_before_anything_starts_and_again_after_a_refresh(
    shared_studio: Studio, page: Page, tiny_folder: Path, data: Path
) -> None:
    ready(shared_studio, page, tiny_folder, data)
    page.click("#preflight-check")
    expect(page.locator("#preflight .going")).to_be_visible()
    expect(page.locator("#preflight .chip").first).to_have_text("Fits")
    expect(page.locator("#preflight .stack")).to_have_attribute("aria-label", re.compile("base model .*activations"))
    expect(page.locator("#preflight .result > .tiles")).to_contain_text("Trainable parameters")
    expect(page.locator("#preflight .suggestions")).to_be_hidden()
    assert not (shared_studio.home / "runs").exists()

    choose(page, "training-per_device_train_batch_size", "4")
    expect(page.locator("#preflight .result")).to_be_hidden()  # other settings, another answer
    ready(shared_studio, page, tiny_folder, data)
    expect(page.locator("#preflight .chip").first).to_have_text("Fits")


def test_a_suggestion_is_one_click_and_is_checked_at_once(
    shared_studio: Studio, page: Page, tiny_folder: Path, data: Path
) -> None:
    ready(shared_studio, page, tiny_folder, data, batch="1024")
    choose(page, "adapter-num_experts", "16")
    choose(page, "adapter-r", "1024")
    page.click("#preflight-check")
    expect(page.locator("#preflight .chip").first).to_have_text("Does not fit")
    expect(page.locator("#preflight .verdict")).to_contain_text("You can still start the run")
    expect(page.locator("#start")).to_be_enabled()
    suggestion = page.locator("#preflight .suggestions button").first
    expect(suggestion).to_contain_text("accumulated")
    suggestion.click()
    expect(page.locator("#field-training-gradient_accumulation_steps input")).not_to_have_value("1")
    expect(page.locator("#preflight .chip").first).to_have_text(re.compile("Fits|Borderline"))


def test_real_steps_are_measured_and_can_be_ended(
    shared_studio: Studio, page: Page, tiny_folder: Path, data: Path
) -> None:
    ready(shared_studio, page, tiny_folder, data, batch="2")
    page.click("#preflight-measure")
    page.click("#preflight-cancel")
    expect(page.locator("#preflight .going")).to_be_hidden()
    expect(page.locator("#preflight-cancel")).to_be_hidden()
    page.click("#preflight-measure")
    expect(page.locator("#preflight .measured")).to_be_visible()
    expect(page.locator("#preflight .measured")).to_contain_text("tokens/s")
    expect(page.locator("#preflight .verdict")).to_contain_text("Measured")


def test_a_wrong_setting_is_said_at_its_field(shared_studio: Studio, page: Page) -> None:
    shared_studio.open(page)
    page.fill("#field-adapter-num_experts textarea", "0")
    page.click("#preflight-check")
    expect(page.locator("#field-adapter-num_experts .field-message")).to_contain_text("adapter.num_experts is 0")
