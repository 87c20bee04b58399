"""Several users of one machine: each has a studio of their own, and none reads another's home."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from serving import ROOT, free_port, serve, studio_command

from mole import runs
from mole.config import RunConfig, save_preset
from mole.core import checkpoint
from mole.core.paths import make_folder
from mole.runs.run import Run

from .conftest import API, PATIENCE


@pytest.fixture(autouse=True)
def usual_umask() -> Iterator[None]:
    """What most systems set: files are readable for everyone."""
    before = os.umask(0o022)
    yield
    os.umask(before)


def permissions(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def readable_by_others(home: Path) -> list[str]:
    """What in a home, itself included, anyone but its user may look at."""
    return [f"{path} {permissions(path):o}" for path in (home, *home.rglob("*")) if permissions(path) & 0o077]


def finished_run(name: str) -> Run:
    """A run with everything in its folder that a training leaves, without training."""
    run = runs.create(RunConfig.from_dict({"name": name, "data": {"path": "rows.jsonl"}, "model": {"device": "cpu"}}))

    def writer(folder: Path) -> None:
        (folder / "below").mkdir()
        (folder / "adapter_config.json").write_text("{}")
        (folder / "below" / "weights").write_text("1")

    runs.enqueue(run)
    checkpoint.write(run.checkpoints_dir, 1, writer)
    checkpoint.write_folder(run.adapter_dir, writer, step=1)
    run.request_stop()
    return run


def test_the_second_user_of_a_machine_has_a_studio_too(tmp_path: Path) -> None:
    """Gradio's shared folder belongs to whoever was first: here nobody can write to it, as it is no folder at all."""
    home, shared, port = tmp_path / "home", tmp_path / "tmp", free_port()
    home.mkdir()
    shared.mkdir()
    (shared / "gradio").write_text("somebody else's")
    with serve(studio_command(port), port, home, TMPDIR=str(shared)) as studio:
        answer = httpx.post(
            f"{studio.url}{API}/upload", files={"files": ("rows.jsonl", b"{}")}, timeout=PATIENCE, trust_env=False
        )
        assert answer.status_code == 200, answer.text
        (path,) = map(Path, answer.json())
        folder = home / "tmp" / f"gradio-{os.getuid()}"
        assert path.is_relative_to(folder) and permissions(folder) == 0o700
        assert httpx.get(f"{studio.url}{API}/file={path}", timeout=PATIENCE, trust_env=False).text == "{}"


def test_a_folder_that_the_user_named_is_taken(tmp_path: Path) -> None:
    home, chosen, port = tmp_path / "home", tmp_path / "chosen", free_port()
    home.mkdir()
    with serve(studio_command(port), port, home, GRADIO_TEMP_DIR=str(chosen)) as studio:
        answer = httpx.post(
            f"{studio.url}{API}/upload", files={"files": ("rows.jsonl", b"{}")}, timeout=PATIENCE, trust_env=False
        )
        assert Path(answer.json()[0]).is_relative_to(chosen) and not (home / "tmp").exists()


def test_a_new_home_is_its_user_s_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder itself, and all that runs, presets and locks put into it; the folders above are as usual."""
    home = tmp_path / "above" / "home"
    monkeypatch.setenv("MOLE_HOME", str(home))
    save_preset("mine", finished_run("first").config)
    make_folder(home / "locks")
    assert len([path for path in home.rglob("*") if path.is_file()]) > 8
    assert readable_by_others(home) == []
    assert permissions(home) == 0o700 and permissions(home.parent) == 0o755


def test_a_home_that_is_shared_stays_shared(home: Path) -> None:
    """As docs/runs.md says: a folder of the group, in which new folders belong to the group as well."""
    home.chmod(0o2770)
    os.umask(0o007)
    run = finished_run("ours")
    assert permissions(home) == 0o2770
    for path in run.path.rglob("*"):
        assert permissions(path) & 0o770 == (0o770 if path.is_dir() else 0o660), path
        assert not permissions(path) & 0o007


def test_a_home_that_all_may_read_is_left_as_it_is(home: Path) -> None:
    home.chmod(0o755)
    run = finished_run("open")
    assert permissions(home) == permissions(run.path) == 0o755 and permissions(run.events_path) == 0o644


def test_what_is_written_elsewhere_has_the_usual_permissions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "home"
    monkeypatch.setenv("MOLE_HOME", str(home))
    finished_run("first")
    for dest in ("folder", "file.zip"):
        command = [sys.executable, "-m", "mole.cli", "runs", "export", "first", str(tmp_path / dest)]
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=PATIENCE)
    exported = [path for path in (tmp_path / "folder").rglob("*") if path.is_file()]
    assert exported and {permissions(path) for path in (*exported, tmp_path / "file.zip")} == {0o644}
    assert permissions(tmp_path / "folder") == permissions(tmp_path / "folder" / "adapter") == 0o755
    assert zipfile.ZipFile(tmp_path / "file.zip").testzip() is None
