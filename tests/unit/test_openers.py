"""Every file that may come from someone else is opened by one of the two openers of `mole.core.files`."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
OPENING = {
    "open", "fdopen", "read_text", "read_bytes", "write_text", "write_bytes", "touch", "load_file", "safe_open",
    "ParquetFile", "read_table", "memory_map", "from_file", "copyfile", "copy2", "copytree",
}  # fmt: skip
"""Names of functions and methods that open a file."""

ALLOWED = {
    "app/ui/panels/replay.py": "an export is written into a folder that was just made",
    "app/ui/tabs/atlas.py": "an export is written into a folder that was just made",
    "mole/core/files.py": "the openers themselves",
    "mole/core/child.py": "/proc",
    "mole/core/devices.py": "/proc and /sys",
    "mole/core/gpu_check.py": "/proc",
    "mole/core/checkpoint.py": "fsync of a folder; the manifest is written into a folder that was just made",
    "mole/core/processes.py": "a record is written to a temporary file that was just made; /proc",
    "mole/analysis/atlas/stored.py": "an atlas is written to a temporary file that was just made",
    "mole/runs/origin.py": "the home's own key is written to a temporary file that was just made",
    "mole/runs/initial.py": "an adapter's weights, after `AdapterFiles.read` has had them",
    "mole/runs/archive.py": "a verified run without links; an archive that an opener has had; a run that is just made",
    "mole/runs/store.py": "a run that is just made",
    "mole/config/presets.py": "a preset is written to a temporary file that was just made",
    "mole/training/continuing.py": "a checkpoint that was verified, in a folder without links",
    "mole/training/moving.py": "run.yaml is written to a temporary file that was just made",
    "mole/training/state.py": "a checkpoint that was verified",
    "mole/training/trainer.py": "a checkpoint that was verified; files of a folder that was just made",
    "mole/models/adapter_files.py": "weights, after `is_file`",
    "mole/models/weights.py": "headers of weights, after an opener has had them",
    "mole/models/gguf.py": "a package's own file, and a requirement in a temporary folder",
    "mole/mixture/aot_compile.py": "this package's sources, and the home's own kernels",
    "mole/preflight/dry_run.py": "/proc",
    "mole/cli/console.py": "the file the user named for the output; /dev/null",
    "mole/data/compressed.py": "a file in a zip that `readers.py` has opened",
    "mole/data/parquet.py": "a file that `readers.py` has opened",
    "mole/cli/parser.py": "/dev/null",
    "mole/training/worker.py": "/dev/null",
    "app/settings.py": "an upload, copied to a temporary file that was just made",
    "app/ui/theme.py": "the page's own files",
    "app/ui/tabs/chat.py": "the sample data of this package",
    "app/views/component.py": "the page's own files",
    "app/views/routing/__init__.py": "the page's own files",
}
"""Files that open others on their own, and why they may."""


def openings(path: Path) -> list[str]:
    """The calls in a source file that open a file by something else than an opener."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        through = any(keyword.arg == "opener" for keyword in node.keywords)
        if name in OPENING and not through:
            found.append(f"{path.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)[:80]}")
    return found


SOURCES = sorted(path for package in ("mole", "app") for path in (ROOT / package).rglob("*.py"))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_are_opened_by_an_opener(path: Path) -> None:
    found, allowed = openings(path), str(path.relative_to(ROOT)) in ALLOWED
    assert allowed or not found, found
    assert found or not allowed, "it opens nothing on its own any more: take it from ALLOWED"
