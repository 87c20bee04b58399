"""A base model whose folder has moved: one line names the flag, with it everything goes on; another model is told."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from mole import runs
from mole.chat.model_cache import ModelCache
from mole.cli.parser import main
from mole.config import ModelConfig, RunConfig
from mole.core.errors import MoleError
from mole.models.moved import noted_base

CPU = ModelConfig(device="cpu", dtype="float32")


@pytest.fixture
def moved(home: Path, tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A finished run `whole` and a stopped one `parts`, whose base model is at the path returned now."""
    from mole.training.trainer import train

    base = shutil.copytree(tiny_folder, tmp_path / "base")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps({"prompt": f"Say {n}", "completion": str(n)}) for n in range(8)))
    for name in ("whole", "parts"):
        config = {
            "name": name, "model": {"name": str(base), "device": "cpu", "dtype": "float32"},
            "data": {"path": str(rows), "eval_fraction": 0}, "adapter": {"num_experts": 2, "r": 2},
            "training": {"max_steps": 4, "per_device_train_batch_size": 2, "save_steps": 1},
        }  # fmt: skip
        run = runs.create(RunConfig.from_dict(config))
        with monkeypatch.context() as patch:
            if name == "parts":
                patch.setattr(runs.Run, "stop_requested", lambda run: run.step >= 2)
            train(run)
    base.rename(tmp_path / "elsewhere")
    return tmp_path / "elsewhere"


def adapter(name: str) -> bytes:
    return (runs.get(name).adapter_dir / "adapter_model.safetensors").read_bytes()


def mole(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    """The exit code, and what was said to stderr."""
    code = main(arguments)
    return code, capsys.readouterr().err


def test_every_command_that_needs_it_names_the_folder_and_the_flag_and_goes_with_it(
    moved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, old = str(tmp_path / "rows.jsonl"), str(tmp_path / "base")
    for command in (
        ["chat", "whole", "--prompt", "say", "--max-new-tokens", "2"],
        ["eval", "whole", "--data", rows, "--limit", "1"],
        ["runs", "continue", "whole", "--steps", "2"],
        ["runs", "resume", "parts"],
    ):
        code, said = mole(capsys, *command)
        assert code == 2 and old in said.splitlines()[-1] and "--base PATH." in said.splitlines()[-1], said
        code, said = mole(capsys, *command, "--base", str(moved))
        assert code == 0 and "not the base model" not in said, said
    assert runs.get("parts").config.model.name == str(moved)
    assert runs.get("whole-2").config.model.name == str(moved)
    assert adapter("parts") == adapter("whole")
    assert runs.load_target("parts", CPU).base == str(moved)  # it is noted


def test_another_model_is_told_and_not_resumed_on(
    moved: Path, tmp_path: Path, tiny_model: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    in_studio = ModelCache().use("whole", CPU)
    with pytest.raises(MoleError, match=r"no such folder.* mole chat whole --base PATH\."), in_studio:
        pass
    other = shutil.copytree(moved, tmp_path / "other")
    tiny_model("llama", seed=1).save_pretrained(other)
    assert noted_base(runs.get("whole").adapter_dir).keys() == {"config.json", "model.safetensors"}
    code, said = mole(capsys, "chat", "whole", "--prompt", "say", "--max-new-tokens", "2", "--base", str(other))
    assert code == 0
    assert f"Note: {other} is not the base model that whole was trained on: other model.safetensors." in said
    before = runs.get("parts").config_path.read_text()
    for command in (["resume", "parts"], ["continue", "whole", "--steps", "1"]):
        code, said = mole(capsys, "runs", *command, "--base", str(other))
        assert code == 2 and "is not the base model that" in said and "model.safetensors" in said, said
        code, said = mole(capsys, "runs", *command, "--base", str(tmp_path / "nowhere"))
        assert code == 2 and f"There is no model at {tmp_path}/nowhere" in said, said
    assert runs.get("parts").config_path.read_text() == before and [run.name for run in runs.list_runs()][2:] == []


def test_a_base_model_alone_has_no_other_place(
    home: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, said = mole(capsys, "chat", f"base:{tiny_folder}", "--prompt", "x", "--base", str(tiny_folder))
    assert code == 2 and "--base is for adapters" in said
