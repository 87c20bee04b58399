"""What a browser test that fails leaves behind: enough to see why, without running it again."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import browsing
import pytest

pytestmark = pytest.mark.ui
FAILING = """
def test_fails(page):
    page.set_content("<h1>seen</h1>")
    page.evaluate("console.warn('said')")
    page.click("h1")
    assert False

def test_complains(page):
    page.set_content("<script>console.error('wrong')</script>")

def test_passes(page):
    page.set_content("<h1>fine</h1>")
"""


def test_a_failing_test_leaves_what_the_page_showed_and_said(tmp_path: Path) -> None:
    (tmp_path / "test_of_a_page.py").write_text(FAILING, encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-p", "browsing", f"--rootdir={tmp_path}", "test_of_a_page.py"]
    tests = str(Path(browsing.__file__).parent)
    done = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": tests}, capture_output=True, text=True
    )
    assert "2 passed, 1 failed, 1 error" in done.stdout or "1 failed, 2 passed, 1 error" in done.stdout, done.stdout
    kept = tmp_path / "build" / "browser"
    assert sorted(folder.name for folder in kept.iterdir()) == ["test_complains", "test_fails"]
    failed = kept / "test_fails"
    assert f"What the browser showed is in {failed}" in done.stdout
    assert (failed / "page-1.png").read_bytes().startswith(b"\x89PNG")
    assert "<h1>seen</h1>" in (failed / "page-1.html").read_text(encoding="utf-8")
    assert "said" in (failed / "console.txt").read_text(encoding="utf-8")
    assert "wrong" in (kept / "test_complains" / "console.txt").read_text(encoding="utf-8")
    with zipfile.ZipFile(failed / "trace-1.zip") as trace:
        assert any(name.endswith(".trace") for name in trace.namelist())
