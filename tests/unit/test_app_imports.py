"""The studio starts without torch, `mole` stands without the studio, and the page is there in seconds."""

from __future__ import annotations

import ast
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

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
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)


def test_the_script_a_space_runs_finds_its_packages_from_any_folder(tmp_path: Path) -> None:
    code = f"import runpy; runpy.run_path({str(ROOT / 'app' / 'main.py')!r}, run_name='loaded')['build_page']()"
    subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, check=True, timeout=120)


@pytest.mark.parametrize("path", sources("app/ui"), ids=lambda path: path.name)
def test_the_page_never_imports_torch(path: Path) -> None:
    assert not {name.split(".")[0] for name in imported(path)} & {"torch", "transformers", "peft"}


ROOMS = [["settings"], ["services"], ["views"], ["ui"], ["guard", "page", "main"]]
"""What stands in `app`; each room imports only from itself and from those before it."""


def module_of(path: Path) -> str:
    """The dotted name of a file, e.g. `app.ui.forms`; a package has that of its folder."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def modules_imported(path: Path, modules: set[str]) -> set[str]:
    """The modules of the studio that a file names in an import, anywhere in it: `from app.ui import forms` too."""
    found = set(imported(path))
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{name.name}" for name in node.names}
    return found & modules - {"app", module_of(path)}


def test_the_studio_s_imports_point_one_way() -> None:
    floor = {name: level for level, names in enumerate(ROOMS) for name in names}
    modules = {module_of(path) for path in sources("app")}
    assert {name.split(".")[1] for name in modules - {"app"}} == set(floor)
    up = [
        f"{module} imports {other}"
        for path in sources("app")
        if (module := module_of(path)) != "app"
        for other in modules_imported(path, modules)
        if floor[module.split(".")[1]] < floor[other.split(".")[1]]
    ]
    assert not up, up


def test_no_modules_of_the_studio_import_each_other_in_a_circle() -> None:
    modules = {module_of(path) for path in sources("app")}
    left = {module_of(path): modules_imported(path, modules) for path in sources("app")}
    while free := {module for module, needs in left.items() if not needs & left.keys()}:
        left = {module: needs for module, needs in left.items() if module not in free}
    assert not left, f"these wait for each other: {sorted(left)}"


@pytest.mark.parametrize("path", sources("mole"), ids=lambda path: path.name)
def test_mole_stands_without_the_studio(path: Path) -> None:
    allowed = {"app.main"} if path.name == "studio.py" else set()  # `mole studio` starts it
    assert not {name for name in imported(path) if name.split(".")[0] in ("app", "gradio")} - allowed


def seconds_to_serve(home: Path) -> float:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
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
