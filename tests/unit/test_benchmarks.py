"""Every benchmark runs, at its smallest, and tells each figure as `make bench` reads it."""

from __future__ import annotations

import concurrent.futures
import io
import json
import math
import os
import runpy
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from mole import models
from mole.core import checkpoint

ROOT = Path(__file__).parents[2]
SMALLEST = {
    "step_time": ["--layers=1", "--length=16", "--rounds=1", "--routers=topk"],
    "memory": ["--layers=1", "--routers=topk", "--lengths=16"],
    "decoding": ["--layers=1", "--tokens=2", "--rounds=1", "--routers=topk"],
    "instruction": ["--layers=1", "--steps=2", "--rounds=1"],
    "choices": ["--layers=1", "--questions=2", "--rounds=1"],
    "growth": ["--layers=1", "--length=16", "--rounds=1"],
    "start_up": ["--rows=100", "--rounds=1"],
    "gpu": ["--hidden=64", "--layers=1", "--length=16", "--tokens=2", "--rounds=1"],
}


def test_none_is_left_out() -> None:
    scripts = {path.stem for path in (ROOT / "benchmarks").glob("*.py")}
    assert scripts - {"common", "report"} == set(SMALLEST)


@pytest.fixture
def small_base(home: Path, embedded_folder: Path) -> None:
    """`smollm2-135m` is its own tokenizer with a random llama: two layers, hidden width 64."""

    def write(folder: Path) -> None:
        tokenizer = AutoTokenizer.from_pretrained(embedded_folder)
        tokenizer.save_pretrained(folder)
        width: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
        settings = LlamaConfig(vocab_size=len(tokenizer), num_hidden_layers=2, **width)
        LlamaForCausalLM(settings).save_pretrained(folder)

    (home / "models").mkdir()
    checkpoint.write_folder(home / "models" / models.EMBEDDED, write, step=0)


def run_here(command: list[str], **_: object) -> SimpleNamespace:
    """`subprocess.run([python, "-c", code, …], stdout=PIPE)` without the process."""
    with redirect_stdout(io.StringIO()) as printed, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", command[1:2] + command[3:])
        exec(command[2], {})
    return SimpleNamespace(stdout=printed.getvalue())


class PoolHere(ThreadPoolExecutor):
    """A pool of processes without the processes."""

    def __init__(self, workers: int, mp_context: object) -> None:
        super().__init__(workers)


@pytest.mark.usefixtures("small_base")
@pytest.mark.parametrize("name", SMALLEST)
def test_it_runs_and_tells_its_figures(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.setattr(sys, "argv", [name, "--json", *SMALLEST[name]])
    monkeypatch.setattr(subprocess, "run", run_here)
    monkeypatch.setattr(concurrent.futures, "ProcessPoolExecutor", PoolHere)
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")  # as memory.py sets it
    runpy.run_path(str(ROOT / "benchmarks" / f"{name}.py"), run_name="__main__")
    told_well(name, capsys.readouterr().out)


@pytest.mark.soak
@pytest.mark.parametrize("name", SMALLEST)
def test_it_runs_as_a_program_with_the_embedded_model(name: str, embedded_home: Path) -> None:
    command = [sys.executable, f"benchmarks/{name}.py", "--json", *SMALLEST[name]]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    told_well(name, done.stdout)


def told_well(name: str, printed: str) -> None:
    """Assert that a benchmark's JSON has a head and figures that make sense."""
    told = json.loads(printed)
    assert told["title"] and told["machine"]["torch"] and told["command"].startswith(f"python benchmarks/{name}.py --")
    for figure in told["figures"]:
        assert figure["name"] and figure["low"] <= figure["value"] <= figure["high"], figure
        free = name == "choices" or figure["name"].startswith("slope")  # one round's slope is noise
        assert math.isfinite(figure["value"]) and (free or figure["value"] > 0), figure
        assert (figure["met"] is None) == (not figure["goal"])
