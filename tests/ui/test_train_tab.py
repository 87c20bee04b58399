"""The Train tab around its form: presets, `run.yaml` in and out, the queue, grids, and errors that are folded away."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from browsing import quiet
from playwright.sync_api import Page, expect
from serving import Studio, free_port, serve, studio_command, until

from mole import runs
from mole.config import ROUTERS, RunConfig
from mole.core import locks

pytestmark = pytest.mark.ui


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Studio]:
    """One studio for all tests here; its home is theirs too."""
    home, port = tmp_path_factory.mktemp("home"), free_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOLE_HOME", str(home))
        with serve(studio_command(port), port, home) as running:
            yield running


@pytest.fixture
def busy(shared: Studio) -> Iterator[locks.Lock]:
    """The CPU is taken by a run called `other`, until the lock is released: whatever is queued waits."""
    path = runs.device_lock_path("cpu")
    path.parent.mkdir(exist_ok=True)
    lock = locks.acquire(path, run="other")
    assert lock is not None
    yield lock
    for run in runs.waiting_runs():
        runs.stop(run)
    until(lambda: not any(run.held for run in runs.list_runs()))
    lock.release()


def choose(page: Page, field: str, option: str) -> None:
    page.click(f"#{field} input")
    page.get_by_role("option", name=option, exact=True).click()


def fill(page: Page, field: str, text: str) -> None:
    page.locator(f"#field-{field}").locator("input, textarea").first.fill(text)
    page.keyboard.press("Tab")


def settings_of(tiny_folder: Path, tmp_path: Path) -> RunConfig:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "say yes", "completion": "yes"}\n' * 8)
    return RunConfig.from_dict(
        {
            "data": {"path": str(tmp_path / "rows.jsonl")},
            "model": {"name": str(tiny_folder), "device": "cpu"},
            "adapter": {"router": "topp", "top_p": 0.6, "num_experts": 2, "r": 2},
            "training": {"max_steps": 3, "per_device_train_batch_size": 2, "warmup_steps": 1},
        }
    )


def open_with_a_tiny_run(shared: Studio, page: Page, tmp_path: Path, tiny_folder: Path) -> None:
    """The page with the settings of a run that trains in seconds."""
    (tmp_path / "mine.yaml").write_text(settings_of(tiny_folder, tmp_path).to_yaml())
    shared.open(page)
    load(page, tmp_path / "mine.yaml")
    expect(page.locator("#field-model-name input")).to_have_value(str(tiny_folder))


def load(page: Page, path: Path) -> None:
    with page.expect_file_chooser() as chooser:
        page.click("#preset-load")
    chooser.value.set_files(path)


def test_a_preset_fills_the_form_and_names_its_paper(shared: Studio, page: Page) -> None:
    shared.open(page)
    fill(page, "adapter-r", "99")
    choose(page, "preset", "MoLA 2-4-6-8")
    expect(page.locator("#field-adapter-num_experts textarea")).to_have_value("2,4,6,8")
    expect(page.locator("#field-adapter-r input")).to_have_value("8")
    expect(page.locator("#field-training-learning_rate input")).to_have_value("0.0003")
    expect(page.locator("#router-topk")).to_be_visible()
    expect(page.locator("#preset-summary a")).to_have_attribute("href", "https://arxiv.org/abs/2402.08562")
    page.click("#more button.label-wrap")
    expect(page.locator("#field-training-warmup_steps input")).to_have_value("100")
    page.get_by_role("button", name="As a command").click()
    for part in ("--experts 2,4,6,8", "--router topk", "--set training.num_train_epochs=2"):
        expect(page.locator("#command textarea")).to_have_value(re.compile(re.escape(part)))
    choose(page, "preset", "The defaults")
    expect(page.locator("#field-training-warmup_steps input")).to_have_value("4")


def test_ones_own_run_yaml_goes_out_and_comes_in(shared: Studio, page: Page, tmp_path: Path, tiny_folder: Path) -> None:
    given = settings_of(tiny_folder, tmp_path)
    (tmp_path / "mine.yaml").write_text(given.to_yaml())
    shared.open(page)
    load(page, tmp_path / "mine.yaml")
    expect(page.locator("#field-adapter-topp-top_p input[type=number]")).to_have_value("0.6")
    expect(page.locator("#field-model-name input")).to_have_value(str(tiny_folder))
    fill(page, "training-seed", "7")
    with page.expect_download() as download:
        page.click("#preset-save")
    assert download.value.suggested_filename == "run.yaml"
    saved = RunConfig.from_dict(yaml.safe_load(Path(download.value.path()).read_text()))
    assert saved.training.seed == 7 and saved.adapter == given.adapter and saved.data == given.data

    (tmp_path / "wrong.yaml").write_text("adapter: {router: topk, top_p: 0.5}")
    load(page, tmp_path / "wrong.yaml")
    expect(page.locator("#problem [role=alert]")).to_contain_text("wrong.yaml cannot be loaded: adapter.top_p")
    quiet(page)
    expect(page.locator("#field-training-seed input")).to_have_value("7")
    expect(page.locator("#problem [role=alert]")).to_contain_text("wrong.yaml cannot be loaded: adapter.top_p")


def test_once_a_change_is_seen_to_the_page_is_quiet(shared: Studio, page: Page, tmp_path: Path) -> None:
    """A file changes many fields at once, and every one of them wakes the same handlers."""
    shared.open(page)
    (tmp_path / "given.yaml").write_text("adapter: {router: topk}")
    load(page, tmp_path / "given.yaml")
    expect(page.locator("#field-adapter-router input")).to_have_value(ROUTERS["topk"].title)
    quiet(page)
    asked = page.evaluate("calls.begun()")
    page.wait_for_event("requestfinished", lambda request: request.url.endswith("/run/predict"))  # the queue's clock
    assert page.evaluate("calls.begun()") == asked


def test_a_preset_of_ones_own_is_kept_found_again_and_deleted(shared: Studio, page: Page) -> None:
    shared.open(page)
    fill(page, "training-max_steps", "77")
    page.click("#preset-keep")
    page.fill("#preset-name textarea", "mola")
    page.click("#preset-keep-yes")
    expect(page.locator("#preset-name .field-message")).to_contain_text("built-in")
    page.fill("#preset-name textarea", "my-way")
    page.click("#preset-keep-yes")
    expect(page.locator("#preset input")).to_have_value("Yours: my-way")
    shared.open(page)
    choose(page, "preset", "Yours: my-way")
    expect(page.locator("#field-training-max_steps input")).to_have_value("77")
    page.click("#preset-delete")
    expect(page.locator("#preset input")).to_have_value("The defaults")
    assert not list((shared.home / "presets").iterdir())


def test_an_error_in_a_closed_part_is_opened_and_shown(shared: Studio, page: Page) -> None:
    shared.open(page)
    for fold, field in (("more", "training-warmup_steps"), ("losses-dynmole", "adapter-dynmole-z_loss_coef")):
        page.click(f"#{fold} button.label-wrap")
        before = page.input_value(f"#field-{field} input")
        fill(page, field, "-3")
        expect(page.locator("#problem [role=alert]")).to_contain_text("is -3")
        page.click(f"#{fold} button.label-wrap")
        expect(page.locator(f"#field-{field}")).to_be_hidden()
        page.click("#start")
        expect(page.locator(f"#field-{field} .field-message")).to_be_visible()
        expect(page.locator(f"#field-{field} input")).to_be_focused()
        fill(page, field, before)
        expect(page.locator("#problem")).to_be_hidden()


def test_a_queue_of_three_is_put_in_order_and_one_is_taken_out(
    shared: Studio, page: Page, tmp_path: Path, tiny_folder: Path, busy: locks.Lock
) -> None:
    open_with_a_tiny_run(shared, page, tmp_path, tiny_folder)
    for name, behind in (("one", "behind other:"), ("two", "behind other and 1 more"), ("three", "and 2 more")):
        fill(page, "name", name)
        page.click("#start")
        expect(page.locator("#train-run .name")).to_have_text(name)
        expect(page.locator("#start-status")).to_contain_text(behind)
    line = page.locator("#queue li .run")
    expect(line).to_have_text(["one", "two", "three"])
    page.get_by_role("button", name="Move three up").focus()
    page.keyboard.press("Enter")
    expect(line).to_have_text(["one", "three", "two"])
    expect(page.get_by_role("button", name="Move three up")).to_be_focused()
    page.keyboard.press("Enter")
    expect(line).to_have_text(["three", "one", "two"])
    expect(page.get_by_role("button", name="Move three up")).to_be_disabled()
    page.get_by_role("button", name="Take one out of the queue").click()
    expect(line).to_have_text(["three", "two"])
    assert [run.name for run in runs.waiting_runs()] == ["three", "two"]
    line.nth(0).click()
    expect(page.locator("#train-run .name")).to_have_text("three")
    for run in runs.waiting_runs():  # as another page, or the command line, would
        runs.stop(run)
    expect(line).to_have_count(0)


def test_a_grid_is_counted_refused_by_name_and_queued_as_a_group(
    shared: Studio, page: Page, tmp_path: Path, tiny_folder: Path, busy: locks.Lock
) -> None:
    open_with_a_tiny_run(shared, page, tmp_path, tiny_folder)
    page.click("#grid button.label-wrap")
    choose(page, "grid-routers", "Top-p (MixLoRA-dynamic)")
    page.get_by_role("option", name="LoRA", exact=True).click()
    page.keyboard.press("Escape")
    page.fill("#grid-seeds textarea", "0, -1")
    page.keyboard.press("Tab")
    expect(page.locator("#grid-seeds .field-message")).to_contain_text("training.seed=-1 is not possible")
    page.fill("#grid-seeds textarea", "0, 1")
    page.fill("#grid-group textarea", "sweep")
    page.keyboard.press("Tab")
    expect(page.locator("#grid-start")).to_have_text("Queue 4 runs")
    expect(page.locator("#grid-summary")).to_contain_text("sweep-topp-s0")
    page.click("#grid-start")
    names = ["sweep-topp-s0", "sweep-topp-s1", "sweep-lora-s0", "sweep-lora-s1"]
    expect(page.locator("#queue li .run")).to_have_text(names)
    assert {run.group for run in runs.waiting_runs()} == {"sweep"}
    assert runs.get("sweep-topp-s1").config.adapter.to_flat()["top_p"] == 0.6
    page.click("#grid-start")
    expect(page.locator("#grid-group .field-message")).to_contain_text("'sweep-topp-s0' already")
