"""A run as it goes, in a browser: curves, the routing at any step, alarms, and what went wrong in words."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from browsing import quiet
from playwright.sync_api import Page, expect
from serving import Studio, free_port, serve, studio_command, until

from mole import runs
from mole.config import RunConfig, apply_overrides
from mole.core import locks
from mole.training import worker

pytestmark = pytest.mark.ui
HOSTILE = "CUDA out of memory near <img src=x onerror=\"document.title='owned'\"><script>1</script>"
PICTURE = "document.querySelector('#runs-run %s').toDataURL()"


@pytest.fixture(scope="module")
def make_run(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Iterator[Callable[..., runs.Run]]:
    """`make_run(name, steps, **settings)` in a $MOLE_HOME that the module shares."""
    home = tmp_path_factory.mktemp("home")
    data = home / "rows.jsonl"
    data.write_text("\n".join(json.dumps({"prompt": f"Say {n}", "completion": str(n)}) for n in range(20)))

    def make(name: str, steps: int, **settings: Any) -> runs.Run:
        given = {
            "model.name": str(tiny_folder), "model.device": "cpu", "data.path": str(data), "adapter.num_experts": 4,
            "data.eval_fraction": 0.2, "adapter.r": 2, "training.max_steps": steps, "training.eval_steps": 5,
            "training.per_device_train_batch_size": 2, "training.save_steps": 8, **settings,
        }  # fmt: skip
        config = RunConfig.from_dict(apply_overrides({}, given))
        config.name = name
        return runs.create(config)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOLE_HOME", str(home))
        yield make


@pytest.fixture(scope="module")
def studio(make_run: Callable[..., runs.Run]) -> Iterator[Studio]:
    """One studio with a trained run and two that went wrong."""
    from mole.training.trainer import train

    train(make_run("trained", 30, **{"adapter.router": "topk", "training.learning_rate": 0.05}))
    failed = make_run("broken", 10)
    with worker.logging_to(failed):
        worker.record_failure(failed, RuntimeError(HOSTILE))
    killed = make_run("killed", 10)
    killed.append_event("started", 0, total_steps=10, resumed_from=None)
    port = free_port()
    with serve(studio_command(port), port, runs.home()) as running:
        yield running


def watch(studio: Studio, page: Page, name: str) -> None:
    studio.open(page, f"tab=runs&run={name}")
    expect(page.locator("#runs-run .name")).to_have_text(name)


def test_the_scrubber_shows_the_routing_of_any_step(studio: Studio, page: Page) -> None:
    watch(studio, page, "trained")
    slider, step, now = (page.locator(f"#runs-run {each}") for each in (".when", ".step", ".now"))
    expect(step).to_have_text("Step 30")
    expect(now).to_have_attribute("aria-pressed", "true")
    newest, curve = page.evaluate(PICTURE % ".heatmap"), page.evaluate(PICTURE % ".curve")
    slider.focus()
    page.keyboard.press("Home")
    expect(step).to_have_text("Step 1")
    expect(slider).to_have_attribute("aria-valuetext", "step 1")
    expect(page.locator("#runs-run .load-title")).to_contain_text("at step 1")
    expect(now).to_have_attribute("aria-pressed", "false")
    quiet(page)
    assert page.evaluate(PICTURE % ".heatmap") != newest, "another step, another load"
    assert page.evaluate(PICTURE % ".curve") != curve, "the step is marked in the curve"
    page.keyboard.press("ArrowRight")
    expect(step).to_have_text("Step 2")
    now.click()
    expect(step).to_have_text("Step 30")
    quiet(page)
    assert page.evaluate(PICTURE % ".heatmap") == newest


def test_playing_goes_through_the_training_and_ends_at_now(studio: Studio, page: Page) -> None:
    watch(studio, page, "trained")
    play = page.get_by_role("button", name="Play the training").locator("visible=true")
    play.click()
    expect(page.locator("#runs-run .play")).to_have_attribute("aria-label", "Pause")
    expect(page.locator("#runs-run .now")).to_have_attribute("aria-pressed", "false")
    expect(page.locator("#runs-run .play")).to_have_attribute("aria-label", "Play the training")
    expect(page.locator("#runs-run .step")).to_have_text("Step 30")


def test_the_curves_are_read_step_by_step_with_the_keyboard(studio: Studio, page: Page) -> None:
    watch(studio, page, "trained")
    events = runs.get("trained").events()
    losses = {event["step"]: event["loss"] for event in events if event["type"] == "step"}
    page.locator("#runs-run .curve").focus()
    page.keyboard.press("End")
    readout = page.locator("#runs-run .curve-readout")
    expect(readout).to_contain_text("Step 30: loss")
    expect(readout).to_contain_text("held-out")
    page.keyboard.press("Home")
    expect(readout).to_contain_text("Step 1: loss")
    for _ in range(7):
        page.keyboard.press("ArrowRight")
    expect(readout).to_contain_text("Step 8: loss")
    expect(readout).to_contain_text("checkpoint saved")
    shown = re.search(r"loss ([\d.]+)", readout.inner_text())
    assert shown and float(shown[1]) == pytest.approx(losses[8], abs=1e-3)


def test_a_refresh_and_another_window_show_the_same(studio: Studio, page: Page, open_page: Callable[..., Page]) -> None:
    watch(studio, page, "trained")
    tiles = page.locator("#runs-run .tiles").inner_text()
    assert "–" not in tiles
    expect(page.locator("#runs-run .heatmap")).to_be_visible()
    quiet(page)
    pictures = [page.evaluate(PICTURE % each) for each in (".curve", ".heatmap", ".profile")]
    other = open_page()
    for again in (page, other):
        watch(studio, again, "trained")
        expect(again.locator("#runs-run .tiles")).to_have_text(re.compile(re.escape(tiles.split("\n")[-1])))
        expect(again.locator("#runs-run .heatmap")).to_be_visible()
        quiet(again)
        assert [again.evaluate(PICTURE % each) for each in (".curve", ".heatmap", ".profile")] == pictures


def test_a_failed_run_says_cause_and_advice_and_its_text_stays_text(studio: Studio, page: Page) -> None:
    watch(studio, page, "broken")
    trouble = page.locator("#runs-run .trouble")
    expect(trouble).to_be_visible()
    expect(trouble.locator(".cause")).to_contain_text("Out of memory.")
    expect(trouble.locator(".cause")).to_contain_text("<img src=x")
    expect(trouble.locator(".advice")).to_contain_text("per_device_train_batch_size")
    expect(trouble.locator("pre")).to_be_hidden()
    trouble.locator("summary").click()
    expect(trouble.locator("pre")).to_contain_text("failed: Out of memory.")
    expect(page.locator("#runs-run img, #runs-run script")).to_have_count(0)
    assert page.title() != "owned"
    expect(page.locator("#runs-run .load")).to_be_hidden()
    watch(studio, page, "killed")
    expect(trouble.locator(".advice")).to_contain_text("Press Resume")
    watch(studio, page, "trained")
    expect(trouble).to_be_hidden()


def test_a_run_is_followed_while_it_trains_also_after_the_tab_was_left(
    studio: Studio, make_run: Callable[..., runs.Run], page: Page
) -> None:
    run = make_run("going", 100_000, **{"adapter.router": "threshold", "adapter.threshold": 0.99})
    runs.start(run)
    try:
        watch(studio, page, "going")
        expect(page.locator("#runs-run .load")).to_be_visible()
        alarm = page.locator("#runs-run .alarms li").first
        expect(alarm).to_contain_text("No expert is used")
        expect(alarm).to_contain_text("Try: Lower adapter.threshold to 0.25.")
        expect(page.locator("#runs-run .progress")).to_contain_text(re.compile(r"Step \d+ of 100000 · about .* left"))
        page.get_by_role("tab", name="Train").click()
        expect(page.locator("#start")).to_be_visible()
        left = shown_step(page)
        until(lambda: run.step > left + 20)
        page.get_by_role("tab", name="Runs").click()
        page.wait_for_function(f"({SHOWN}) > {left}")
        left = shown_step(page)
        studio.open(page, "tab=runs&run=going")
        page.wait_for_function(f"({SHOWN}) > {left}")
        assert shown_step(page) <= run.step
        page.click("#runs-stop")
        expect(page.locator("#runs-run .state")).to_have_text("stopped")
        expect(page.locator("#runs-run .step")).to_have_text(f"Step {run.step}")
    finally:
        run.request_stop()


SHOWN = "parseInt((document.querySelector('#runs-run .progress').textContent.match(/Step (\\d+)/) || [0, 0])[1])"


def shown_step(page: Page) -> int:
    return int(page.evaluate(SHOWN))


def test_a_finished_run_is_trained_for_longer_as_a_new_run(studio: Studio, page: Page) -> None:
    watch(studio, page, "trained")
    expect(page.locator("#runs-continue-form")).to_be_hidden()
    page.locator("#runs-continue").click()
    page.locator("#runs-continue-steps input").fill("7")
    with held_cpu():
        page.locator("#runs-continue-start").click()
        expect(page.locator("#runs-run .name")).to_have_text("trained-2")
        expect(page.locator("#runs-run .state")).to_have_text("queued")
        expect(page.locator("#runs-continue-form")).to_be_hidden()
        expect(page.locator("#runs-continue")).to_be_hidden()
        made = runs.get("trained-2")
        assert (made.config.training.max_steps, made.config.training.lr_restarts, made.step) == (37, [30], 30)
        page.locator("#runs-stop").click()
        expect(page.locator("#runs-run .progress")).to_have_text("Step 30 of 37")
    quiet(page)


@contextmanager
def held_cpu() -> Iterator[None]:
    """Another process's lock on the CPU: what is started waits."""
    path = runs.device_lock_path("cpu")
    path.parent.mkdir(exist_ok=True)
    lock = locks.acquire(path, run="elsewhere")
    assert lock is not None
    with lock:
        yield
