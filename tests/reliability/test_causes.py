"""What a run cannot survive is told with its cause and what to do: NaN, memory, changed data, another base model."""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from forks import Attempt, Make, Whole, finish
from operations import SAVED, killed_before
from test_killed import check_finished

from mole import runs
from mole.config import RunConfig
from mole.core import checkpoint
from mole.runs.run import Run

pytestmark = pytest.mark.slow


def told(run: Run, *words: str) -> None:
    """The run has failed and says these words, in its details and to who asks the command line for it."""
    assert run.state == "failed", run.log_path.read_text()
    details = run.details()
    text = " ".join(filter(None, (details["error"], details["advice"])))
    for word in words:
        assert word in text, text
    assert "\n" not in text and "Traceback" not in text
    shown = subprocess.run([sys.executable, "-m", "mole.cli", "runs", "show", run.name], capture_output=True, text=True)
    assert shown.returncode == 0 and text in shown.stdout


# Numbers


def test_a_loss_that_is_not_finite_stops_the_run_and_leaves_a_finite_checkpoint(make_tiny: Make) -> None:
    """Real steps of an absurd size, a checkpoint at each of them."""
    absurd = {"learning_rate": 1.0, "warmup_steps": 0, "max_grad_norm": 0.0, "save_steps": 1, "save_total_limit": 1}
    changes: dict[str, Any] = {f"training.{key}": value for key, value in absurd.items()}
    run = make_tiny("exploding", **changes, **{"adapter.lora_alpha": 10**25, "training.max_steps": 50})
    assert Attempt(run).code() == 1
    told(run, "lower training.learning_rate", "Start a new run", "checkpoint is kept")
    check_finite(run)
    assert Attempt(run).code() == 1  # it does the same again, and says the same again
    told(run, "lower training.learning_rate")
    check_finite(run)
    assert not run.adapter_dir.exists()


