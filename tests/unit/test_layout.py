"""The order of the packages: what each room may import, deferred and type-checking imports included, and no circles."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROOMS = (
    "core", "config", "data", "mixture", "models", "runs", "chat", "training", "evaluation", "preflight", "analysis",
    "cli",
)  # fmt: skip
"""The packages of `mole`; each imports only from those before it."""
STUDIO = {"settings": 0, "services": 1, "views": 2, "ui": 3, "guard": 4, "page": 4, "main": 4, "replay": 4}
"""The same for `app`; what has the same number may import each other."""


def module_name(path: Path) -> str:
    """The dotted name of a file, e.g. `mole.runs.store`; of an `__init__.py`, its package's."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


FILES = {module_name(path): path for folder in ("mole", "app") for path in sorted((ROOT / folder).rglob("*.py"))}


def imported_modules(path: Path) -> Iterator[str]:
    """Every module of this project that a file imports, anywhere in it: `from mole.runs import store` too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute here"
            inside = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in FILES else str(node.module) for name in inside]
        else:
            continue
        yield from (name for name in names if name in FILES)


ARROWS = {name: set(imported_modules(path)) - {name} for name, path in FILES.items()}


def room(module: str) -> int:
    """The place of a module's package in `ROOMS`; -1 for `mole` itself; `python -m mole` is above all of them."""
    return [*ROOMS, "__main__"].index(module.split(".")[1]) if module.count(".") else -1


def test_every_package_of_the_library_is_a_room() -> None:
    assert {path.parent.name for path in (ROOT / "mole").glob("*/__init__.py")} == set(ROOMS)


@pytest.mark.parametrize("module", [name for name in FILES if name.startswith("mole.")])
def test_a_module_imports_nothing_from_the_rooms_above_its_own(module: str) -> None:
    library = {name for name in ARROWS[module] if name.split(".")[0] == "mole"}
    assert {name for name in library if room(name) > room(module)} == set()


@pytest.mark.parametrize("module", [name for name in FILES if name.startswith("app.")])
def test_a_module_of_the_studio_imports_nothing_from_above_it(module: str) -> None:
    studio = {name for name in ARROWS[module] if name.startswith("app.")}
    assert {name for name in studio if STUDIO[name.split(".")[1]] > STUDIO[module.split(".")[1]]} == set()


def test_the_library_never_imports_gradio() -> None:
    sources = [path.read_text(encoding="utf-8") for name, path in FILES.items() if name.split(".")[0] == "mole"]
    assert not [text for text in sources if re.search(r"^\s*(import|from) gradio", text, re.M)]


def test_the_library_reaches_for_the_studio_in_two_commands_only() -> None:
    arrows = {
        (name, other) for name in FILES if name.startswith("mole") for other in ARROWS[name] if other[:3] == "app"
    }
    assert {other for _, other in arrows} == {"app.main", "app.replay"}
    assert {name.split(".")[1] for name, _ in arrows} == {"cli"}


def test_no_modules_import_each_other_in_a_circle() -> None:
    def reached(start: str) -> set[str]:
        found: set[str] = set()
        ahead = [start]
        while ahead:
            fresh = ARROWS[ahead.pop()] - found
            found |= fresh
            ahead += fresh
        return found

    assert {name for name in FILES if name in reached(name)} == set()


IMPORT_EACH_FIRST = """
import os, sys
import torch._inductor.compile_fx, transformers.modeling_utils  # what takes long, once for all of the processes below
assert "peft" not in sys.modules and "mole" not in sys.modules
for name in sys.argv[1:]:
    if not (child := os.fork()):
        try:
            __import__(name)
        except BaseException:
            os._exit(1)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        print(name)
"""


def test_what_other_rooms_import_of_the_mixture_can_be_imported_first() -> None:
    """PEFT's import registers the adapter type, and must not meet a half-imported module when it does.

    In a process of its own: another test of this one has imported PEFT already.
    """
    wanted = {other for name in FILES if ".mixture" not in name for other in ARROWS[name] if ".mixture" in other}
    command = [sys.executable, "-c", IMPORT_EACH_FIRST, *sorted(wanted)]
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert len(wanted) > 5 and (answer.returncode, answer.stdout) == (0, ""), answer.stderr
