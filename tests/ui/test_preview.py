"""The data before the training: rows as tokens, the bad ones by name, columns mapped by hand, and no row is HTML."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Page, expect
from serving import Studio

pytestmark = pytest.mark.ui
VIEW = "#preview-view"
HOSTILE = "<img src=x onerror=\"document.title='taken'\"><b>bold</b>"


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def choose(page: Page, field: str, value: Path) -> None:
    page.fill(f"#field-{field} input", str(value))
    page.keyboard.press("Enter")
    page.keyboard.press("Escape")
    page.keyboard.press("Tab")


def look(page: Page) -> None:
    page.click("#preview")
    expect(page.locator(f"{VIEW} .seen")).to_be_visible()


def test_a_bad_data_set_is_shown_row_by_row(
    shared_studio: Studio, page: Page, tiny_folder: Path, tmp_path: Path
) -> None:
    rows: list[Any] = [{"prompt": f"{HOSTILE} {n}", "completion": f"{n} {HOSTILE}"} for n in range(12)]
    rows[3], rows[8] = {"prompt": "Hi", "completion": None}, ["no object"]
    rows[5] = {"prompt": "long " * 2000, "completion": "yes"}
    shared_studio.open(page)
    choose(page, "data-path", write(tmp_path / "bad.jsonl", rows))
    choose(page, "model-name", tiny_folder)
    expect(page.locator("#model-about")).to_contain_text("A folder on this machine")
    look(page)
    for tile, count in (("used", "9"), ("held", "1"), ("truncated", "1"), ("rejected", "2")):
        expect(page.locator(f'{VIEW} [data-tile="{tile}"]')).to_have_text(count)
    assert page.locator(f"{VIEW} tbody tr").all_inner_texts() == [
        "4\tcompletion is null",
        "9\tis a list, not an object with columns",
    ]
    chips = page.locator(f"{VIEW} .tokens .chip")
    learnt = "".join(page.locator(f"{VIEW} .tokens .learnt").all_text_contents())
    assert learnt.replace("␣", " ") == f"0 {HOSTILE}<|im_end|>"
    assert "".join(chips.all_text_contents()).startswith("<|im_start|>user⏎")
    assert page.locator(f"{VIEW} img, {VIEW} b").count() == 0 and "taken" not in page.title()
    expect(page.locator(f"{VIEW} .spoken")).to_contain_text("Carries loss: 0 <img")
    expect(page.locator(f"{VIEW} .previous")).to_be_disabled()
    for _ in range(4):
        page.click(f"{VIEW} .next")
    expect(page.locator(f"{VIEW} .which")).to_contain_text("Row 6")
    expect(page.locator(f"{VIEW} .tokens .cut")).to_contain_text("of the prompt left out")


def test_data_of_which_nothing_is_left_name_their_rows_too(
    shared_studio: Studio, page: Page, tiny_folder: Path, tmp_path: Path
) -> None:
    shared_studio.open(page)
    choose(page, "model-name", tiny_folder)
    choose(page, "data-path", write(tmp_path / "blank.jsonl", [{"prompt": "Hi", "completion": ""}] * 5))
    page.click("#preview")
    expect(page.locator("#field-data-path .field-message")).to_contain_text("no usable row, 5 rejected")
    expect(page.locator(f"{VIEW} tbody tr")).to_have_count(5)
    expect(page.locator(f"{VIEW} .usable")).to_be_hidden()


def test_columns_are_mapped_by_hand(shared_studio: Studio, page: Page, tiny_folder: Path, tmp_path: Path) -> None:
    rows = [{"situation": f"Say {n}", "what to say": str(n), "id": n} for n in range(9)]
    shared_studio.open(page)
    choose(page, "model-name", tiny_folder)
    choose(page, "data-path", write(tmp_path / "odd.jsonl", rows))
    expect(page.locator("#data-about")).to_contain_text("They fit no known shape")
    page.click("#columns-shape input")
    page.get_by_role("option", name="prompt/completion", exact=True).click()
    for slot, column in ((1, "situation"), (2, "what to say")):
        page.click(f"#column-{slot} input")
        page.get_by_role("option", name=column, exact=True).click()
        expect(page.locator("#field-data-columns textarea")).to_have_value(re.compile(f"{column}"))
    expect(page.locator("#data-about")).to_contain_text("situation as prompt, what to say as completion")
    look(page)
    expect(page.locator(f"{VIEW} .which")).to_contain_text("Row 1")
    assert page.locator(f"{VIEW} .tokens .learnt").all_text_contents() == ["0", "<|im_end|>"]
    choose(page, "data-path", write(tmp_path / "usual.jsonl", [{"question": "Say 1", "reply": "1"}] * 9))
    expect(page.locator(f"{VIEW} .stale")).to_be_visible()
    expect(page.locator("#field-data-columns textarea")).to_have_value("{completion: reply, prompt: question}")


def test_several_files_are_seen_together(shared_studio: Studio, page: Page, tiny_folder: Path, tmp_path: Path) -> None:
    shared_studio.open(page)
    choose(page, "model-name", tiny_folder)
    choose(
        page, "data-path", write(tmp_path / "odd.jsonl", [{"prompt": f"Say {n}", "completion": n} for n in range(9)])
    )
    expect(page.locator("#field-data-path-2")).to_be_hidden()
    for number, name, rows in ((2, "one", [{"text": "x"}, {"text": None}]), (3, "two", [{"what": "y"}] * 4)):
        page.click("#add-file")
        choose(page, f"data-path-{number}", write(tmp_path / f"{name}.jsonl", rows))
    expect(page.locator("#file-2-about")).to_contain_text("Read as text.")
    expect(page.locator("#file-3-about")).to_contain_text("map them under Columns")
    page.click("#preview")
    expect(page.locator("#field-data-path-3-columns .field-message")).to_contain_text("two.jsonl: its columns (what)")
    page.fill("#field-data-path-3-columns textarea", "{text: what}")
    page.fill("#field-data-path-3-weight input", "0.5")
    page.keyboard.press("Tab")
    expect(page.locator("#file-3-about")).to_contain_text("what as text")
    look(page)
    expect(page.locator(f"{VIEW} .sources tbody tr")).to_have_text(
        [re.compile("odd.jsonl.*× 1"), re.compile("one.jsonl.*× 1"), re.compile("two.jsonlas text.*× 0.5")]
    )
    expect(page.locator(f"{VIEW} .refused tbody tr")).to_have_text([re.compile("one.jsonl, 2.*text is null")])
    page.click(f"{VIEW} .next")
    expect(page.locator(f"{VIEW} .which")).to_contain_text("one.jsonl, row 1")
    page.click("#file-2-remove")
    expect(page.locator("#field-data-path-2 input")).to_have_value(str(tmp_path / "two.jsonl"))
    expect(page.locator("#file-3")).to_be_hidden()


def test_a_model_that_is_not_there_is_said_at_once(shared_studio: Studio, page: Page) -> None:
    shared_studio.open(page)
    choose(page, "model-name", Path("/nowhere/model"))
    expect(page.locator("#model-about")).to_contain_text("There is no model at /nowhere/model")
    page.click("#preview")
    expect(page.locator("#field-model-name .field-message")).to_contain_text("no such folder")