def weights_become_nan(step: int, run: Run) -> None:
    """In the trainer: the optimizer's update of this step spoils a weight, after a loss that was finite."""
    import torch

    update, left = torch.optim.AdamW.step, step

    def spoiling(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal left
        result = update(self, *args, **kwargs)
        left -= 1
        if left == 0:
            self.param_groups[0]["params"][0].data.view(-1)[0] = float("nan")
        return result

    torch.optim.AdamW.step = spoiling  # type: ignore[method-assign]


@pytest.mark.parametrize("step", [6, 12])
def test_weights_that_are_not_finite_never_become_a_checkpoint_or_an_adapter(
    make_tiny: Make, whole: Whole, step: int
) -> None:
    """The loss of a step is taken before its update: at a save, and at the end, it does not know yet."""
    run = make_tiny("spoilt", **{"training.save_total_limit": 1})
    assert Attempt(run, partial(weights_become_nan, step)).code() == 1
    told(run, f"not finite after step {step}")
    assert [saved for saved, _ in checkpoint.steps(run.checkpoints_dir)] == [step - 3]
    check_finite(run)
    finish(run)  # the spoiler is gone
    check_finished(run, whole)


def check_finite(run: Run) -> None:
    from safetensors.torch import load_file

    for _, folder in checkpoint.steps(run.checkpoints_dir):
        assert all(tensor.isfinite().all() for tensor in load_file(folder / "adapter_model.safetensors").values())


# Memory


def little_memory(room: int, run: Run) -> None:
    """In the trainer: no more than `room` MiB beyond what it has now, held by the kernel."""
    status = Path("/proc/self/status").read_text()
    has = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmSize")) << 10
    resource.setrlimit(resource.RLIMIT_AS, (has + (room << 20), resource.RLIM_INFINITY))


@pytest.mark.parametrize("room", [64, 256, 512])
def test_without_memory_a_run_fails_and_says_what_takes_less(make_tiny: Make, tmp_path: Path, room: int) -> None:
    rows = tmp_path / "long.jsonl"
    long = {"prompt": "word " * 400, "completion": "other " * 60}
    rows.write_text((json.dumps(long) + "\n") * 256)
    run = make_tiny("large", **{"training.per_device_train_batch_size": 256, "data.path": str(rows)})
    assert Attempt(run, partial(little_memory, room)).code() == 1
    told(run, "Out of memory", "per_device_train_batch_size", "max_length")


# Changed between stop and resume


@pytest.fixture
def stopped(make_tiny: Make, tmp_path: Path, tiny_folder: Path) -> Run:
    """A run with files of its own, killed in the middle of its second checkpoint."""
    model, rows = tmp_path / "base", tmp_path / "own.jsonl"
    shutil.copytree(tiny_folder, model)
    template = make_tiny("template")
    shutil.copy(template.config.data.path, rows)
    run = make_tiny("stopped", **{"model.name": str(model), "data.path": str(rows)})
    killed_before(SAVED, 1, run)
    assert run.state == "interrupted"
    return run


def refused(run: Run, *words: str) -> None:
    """Resuming is refused with these words, and the checkpoint stays."""
    before = checkpoint.steps(run.checkpoints_dir)
    assert Attempt(runs.get(run.name)).code() in (1, 2)
    told(run, *words)
    assert checkpoint.steps(run.checkpoints_dir) == before
    assert not list(run.checkpoints_dir.glob("*.bad"))


def test_data_that_changed_or_is_gone_is_named_and_resumes_once_it_is_back(stopped: Run, whole: Whole) -> None:
    rows = Path(stopped.config.data.path)
    content = rows.read_text()
    rows.write_text(content.replace("pear", "bear"))
    refused(stopped, "cannot be resumed", f"the content of the training data has changed ({rows})", "new run")
    rows.unlink()
    refused(stopped, str(rows))
    rows.write_text("{")
    refused(stopped, str(rows))
    rows.write_text(content)
    finish(stopped)
    check_finished(stopped, whole)


def test_settings_that_changed_are_named_with_both_values(stopped: Run, whole: Whole) -> None:
    text = stopped.config_path.read_text()
    changed = RunConfig.load(stopped.config_path)
    changed.training.learning_rate, changed.adapter.r, changed.training.seed = 0.001, 4, 7
    stopped.config_path.write_text(changed.to_yaml())
    refused(
        stopped,
        "adapter.r was 2 and is now 4",
        "training.learning_rate was 0.002 and is now 0.001",
        "training.seed was 0 and is now 7",
        "Undo the change, or start a new run",
    )
    free = RunConfig.from_dict({**changed.to_dict(), **{"training": {**changed.to_dict()["training"]}}})
    stopped.config_path.write_text(
        text.replace("save_steps: 3", "save_steps: 5").replace("logging_steps: 1", "logging_steps: 2")
    )
    assert free.training.save_steps == 3
    finish(runs.get("stopped"))
    check_finished(stopped, whole)


def make_wider(folder: Path) -> None:
    """Another model under the same path: twice as wide."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    config.hidden_size, config.intermediate_size, config.head_dim = 64, 128, 16
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def make_other(folder: Path) -> None:
    """Another model under the same path: of the same shape."""
    import torch
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    torch.manual_seed(1)
    save_file(
        {name: torch.randn_like(weight) for name, weight in weights.items()},
        folder / "model.safetensors",
        {"format": "pt"},
    )


def make_other_template(folder: Path) -> None:
    """The same weights with another chat template."""
    path = folder / "chat_template.jinja"
    path.write_text(path.read_text().replace("assistant", "helper"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (make_wider, ("has changed (config.json, model.safetensors)",)),
        (make_other, ("has changed (model.safetensors)",)),
        (make_other_template, ("tokenizer or chat template",)),
    ],
)
def test_another_base_model_under_the_same_path_is_noticed(
    stopped: Run, whole: Whole, tmp_path: Path, change: Any, words: tuple[str, ...]
) -> None:
    model = Path(stopped.config.model.name)
    shutil.copytree(model, tmp_path / "aside")
    change(model)
    refused(stopped, "cannot be resumed", str(model), *words, "start a new run")
    shutil.rmtree(model)
    refused(stopped, str(model))
    (tmp_path / "aside").rename(model)
    finish(stopped)
    check_finished(stopped, whole)


def test_a_checkpoint_of_an_earlier_version_that_tells_less_is_still_taken(stopped: Run, whole: Whole) -> None:
    from mole.training.resume import check_resumable

    folder = checkpoint.newest_good(stopped.checkpoints_dir)
    assert folder is not None
    now = checkpoint.read_manifest(folder).meta
    check_resumable({key: now[key] for key in ("config", "data")}, now)
