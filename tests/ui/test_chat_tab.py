"""The Chat tab by hand: mute an expert, change a message, write it anew, stop, compare; nothing fetched, no HTML."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from architectures import with_room
from browsing import quiet
from playwright.sync_api import Locator, Page, expect
from serving import Studio, free_port, serve, studio_command

from app.services.conversation import JOINER
from mole.core import limits

pytestmark = pytest.mark.ui


@pytest.fixture(scope="module")
def chat_studio(tmp_path_factory: pytest.TempPathFactory, tiny_adapter: Path, tiny_folder: Path) -> Iterator[Studio]:
    """A studio with one finished run, `tiny`: a random adapter of 3 experts on a random model."""
    from mole import runs
    from mole.config import AdapterConfig, ModelConfig, RunConfig
    from mole.core import checkpoint

    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOLE_HOME", str(home))
        adapter = AdapterConfig(num_experts=3, r=2)
        base = with_room(tiny_folder, tmp_path_factory.mktemp("long") / tiny_folder.name)
        run = runs.create(RunConfig(name="tiny", model=ModelConfig(name=str(base)), adapter=adapter))

        def copy(aside: Path) -> None:
            shutil.copytree(tiny_adapter, aside, dirs_exist_ok=True)

        checkpoint.write(run.checkpoints_dir, 2, copy)
        checkpoint.write_folder(run.adapter_dir, copy, step=4)
        run.append_event("finished", 4, metrics={})
    port = free_port()
    with serve(studio_command(port), port, home, OMP_NUM_THREADS="1") as running:
        yield running


def open_chat(studio: Studio, page: Page, tokens: int = 6) -> None:
    """The Chat tab with the run chosen and short replies."""
    studio.open(page, "tab=chat")
    choose(page, "#target", re.compile("^.?.?tiny · dynmole"))
    open_part(page, "#chat-options")
    page.locator("#chat-options input[type=number]").first.fill(str(tokens))
    page.keyboard.press("Tab")


def choose(page: Page, box: str, label: Any) -> None:
    page.click(f"{box} input")
    page.locator("[role=option]:visible").filter(has_text=label).first.click()


def open_part(page: Page, part: str) -> None:
    page.locator(f"{part} button").first.click()


def ask(page: Page, text: str) -> None:
    asked = page.locator("#chatbot .user.message")
    before = asked.count()
    page.fill("#message textarea", text)
    page.keyboard.press("Enter")
    expect(asked).to_have_count(before + 1)
    answered(page)


def answered(page: Page) -> None:
    """Wait for the end of the reply that was asked for."""
    quiet(page)
    expect(page.locator("#chat-status")).to_contain_text("tokens/s")
    expect(page.locator("#chat-stop")).to_be_hidden()


def replies(page: Page, chatbot: str = "#chatbot") -> Locator:
    return page.locator(f"{chatbot} .bot.message")


def test_a_muted_expert_has_no_part_in_the_reply_and_the_line_above_says_so(chat_studio: Studio, page: Page) -> None:
    open_chat(chat_studio, page)
    ask(page, "hello")
    trained = replies(page).last.inner_text()
    open_part(page, "#steering")
    chip = page.get_by_role("button", name="Expert 2: as trained")
    chip.focus()
    page.keyboard.press("Space")
    expect(page.get_by_role("button", name="Expert 2: muted")).to_be_focused()
    page.keyboard.press("Tab")
    page.keyboard.press("Space")
    page.keyboard.press("Space")
    expect(page.get_by_role("button", name="Expert 3: pinned")).to_be_visible()
    page.keyboard.press("Space")
    expect(page.locator("#steering-view .said")).to_have_text("1 change for the next reply.")
    ask(page, "hello again")
    expect(replies(page).last).to_contain_text("Routing overrides: expert 2 muted")
    page.get_by_role("button", name="Whole reply", exact=True).click()
    for layer in ("Layer 1", "Layer 2"):
        page.locator("#routing-view .by-layer").select_option(layer)
        expect(page.locator("#routing-view .experts")).to_contain_text("2 · 0 %")
    assert replies(page).last.inner_text() != trained
    page.get_by_role("button", name="As trained", exact=True).click()
    page.locator("#steer-top_p").focus()
    for _ in range(3):
        page.keyboard.press("ArrowLeft")
    expect(page.locator("#steering-view .setting.changed")).to_contain_text("0.735 (trained 0.75)")
    ask(page, "once more")
    expect(replies(page).last).to_contain_text("Routing overrides: top p 0.75 → 0.735")
    assert replies(page).last.inner_text().count("muted") == 0
    expect(page.locator("#routing-view .key-text")).to_contain_text("expert of layer 2, ")  # as chosen for the last one


def test_a_message_is_changed_and_a_reply_is_written_anew(chat_studio: Studio, page: Page) -> None:
    open_chat(chat_studio, page)
    ask(page, "one")
    ask(page, "two")
    first = page.locator("#chatbot .user.message").first
    expect(page.locator("#chatbot .user.message")).to_have_count(2)
    page.get_by_role("button", name="Edit").first.click()
    box = page.locator("#chatbot textarea").first
    box.fill("three")
    page.get_by_role("button", name="Submit").first.click()
    expect(first).to_have_text("three")
    answered(page)
    expect(page.locator("#chatbot .user.message")).to_have_count(1)
    written = replies(page).last.inner_text()
    page.get_by_role("button", name="Retry").click()
    answered(page)
    assert replies(page).last.inner_text() == written, "the same seed"
    page.get_by_role("button", name="Undo").click()
    expect(page.locator("#message textarea")).to_have_value("three")
    expect(page.locator("#chatbot .user.message")).to_have_count(0)


def test_the_conversation_is_saved_with_the_routing_of_its_reply(
    chat_studio: Studio, page: Page, tmp_path: Path
) -> None:
    open_chat(chat_studio, page)
    page.click("#chat-replay")
    expect(page.locator(".toast-body")).to_contain_text("Send a message first")
    ask(page, "one <b>")
    ask(page, "two")
    said, tokens = replies(page).last.inner_text(), page.locator("#routing-view .strip span").all_text_contents()
    with page.expect_download() as download:
        page.click("#chat-replay")
    download.value.save_as(tmp_path / "replay.html")
    page.get_by_role("button", name="Undo").last.click()
    expect(page.locator("#message textarea")).to_have_value("two")
    page.click("#chat-replay")
    expect(page.locator(".toast-body").last).to_contain_text("Send a message first")
    page.goto((tmp_path / "replay.html").as_uri())
    expect(page.locator(".message.user")).to_have_text(["one <b>", "two"])
    expect(page.locator(".message.reply").last).to_have_text(said)
    expect(page.locator("h2")).to_have_text("tiny · dynmole")
    assert page.locator(".strip span").all_text_contents() == tokens


def test_a_reply_is_stopped_and_the_next_one_comes(
    chat_studio: Studio, page: Page, tmp_path: Path, tiny_folder: Path, tiny_model: Callable[..., Any]
) -> None:
    slow = with_room(tiny_folder, tmp_path / "slow", tiny_model("llama", layers=64))  # a whole reply takes a minute
    open_chat(chat_studio, page, tokens=limits.NEW_TOKENS)
    page.fill("#target input", f"base:{slow}")
    page.keyboard.press("Enter")
    page.fill("#message textarea", "go on for ever")
    page.keyboard.press("Enter")
    expect(page.locator("#chat-status")).to_contain_text("tokens/s")
    page.locator("#chat-stop").evaluate("button => button.click()")
    quiet(page)
    expect(page.locator("#chat-stop")).to_be_hidden()
    count = int(page.locator("#chat-status").inner_text().split()[0])
    assert 0 < count < limits.NEW_TOKENS
    page.locator("#chat-options input[type=number]").first.fill("5")
    page.keyboard.press("Tab")
    ask(page, "short")
    expect(page.locator("#chat-status")).to_contain_text("5 tokens")


def test_base_run_and_checkpoint_answer_side_by_side(chat_studio: Studio, page: Page) -> None:
    open_chat(chat_studio, page)
    ask(page, "first, alone")
    alone = replies(page).last.inner_text()
    choose(page, "#compare-with", "Base model: tiny-llama")
    choose(page, "#compare-with", "tiny · step 2")
    page.keyboard.press("Escape")
    expect(page.locator("#lane-3")).to_be_visible()
    expect(page.locator("#routing-view")).to_be_hidden()
    page.get_by_role("button", name="Retry").click()
    status = page.locator("#chat-status")
    expect(status).to_contain_text(re.compile(r"tiny-llama · 6 tokens.*step 2 · 6 tokens", re.DOTALL))
    answered(page)
    answers = [replies(page, bot).last.inner_text() for bot in ("#chatbot", "#chatbot-2", "#chatbot-3")]
    assert answers[0] == answers[2] == alone != answers[1], "the checkpoint is the same adapter; the base is not"
    expect(page.locator("#routing-2 .empty")).to_contain_text("no experts")
    expect(page.locator("#routing-3 .summary")).to_contain_text("Weight of the strongest expert")
    for width in (1280, 390):
        page.set_viewport_size({"width": width, "height": 844})
        assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_html_in_a_message_is_shown_as_it_was_written(chat_studio: Studio, page: Page) -> None:
    open_chat(chat_studio, page)
    text = "<img src=http://elsewhere.example/x.png> ![a](http://elsewhere.example/y.png) <b>bold</b>"
    ask(page, text)
    shown = page.locator("#chatbot .user.message").last.inner_text().replace(JOINER, "")
    assert "<img src=http://elsewhere.example/x.png>" in shown and "<b>bold</b>" in shown
    assert page.locator("#chatbot .message img, #chatbot .message b").count() == 0


def test_what_goes_wrong_is_one_line(chat_studio: Studio, page: Page) -> None:
    open_chat(chat_studio, page)
    page.fill("#target input", "tiny@7")
    page.keyboard.press("Enter")
    page.fill("#message textarea", "hello")
    page.keyboard.press("Enter")
    line = page.locator("#chat-status")
    expect(line).to_contain_text("Not answered. The run tiny has no checkpoint of step 7; checkpoints: tiny@2.")
    expect(page.locator("#message textarea")).to_be_enabled()
