"""The Runs tab in a browser: find a run, keep it in the address, evaluate it, take it away, delete it."""

from __future__ import annotations

import json
import re
import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Page, expect
from run_configs import finished_run
from serving import Studio, free_port, serve, studio_command

from mole import runs

pytestmark = pytest.mark.ui
ROWS = 12


def train(home: Path, tiny_folder: Path) -> runs.Run:
    """A real run of two steps on the tiny model, with its checkpoint."""
    data = home / "rows.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"Say {n}", "completion": str(n)}) + "\n" for n in range(ROWS)))
    settings = {"data.eval_fraction": 0.2, "training.max_steps": 2, "training.save_steps": 1}
    return finished_run("alpha", tiny_folder, data, experts=2, **settings)


def copy(run: runs.Run, name: str, *, group: str | None = None, failed: bool = False, **made: Any) -> None:
    """Another run's folder, made a little different."""
    shutil.copytree(run.path, run.path.parent / name)
    events = runs.get(name).events()
    events[0] |= {"group": group, **made} if group else made
    if failed:
        shutil.rmtree(run.path.parent / name / "adapter")
        events[-1] |= {"type": "failed", "error": "Out of memory.", "advice": "Use a smaller batch."}
    path = runs.get(name).events_path
    path.write_text("".join(json.dumps(event) + "\n" for event in events), encoding="utf-8")


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Iterator[Studio]:
    """One studio with a handful of runs: alpha, beta, a grid of two and a failed one."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOLE_HOME", str(home))
        alpha = train(home, tiny_folder)
        copy(alpha, "beta", router="dynmole")
        copy(alpha, "grid-s0", group="grid")
        copy(alpha, "grid-s1", group="grid")
        copy(alpha, "hapless", failed=True)
        port = free_port()
        with serve(studio_command(port), port, home) as running:
            yield running


def shown(page: Page) -> list[str | None]:
    """The names of the runs in the list, in order."""
    return [row.get_attribute("data-run") for row in page.locator("#run-list button[data-run]").all()]


def row(page: Page, name: str) -> Any:
    return page.locator(f'#run-list button[data-run="{name}"]')


def test_search_state_and_order_find_a_run(studio: Studio, page: Page) -> None:
    studio.open(page, "tab=runs")
    expect(row(page, "alpha")).to_be_visible()
    assert sorted(map(str, shown(page))) == ["alpha", "beta", "grid-s0", "grid-s1", "hapless"]
    search = page.get_by_label("Search runs")
    search.fill("dynm")
    expect(page.locator("#run-list button[data-run]")).to_have_count(1)
    expect(row(page, "beta")).to_be_visible()
    search.fill("no such run")
    expect(page.locator("#run-list .none")).to_be_visible()
    search.fill("")
    page.locator("#run-list .states label", has_text="Failed").click()
    expect(page.locator("#run-list button[data-run]")).to_have_count(1)
    expect(row(page, "hapless")).to_contain_text("failed")
    page.locator("#run-list .states label", has_text="All").click()
    page.get_by_label("Sort runs by").select_option("name")
    assert shown(page) == ["alpha", "beta", "grid-s0", "grid-s1", "hapless"]


def test_a_groups_runs_stand_together_and_fold(studio: Studio, page: Page) -> None:
    studio.open(page, "tab=runs")
    group = page.locator('#run-list li[data-group="grid"]')
    expect(group.locator("summary")).to_contain_text("2 runs · 2 finished")
    expect(group.locator("button[data-run]")).to_have_count(2)
    group.locator("summary b").click()
    expect(row(page, "grid-s0")).to_be_hidden()
    group.get_by_label("Compare all runs of grid").check()
    expect(page.locator("#run-list .marked")).to_contain_text("2 runs marked for comparison")


def test_the_chosen_run_is_in_the_address_for_a_reload_another_browser_and_back(
    studio: Studio, open_page: Callable[..., Page]
) -> None:
    page = open_page()
    studio.open(page, "tab=runs&run=alpha")
    expect(page.locator("#runs-run .name")).to_have_text("alpha")
    row(page, "beta").click()
    expect(page.locator("#runs-run .name")).to_have_text("beta")
    expect(row(page, "beta")).to_have_attribute("aria-current", "true")
    assert "run=beta" in page.url
    page.reload()
    expect(page.locator("#runs-run .name")).to_have_text("beta")
    other = open_page(width=390)
    other.goto(page.url)
    expect(other.locator("#runs-run .name")).to_have_text("beta")
    row(page, "hapless").click()
    expect(page.locator("#runs-run .name")).to_have_text("hapless")
    page.go_back()
    expect(page.locator("#runs-run .name")).to_have_text("beta")


def test_the_list_is_used_with_the_keyboard_alone(studio: Studio, page: Page) -> None:
    studio.open(page, "tab=runs&run=alpha")
    page.get_by_label("Sort runs by").select_option("name")
    expect(row(page, "alpha")).to_have_attribute("aria-current", "true")
    page.get_by_label("Search runs").focus()
    page.keyboard.press("ArrowDown")
    expect(row(page, "alpha")).to_be_focused()
    page.keyboard.press("Space")
    page.keyboard.press("ArrowDown")
    expect(row(page, "beta")).to_be_focused()
    page.keyboard.press("Space")
    expect(page.locator("#run-list .marked")).to_contain_text("2 runs marked for comparison")
    assert "run=alpha" in page.url, "Space marks, it does not open"
    page.keyboard.press("Enter")
    expect(page.locator("#runs-run .name")).to_have_text("beta")
    page.locator("#run-list .marked input").click()
    expect(page.locator("#run-list .marked")).to_be_hidden()
    expect(page.get_by_label("Compare alpha", exact=True)).not_to_be_checked()


def test_evaluate_a_checkpoint_on_a_file(studio: Studio, page: Page) -> None:
    studio.open(page, "tab=runs&run=alpha")
    page.click("#runs-checkpoint input")
    page.get_by_role("option", name="step-1").click()
    page.get_by_role("button", name="Evaluate on a file").click()
    page.fill("#evaluate-data input", "/nowhere/rows.jsonl")
    page.keyboard.press("Tab")
    page.click("#evaluate-start")
    expect(page.locator("#evaluate-data .field-message")).to_contain_text("There is no file /nowhere/rows.jsonl")
    expect(page.locator("#evaluations tbody tr")).to_have_count(0)
    with page.expect_file_chooser() as chooser:
        page.click("#evaluate-upload")
    chooser.value.set_files(studio.home / "rows.jsonl")
    expect(page.locator("#evaluate-data input")).to_have_value(re.compile("^rows-"))
    page.fill("#evaluate-limit input", "5")
    page.keyboard.press("Tab")
    page.click("#evaluate-start")
    expect(page.locator("#evaluations tr[data-state=finished]")).to_be_visible()
    cells = page.locator("#evaluations tbody td")
    expect(cells.nth(1)).to_have_text("step-1")
    expect(cells.nth(2)).to_have_text("5")
    expect(cells.nth(3)).to_contain_text("exact match")
    expect(row(page, "alpha")).to_contain_text("exact match")
    expect(page.locator("#evaluate-data .field-message")).to_have_count(0)


def test_a_going_evaluation_can_be_cancelled(studio: Studio, page: Page) -> None:
    studio.open(page, "tab=runs&run=beta")
    page.get_by_role("button", name="Evaluate on a file").click()
    page.fill("#evaluate-data input", str(studio.home / "rows.jsonl"))
    page.keyboard.press("Tab")
    page.click("#evaluate-start")
    page.locator("#evaluations").get_by_role("button", name="Cancel").click()
    expect(page.locator("#evaluations tr[data-state=cancelled]")).to_be_visible()
    expect(page.locator("#evaluations").get_by_role("button")).to_have_count(0)


def test_export_downloads_a_zip_of_the_finished_run(studio: Studio, page: Page, tmp_path: Path) -> None:
    studio.open(page, "tab=runs&run=alpha")
    with page.expect_download() as download:
        page.click("#runs-export")
    assert download.value.suggested_filename == "alpha.zip"
    download.value.save_as(tmp_path / "alpha.zip")
    with zipfile.ZipFile(tmp_path / "alpha.zip") as archive:
        assert {"run.yaml", "events.jsonl", "adapter/adapter_model.safetensors"} <= set(archive.namelist())
    row(page, "hapless").click()
    expect(page.locator("#runs-run .name")).to_have_text("hapless")
    expect(page.locator("#runs-export")).to_have_count(0)


def import_file(page: Page, path: Path) -> None:
    with page.expect_file_chooser() as chooser:
        page.click("#runs-import")
    chooser.value.set_files(path)


def test_an_export_is_imported_beside_the_run_it_was_made_of(studio: Studio, page: Page, tmp_path: Path) -> None:
    shutil.make_archive(str(tmp_path / "alpha"), "zip", studio.home / "runs" / "alpha")  # with checkpoints and log
    studio.open(page, "tab=runs&run=hapless")
    import_file(page, tmp_path / "alpha.zip")
    expect(page.locator("#runs-run .name")).to_have_text("alpha-2")
    expect(page.locator(".toast-body")).to_contain_text("is no part of an export and was left out")
    expect(row(page, "alpha-2")).to_contain_text("finished")
    (tmp_path / "other.zip").write_text("no zip")
    import_file(page, tmp_path / "other.zip")
    expect(page.locator(".toast-wrap")).to_contain_text("other.zip cannot be unpacked: File is not a zip file.")
    shutil.rmtree(studio.home / "runs" / "alpha-2")  # the other tests count the runs
    expect(row(page, "alpha-2")).to_have_count(0)


def test_the_settings_and_the_log_of_the_chosen_run_are_there_to_copy(studio: Studio, page: Page) -> None:
    studio.open(page, "tab=runs&run=beta")
    page.get_by_role("button", name="Settings (run.yaml)").click()
    expect(page.locator("#runs-config textarea")).to_have_value(re.compile("per_device_train_batch_size: 2"))
    page.get_by_role("button", name=re.compile("^Log")).click()
    expect(page.locator("#runs-log textarea")).to_have_value(re.compile("finished at step 2"))


def test_a_run_is_deleted_only_when_asked_twice(studio: Studio, page: Page) -> None:
    folder = studio.home / "runs" / "grid-s1"
    studio.open(page, "tab=runs&run=grid-s1")
    expect(page.locator("#runs-run .name")).to_have_text("grid-s1")
    page.click("#runs-delete")
    page.get_by_role("button", name="Keep").click()
    expect(page.locator("#runs-confirm")).to_have_count(0)
    assert folder.is_dir()
    page.click("#runs-delete")
    page.click("#runs-delete-yes")
    expect(row(page, "grid-s1")).to_have_count(0)
    expect(row(page, "grid-s0")).to_be_visible()
    assert not folder.exists()
