"""Runs of visitors: what they may train, who sees it, and when it is deleted."""

from __future__ import annotations

import dataclasses
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr
import pytest

from app import settings
from app.services import endpoints, run_control, visitor_limits, visitors
from app.services.chat_targets import chat_targets, check_target
from app.services.listing import ListCursor, Listing
from app.services.live_updates import LiveCursor, run_update
from app.ui.tabs.runs import RunsShown, refresh_runs
from mole import runs
from mole.config import RunConfig, apply_overrides
from mole.core.errors import BusyError, InputError, MoleError, RunError
from mole.runs.targets import locate

NAME = "visitor-" + "0123456789abcdef" * 2


@pytest.fixture
def space(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home of a Space with ZeroGPU."""
    monkeypatch.setenv("SPACE_ID", "someone/mole")
    monkeypatch.setenv("SPACES_ZERO_GPU", "true")
    return home


def sample_config(**values: Any) -> RunConfig:
    """The form as a visitor finds it, with some settings by their dotted names."""
    given = {"data.path": str(settings.sample("skills_train.jsonl")), **values}
    return RunConfig.from_dict(apply_overrides({}, given))


def visitors_run(name: str = NAME, path: str = "") -> runs.Run:
    run = runs.create(dataclasses.replace(sample_config(**({"data.path": path} if path else {})), name=name))
    run.append_event("started", 0, total_steps=3)
    return run


def end(run: runs.Run, seconds_ago: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a run have ended so long ago."""
    with monkeypatch.context() as patch:
        now = time.time()
        patch.setattr(time, "time", lambda: now - seconds_ago)
        run.append_event("finished", 3, metrics={})


# Names -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["visitor-1", NAME[:-1], NAME + "0", NAME.upper(), f"{NAME}\n", f"x{NAME}", "mine", ""]
)
def test_a_name_that_only_resembles_a_visitors_is_listed(name: str) -> None:
    assert not runs.is_unlisted(name)


def test_names_are_of_128_bits_and_never_the_same() -> None:
    names = {runs.unlisted_name() for _ in range(100)}
    assert len(names) == 100
    assert all(runs.is_unlisted(name) and runs.check_name(name) == name for name in names)


def test_no_list_shows_a_visitors_run_and_its_name_finds_it(space: Path) -> None:
    run = visitors_run()
    assert [runs.list_runs(), runs.waiting_runs(), runs.wake_queued(), Listing().rows()] == [[]] * 4
    assert endpoints.api_list_runs() == []
    assert NAME not in str([chat_targets(), Listing().since(ListCursor())])
    with pytest.raises(MoleError) as error:
        locate("visitor-")
    assert NAME not in str(error.value)
    assert runs.get(NAME).path == run.path
    assert runs.list_runs(unlisted=True) == [run]


def test_the_page_of_a_visitor_lists_their_own_run_and_no_other(space: Path) -> None:
    other = "visitor-" + "f" * 32
    visitors_run(), visitors_run(other)
    listed, _, known, *_ = refresh_runs("", RunsShown(), own=[NAME, "visitor-", "../x", None, 7, "visitor-" + "a" * 32])
    assert [row["name"] for row in listed["rows"]] == [NAME]
    runs.delete(runs.get(NAME))
    assert refresh_runs("", known, own=[NAME])[0]["gone"] == [NAME]
    assert [target for _, target in chat_targets([other]) if "visitor" in target] == []  # it has no adapter yet


def test_chat_takes_a_visitors_run_by_its_name_and_nothing_that_resembles_one(space: Path) -> None:
    run = visitors_run()
    check_target(NAME)
    check_target(f"{NAME}@3")
    for target in (
        "visitor-", NAME[:-1], f"{NAME[:-1]}0", f"{NAME}@", f"{NAME}@../../x", f"{NAME}@3@4", f"{NAME}/",
        f"{NAME}/../x", f"./{NAME}", str(run.path), str(run.adapter_dir), f"runs/{NAME}", f" {NAME}", f"{NAME}@٣x",
        f"base:{run.path}",
    ):  # fmt: skip
        with pytest.raises(InputError, match="no such model"):
            check_target(target)


