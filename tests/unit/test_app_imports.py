"""The studio starts without torch, and the page is there in seconds."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from serving import free_port, is_served, serve

ROOT = Path(__file__).resolve().parents[2]
SECONDS_TO_SERVE = 5.0


def imported(path: Path) -> Iterator[str]:
    """The names of all modules a file imports, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module or ""


def sources(package: str) -> list[Path]:
    found = sorted((ROOT / package).rglob("*.py"))
    assert found
    return found


def test_building_the_page_does_not_import_torch(home: Path) -> None:
    code = """
import sys
import app.main
app.main.build_page()
heavy = {"torch", "transformers", "peft", "datasets"} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=600)


def test_the_script_a_space_runs_finds_its_packages_from_any_folder(tmp_path: Path) -> None:
    code = f"import runpy; runpy.run_path({str(ROOT / 'app' / 'main.py')!r}, run_name='loaded')['build_page']()"
    subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, check=True, timeout=600)


@pytest.mark.parametrize("path", sources("app/ui"), ids=lambda path: path.name)
def test_the_page_never_imports_torch(path: Path) -> None:
    assert not {name.split(".")[0] for name in imported(path)} & {"torch", "transformers", "peft"}


def test_the_studio_starts_on_a_machine_too_busy_to_answer_itself(home: Path) -> None:
    """Gradio gives the page 3 seconds to answer its own request, and raises `ValueError` after that."""
    port = free_port()
    refused = "from gradio import networking; networking.url_ok = lambda url: False"
    code = f"{refused}; from app import main; main.launch(port={port})"
    with serve([sys.executable, "-c", code], port, home) as studio:
        assert is_served(studio.url)


def seconds_to_serve(home: Path) -> float:
    port = free_port()
    command = [sys.executable, "-m", "mole.cli", "studio", "--port", str(port)]
    begun = time.monotonic()
    process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "MOLE_HOME": str(home)}, stdout=subprocess.DEVNULL)
    try:
        while time.monotonic() < begun + 60:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}", timeout=5) as answer:
                    assert b"MoLE Studio" in answer.read()
                return time.monotonic() - begun
            except OSError:
                time.sleep(0.02)
        return float("inf")
    finally:
        process.terminate()
        process.wait(20)


@pytest.mark.timed
def test_the_page_is_served_within_five_seconds(home: Path) -> None:
    taken: list[float] = []
    while len(taken) < 4 and min(taken, default=60) >= SECONDS_TO_SERVE:  # other work on the machine is not our time
        taken.append(seconds_to_serve(home))
    assert min(taken) < SECONDS_TO_SERVE, taken


@pytest.mark.parametrize(
    ("setting", "code", "message"),
    [
        (("GRADIO_SERVER_PORT", "abc"), 2, "argument --port: 'abc' is not a whole number"),
        (("MOLE_HOME", "/proc/nothing"), 1, "No such file or directory: /proc/nothing"),
    ],
)
def test_the_file_that_a_space_starts_refuses_in_one_line(
    home: Path, monkeypatch: pytest.MonkeyPatch, setting: tuple[str, str], code: int, message: str
) -> None:
    monkeypatch.setenv(*setting)
    ended = subprocess.run([sys.executable, str(ROOT / "app/main.py")], capture_output=True, text=True, timeout=6000)
    assert ended.returncode == code
    (line,) = ended.stderr.splitlines()
    assert message in line
