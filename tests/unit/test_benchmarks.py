"""Every benchmark runs, at its smallest, and tells each figure as `make bench` reads it."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

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


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALLEST)
def test_it_runs_and_tells_its_figures(name: str, embedded_home: Path) -> None:
    command = [sys.executable, f"benchmarks/{name}.py", "--json", *SMALLEST[name]]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads(done.stdout)
    assert told["title"] and told["machine"]["torch"] and told["command"].startswith(f"python benchmarks/{name}.py --")
    for figure in told["figures"]:
        assert figure["name"] and figure["low"] <= figure["value"] <= figure["high"], figure
        free = name == "choices" or figure["name"].startswith("slope")  # one round's slope is noise
        assert math.isfinite(figure["value"]) and (free or figure["value"] > 0), figure
        assert (figure["met"] is None) == (not figure["goal"])
