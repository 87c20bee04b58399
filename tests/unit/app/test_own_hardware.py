"""The commands for a visitor's own hardware do what the form says: they are run, and read by the real `hf`."""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from app import settings
from app.ui.panels.own_hardware import command_texts
from mole.config import RunConfig, apply_overrides

ROOT = Path(__file__).resolve().parents[3]
SPACE = "someone/mole-studio"
NAME = "try-it"


@pytest.fixture
def space(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The home of a Space."""
    monkeypatch.setenv("SPACE_ID", SPACE)
    return home


def config(**values: Any) -> RunConfig:
    given = {"data.path": str(settings.sample("skills_train.jsonl")), **values}
    return dataclasses.replace(RunConfig.from_dict(apply_overrides({}, given)), name=NAME)


def upload(folder: Path, name: str) -> str:
    (folder / name).write_text('{"prompt": "a", "completion": "b"}\n' * 4)
    return str(settings.keep_upload(str(folder / name)))


def train(command: str, folder: Path, home: Path) -> dict[str, Any]:
    """Run `mole train …` in a folder, up to its first look at the base model → the settings of its run."""
    words = shlex.split(command.replace("\\\n", " "))
    assert words[:2] == ["mole", "train"]
    python = [sys.executable, "-m", "mole.cli", *words[1:]]
    environment = {**os.environ, "MOLE_HOME": str(home), "PYTHONPATH": str(ROOT)}
    subprocess.run(python, cwd=folder, env=environment, check=True, timeout=300)
    found: dict[str, Any] = yaml.safe_load((home / "runs" / NAME / "run.yaml").read_text())
    return found


def test_the_local_command_trains_what_the_form_says(
    space: Path, tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = upload(tmp_path, "my data.jsonl")
    asked = config(
        **{
            "data.path": [str(settings.sample("skills_train.jsonl")), {"path": own, "weight": 2.0}],
            "data.eval_path": own,
        },
        **{"model.name": str(tiny_folder), "adapter.num_experts": 3, "training.max_steps": 1, "data.max_length": 32},
        **{"training.per_device_train_batch_size": 2, "model.device": "cpu"},
    )
    local, _, note = command_texts(asked)
    clone, enter, install, command = local.split("\n", 3)
    assert [clone, enter] == [f"git clone https://huggingface.co/spaces/{SPACE}", "cd mole-studio"]
    assert install == "pip install ."
    folder = tmp_path / "mole-studio"
    (folder / "assets").mkdir(parents=True)
    shutil.copytree(ROOT / "assets" / "data", folder / "assets" / "data")
    assert "copy `my-data.jsonl` into the clone" in note
    shutil.copyfile(own, folder / "my-data.jsonl")
    home = tmp_path / "elsewhere"
    monkeypatch.delenv("SPACE_ID")
    made = train(command, folder, home)
    for section in ("model", "adapter", "training"):
        assert made[section] == asked.to_dict()[section]
    assert made["data"]["path"] == [
        str(folder / "assets" / "data" / "skills_train.jsonl"), {"path": str(folder / "my-data.jsonl"), "weight": 2.0}
    ]  # fmt: skip
    assert (home / "runs" / NAME / "adapter" / "adapter_model.safetensors").is_file()


def test_hf_takes_the_jobs_command(space: Path, tmp_path: Path) -> None:
    """With `--dry-run` the real `hf` reads the command and prints the job, and asks nobody."""
    assert 'name = "mole-studio"' in (ROOT / "pyproject.toml").read_text()  # what --with installs
    own = upload(tmp_path, "it's mine.csv")
    for asked in (config(), config(**{"data.path": own, "adapter.rank_pattern": {"q_proj": 4}})):
        for named in (asked, dataclasses.replace(asked, name=None)):
            job = command_texts(named)[1]
            name = named.name or "my-run"
            command = job.replace("hf jobs uv run", f"{Path(sys.executable).parent}/hf jobs uv run --dry-run")
            nowhere = {
                **os.environ,
                "HF_ENDPOINT": "http://127.0.0.1:9",
                "HF_HOME": str(tmp_path),
                "PATH": "/usr/bin:/bin",
            }
            done = subprocess.run(
                ["bash", "-c", command], cwd=tmp_path, env=nowhere, capture_output=True, text=True, timeout=120
            )
            assert done.returncode == 0, done.stderr
            told = done.stdout
            assert "Job not submitted" in told + done.stderr
            assert re.search(rf"with +mole-studio @ git\+https://huggingface.co/spaces/{SPACE}\n", told)
            assert f"hf://spaces/{SPACE}:/space" in told and "./mole-job:/job:rw" in told
            inside = shlex.split(job.replace("\\\n", " "))[-1]
            assert f"mole runs export {name} /tmp/{name}.zip && cp /tmp/{name}.zip /job/" in inside
            assert f"--name {name}" in inside
            assert (
                "/job/it-s-mine.csv" if asked.data.path == own else "/space/assets/data/skills_train.jsonl"
            ) in inside


def test_elsewhere_the_command_is_for_this_machine(home: Path) -> None:
    (command,) = command_texts(config())
    assert command.startswith("mole train ") and f"--data {settings.sample('skills_train.jsonl')}" in command