def test_elsewhere_nothing_is_a_visitors(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    visitors_run()
    monkeypatch.setenv("SPACE_ID", "someone/mole")
    assert visitors.own_runs([NAME]) == []
    with pytest.raises(InputError, match="no such model"):
        check_target(NAME)
    with pytest.raises(RunError, match="switched off on this Space"):
        run_control.delete_for_good(NAME)


def test_a_visitor_stops_and_deletes_their_own_run_only(space: Path) -> None:
    run, public = visitors_run(), runs.create(dataclasses.replace(sample_config(), name="public"))
    for action in (run_control.stop_training, run_control.delete_for_good, run_control.resume_training):
        with pytest.raises(RunError, match="Only short training"):
            action("public")
    for action in (run_control.resume_training, lambda name: run_control.continue_training(name, 5)):
        with pytest.raises(RunError, match="Only short training"):
            action(NAME)
    with pytest.raises(gr.Error, match="Only short training"):
        endpoints.api_start_run(sample_config().to_dict())
    with run.lock():
        run_control.stop_training(NAME)
        assert run.stop_requested()
    run_control.delete_for_good(NAME)
    assert runs.list_runs() == [public]
    assert not run.path.exists()


# Bounds ----------------------------------------------------------------------------------------------------


def test_the_form_as_it_is_fits(space: Path) -> None:
    seconds = visitor_limits.check(sample_config())
    assert 20 < seconds <= visitor_limits.MOST_SECONDS
    assert visitors.call_seconds(NAME, seconds) == seconds + visitor_limits.SAVING_SECONDS
    assert visitors.call_seconds(NAME, visitor_limits.MOST_SECONDS) <= 120


def test_as_many_steps_as_allowed_fit_and_one_more_does_not(space: Path) -> None:
    for given in ({}, {"training.gradient_accumulation_steps": 4, "training.eval_steps": 3, "data.max_length": 2048}):
        most = visitor_limits.most_steps(sample_config(**given))
        visitor_limits.check(sample_config(**given, **{"training.max_steps": most}))
        with pytest.raises(
            InputError, match=rf"training.max_steps is {most + 1}; it must be 1 to {most} on this Space"
        ):
            visitor_limits.check(sample_config(**given, **{"training.max_steps": most + 1}))


@pytest.mark.parametrize("longer", [
    {"training.max_steps": 40}, {"training.gradient_accumulation_steps": 2}, {"data.max_length": 1024},
    {"training.per_device_train_batch_size": 64}, {"training.gradient_checkpointing": True},
    {"training.eval_steps": 1}, {"training.save_steps": 1}, {"data.eval_fraction": 0.5},
])  # fmt: skip
def test_what_makes_a_run_longer_makes_its_estimate_longer(space: Path, longer: dict[str, Any]) -> None:
    assert visitor_limits.estimated_seconds(sample_config(**longer)) > visitor_limits.estimated_seconds(sample_config())


@pytest.mark.parametrize(("given", "told"), [
    ({"training.max_steps": 0}, "training.max_steps is 0; it must be 1 to"),
    ({"training.per_device_train_batch_size": 4096}, "training.per_device_train_batch_size is 4096"),
    ({"training.save_total_limit": 3}, "training.save_total_limit is 3; it must be at most 2"),
    ({"adapter.num_experts": 64, "adapter.r": 9}, "adapter.num_experts is 64"),
    ({"adapter.modules_to_save": ["lm_head"]}, "adapter.modules_to_save"),
    ({"adapter.init_from": NAME}, "adapter.init_from"),
    ({"adapter.rank_pattern": {"q_proj": 900}}, "adapter.rank_pattern"),
    ({"model.name": "someone/other"}, "default model only"),
    ({"model.dtype": "float32"}, "default model only"),
    ({"data.path": "/etc/passwd"}, "samples and uploaded files only"),
    ({"data.path": "someone/data"}, "samples and uploaded files only"),
    ({"data.eval_path": "/etc/passwd"}, "samples and uploaded files only"),
    ({"data.path": ""}, "Choose the sample or upload a file"),
])  # fmt: skip
def test_a_setting_beyond_the_bounds_is_named(space: Path, given: dict[str, Any], told: str) -> None:
    with pytest.raises(MoleError, match=told):
        visitors.create_run(lambda: sample_config(**given), [])
    assert runs.list_runs(unlisted=True) == []


def test_an_upload_is_as_small_as_told_and_not_compressed(space: Path, tmp_path: Path) -> None:
    def upload(name: str, size: int) -> dict[str, Any]:
        (tmp_path / name).write_bytes(b"x" * size)
        return {"data.path": str(settings.keep_upload(str(tmp_path / name)))}

    half = visitor_limits.DATA_BYTES // 2
    both = {**upload("a.jsonl", half), "data.eval_path": upload("b.jsonl", half)["data.path"]}
    visitor_limits.check_data(sample_config(**both).data)
    for given, told in (
        ({**both, **upload("c.jsonl", half + 1)}, "at most 2.1 MB|at most 2 MB"),
        (upload("d.jsonl.gz", 10), "compressed"),
        (upload("e.parquet", 10), "compressed"),
        ({"data.path": str(settings.uploads_folder())}, "no such file"),
    ):
        with pytest.raises(InputError, match=told):
            visitor_limits.check_data(sample_config(**given).data)


def test_the_name_of_an_upload_tells_nothing_to_who_has_not_the_file(space: Path, tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text('{"text": "mine"}\n')
    kept = settings.keep_upload(str(tmp_path / "data.jsonl"))
    assert len(kept.stem.removeprefix("data-")) == 32


# Starting --------------------------------------------------------------------------------------------------


def test_one_visitor_trains_one_run_at_a_time_and_does_not_wait_for_another(
    space: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(visitors, "check_inputs", lambda config: None)  # reads the sample in a process of its own
    first, _ = visitors.create_run(sample_config, [])
    with pytest.raises(BusyError, match="one run at a time"):
        visitors.create_run(sample_config, [first.name])
    second, _ = visitors.create_run(lambda: sample_config(), None)
    assert first.name != second.name
    end(first, 0, monkeypatch)
    visitors.create_run(sample_config, [first.name])
    monkeypatch.setattr(visitors, "MOST_RUNS", 3)
    with pytest.raises(BusyError, match="3 runs of visitors are kept"):
        visitors.create_run(sample_config, [])


@pytest.mark.parametrize("error", [
    gr.Error("You have exceeded your ZeroGPU quota (60s requested vs. 0s left).\nTry again in 1:00:00."),
    RuntimeError("Connection closed by visitor while queueing"),
])  # fmt: skip
def test_a_visitor_without_quota_is_told_in_one_line_and_no_run_is_left(
    space: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    run = runs.create(dataclasses.replace(sample_config(), name=NAME))
    monkeypatch.setattr(visitors, "prepare", lambda model: None)
    monkeypatch.setattr(visitors, "train_here", raising(error))
    with pytest.raises(RunError, match=r"The run was not started: (You have exceeded .* Try again|Connection closed)"):
        visitors.train(NAME, 30)
    assert not run.path.exists()
    run = visitors_run()
    with pytest.raises(RunError, match="interrupted, its GPU was taken away: [^\n]*$"):
        visitors.train(NAME, 30)
    assert run.state == "interrupted"
    assert "Resume" not in str(run_update(run, LiveCursor()))  # which no visitor can press


def raising(error: Exception) -> Callable[..., None]:
    def refuse(*_: Any) -> None:
        raise error

    return refuse


# Deleting --------------------------------------------------------------------------------------------------


def test_an_hour_after_its_end_a_visitors_run_is_deleted_and_nobody_elses(
    space: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, fresh, mine = visitors_run(), visitors_run("visitor-" + "1" * 32), visitors_run("visitor-1")
    end(old, 3700, monkeypatch), end(fresh, 3500, monkeypatch), end(mine, 10**6, monkeypatch)
    with old.lock():
        visitors.sweep()
    assert old.path.exists()  # a process still has it
    visitors.sweep()
    assert sorted(path.name for path in runs.runs_dir().iterdir()) == ["visitor-1", fresh.name]


def test_uploads_that_no_run_uses_are_deleted_an_hour_after_the_upload(
    space: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = {}
    for name in ("gone", "public", "fresh", "both", "unused"):
        (tmp_path / f"{name}.jsonl").write_text(name)
        kept[name] = settings.keep_upload(str(tmp_path / f"{name}.jsonl"))
        os.utime(kept[name], (time.time() - 4000,) * 2)
    os.utime(kept["fresh"])
    public = sample_config(**{"data.path": [str(kept["public"]), {"path": str(kept["both"])}]})
    runs.create(dataclasses.replace(public, name="public"))
    end(visitors_run(NAME, str(kept["gone"])), 3700, monkeypatch)
    end(visitors_run("visitor-" + "2" * 32, str(kept["both"])), 3700, monkeypatch)
    settings.keep_upload(str(tmp_path / "unused.jsonl"))  # again: its hour begins again
    visitors.sweep()
    left = {name for name, path in kept.items() if path.exists()}
    assert left == {"public", "fresh", "both", "unused"}


def test_uploads_stay_while_it_is_unknown_what_a_run_uses(space: Path, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("a")
    kept = settings.keep_upload(str(tmp_path / "a.jsonl"))
    os.utime(kept, (0, 0))
    run = runs.create(dataclasses.replace(sample_config(), name="damaged"))
    run.config_path.write_text("model: [", encoding="utf-8")
    visitors.sweep()
    assert kept.exists()
    shutil.rmtree(run.path)
    visitors.sweep()
    assert not kept.exists()
