"""Longer training of a finished run: as if it had been planned so, and the finished run stays what it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from run_configs import run_config
from safetensors.torch import load_file

from mole import runs
from mole.config import RunConfig
from mole.core import checkpoint
from mole.core.errors import CheckpointError, ConfigError, RunError
from mole.training.continuing import continue_run
from mole.training.trainer import train


@pytest.fixture
def make_run(home: Path, tiny_folder: Path, tmp_path: Path) -> Any:
    """`make_run(name, **{"training.max_steps": 3})`: a run of a tiny model, with dropout, over several epochs."""
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(json.dumps({"prompt": f"Say {n}", "completion": str(n * n)}) for n in range(12)))

    def make(name: str, **overrides: Any) -> runs.Run:
        settings = {
            "data.eval_fraction": 0.1, "adapter.num_experts": 2, "adapter.r": 2, "adapter.lora_dropout": 0.1,
            "training.max_steps": 5, "training.per_device_train_batch_size": 4, "training.warmup_steps": 1,
            **overrides,
        }  # fmt: skip
        return runs.create(run_config(name, tiny_folder, data, **settings))

    return make


def weights(run: runs.Run) -> bytes:
    return (run.adapter_dir / "adapter_model.safetensors").read_bytes()


def rates(run: runs.Run) -> list[float]:
    """The learning rate of each step."""
    return [event["learning_rate"] for event in run.events() if event["type"] == "step"]


def test_a_restarted_run_is_what_its_settings_say_bit_for_bit_and_the_finished_one_stays(make_run: Any) -> None:
    first = make_run("first")
    train(first)
    before = {path: path.read_bytes() for path in first.path.rglob("*") if path.is_file() and path.name != "run.lock"}
    longer = continue_run(first, 4)
    assert (longer.name, longer.state, longer.step, longer.status()["total_steps"]) == ("first-2", "stopped", 5, 9)
    train(longer, resume=True)
    at_once = make_run("at-once", **{"training.max_steps": 9, "training.lr_restarts": [5]})
    train(at_once)
    assert weights(longer) == weights(at_once) != weights(first)
    assert rates(longer) == rates(at_once) and len(rates(longer)) == 9
    assert longer.config.training == at_once.config.training  # run.yaml trains the same again
    assert longer.state == "finished" and longer.status()["total_steps"] == 9
    assert all(path.read_bytes() == content for path, content in before.items())


def test_an_extended_run_has_the_learning_rate_of_the_longer_plan(make_run: Any) -> None:
    first, planned = make_run("first"), make_run("planned", **{"training.max_steps": 9})
    train(first)
    train(planned)
    longer = continue_run(first, 4, "extend", name="mine")
    train(longer, resume=True)
    assert longer.name == "mine" and longer.config.training == planned.config.training
    assert rates(longer)[:5] == rates(first) and rates(longer)[5:] == rates(planned)[5:]


def test_a_run_may_be_continued_again_and_one_by_epochs_too(make_run: Any) -> None:
    run = make_run("first", **{"training.max_steps": 0, "training.num_train_epochs": 1.0})
    train(run)
    done = run.step
    for more in (2, 3):
        run = continue_run(run, more)
        train(run, resume=True)
    assert run.config.training.lr_restarts == [done, done + 2] and run.step == done + 5
    assert len(rates(run)) == done + 5


def test_a_longer_run_that_is_stopped_at_once_is_resumed(make_run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    first = make_run("first")
    train(first)
    parts, whole = continue_run(first, 4), continue_run(first, 4)
    train(whole, resume=True)
    with monkeypatch.context() as patch:
        patch.setattr(runs.Run, "stop_requested", lambda run: run.step >= 6)
        train(parts, resume=True)
    assert parts.state == "stopped" and 5 < parts.step < 9
    train(parts, resume=True)
    assert weights(parts) == weights(whole)


def test_the_date_that_a_template_writes_stays_that_of_the_first_run(make_run: Any) -> None:
    first = make_run("first")
    train(first)
    assert continue_run(continue_finished(first), 1).begun == first.created


def continue_finished(run: runs.Run) -> runs.Run:
    longer = continue_run(run, 1)
    train(longer, resume=True)
    return longer


def test_what_cannot_be_continued_says_why_in_one_line(make_run: Any) -> None:
    run = make_run("first")
    with pytest.raises(RunError, match="first is queued; only a finished one can be continued. Wait"):
        continue_run(run, 4)
    run.append_event("stopped", 0)
    with pytest.raises(RunError, match="first is stopped; .* Resume it: mole runs resume first"):
        continue_run(run, 4)
    train(run)
    with pytest.raises(ConfigError, match="training.max_steps is 1000000005; it must be .* at most 1e"):
        continue_run(run, 10**9)
    with pytest.raises(RunError, match="There is a run called 'first' already"):
        continue_run(run, 4, name="first")
    text = run.config_path.read_text()
    run.config_path.write_text(text.replace("learning_rate: 0.002", "learning_rate: 0.001"))
    with pytest.raises(CheckpointError, match="cannot be continued, .* training.learning_rate was 0.002"):
        continue_run(runs.get("first"), 4)
    run.config_path.write_text(text)
    (step, folder), *_ = checkpoint.steps(run.checkpoints_dir)
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(RunError, match=rf"checkpoint of its last step is gone or damaged \(.*step-{step}\)"):
        continue_run(runs.get("first"), 4)
    assert [each.name for each in runs.list_runs()] == ["first"]


@pytest.mark.parametrize("restarts", ["0", "5, 3", "5, 5", "40"])
def test_restarts_that_do_not_follow_each_other_are_refused(restarts: str) -> None:
    with pytest.raises(ConfigError, match="training.lr_restarts is .*smaller than training.max_steps"):
        RunConfig.from_dict({"training": {"max_steps": 40, "lr_restarts": restarts}})


def test_the_longer_run_keeps_the_adapter_of_its_first_step(make_run: Any) -> None:
    first = make_run("first")
    train(first)
    longer = continue_run(first, 4)
    (folder,) = [folder for step, folder in checkpoint.steps(longer.checkpoints_dir) if step == 5]
    kept, trained = (load_file(path / "adapter_model.safetensors") for path in (folder, first.adapter_dir))
    assert kept.keys() == trained.keys() and all((kept[name] == trained[name]).all() for name in kept)
