"""A run folder from a stranger can be looked at safely: no link in it is followed, no pipe is waited for, and nothing
in it starts by itself."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from forks import ROOT, Make
from hostile import in_time, mole
from test_hostile_runs import EVENTS, look_at_page

from mole import runs
from mole.analysis import compare
from mole.core import checkpoint, files, locks
from mole.core.errors import MoleError
from mole.evaluation import job as evaluation_job
from mole.runs.run import Run
from mole.training import worker

FILES = ("events.jsonl", "train.log", "run.lock", "stop", "adapter/manifest.json", "evaluations/1.json")
FOLDERS = ("checkpoints", "adapter", "evaluations", "checkpoints/step-3")
ATTACKED = (*FILES, *FOLDERS)


@pytest.fixture
def stranger(make_tiny: Make, tmp_path: Path) -> Run:
    """A run folder as copied from another home: its events say that it waits, and it has all kinds of files."""
    run = make_tiny("stranger")
    events = [*EVENTS[0], {"time": time.time() - 60, "type": "queued", "step": 12, "device": "cpu", "resume": True}]
    run.events_path.write_text("".join(json.dumps(event) + "\n" for event in events), encoding="utf-8")
    run.log_path.write_text("a line\n", encoding="utf-8")
    checkpoint.write(run.checkpoints_dir, 3, lambda folder: (folder / "weights").write_bytes(b"1234"))
    (run.path / "evaluations").mkdir()
    (run.path / "evaluations" / "1.json").write_text('{"target": "stranger", "data": "rows.jsonl"}', encoding="utf-8")
    return run


@pytest.fixture
def victims(tmp_path: Path) -> Path:
    """Files and folders of the user that no run has anything to do with."""
    folder = tmp_path / "mine"
    (folder / "folder" / "step-9").mkdir(parents=True)
    (folder / "folder" / ".tmp-mine").mkdir()
    (folder / "folder" / "1.json").write_text('{"mine": true}', encoding="utf-8")
    (folder / "folder" / "step-9" / "manifest.json").write_text("{}", encoding="utf-8")
    (folder / "file").write_text("export PATH\n", encoding="utf-8")
    return folder


def state_of(folder: Path) -> list[tuple[str, int, int, bytes]]:
    """Everything about a folder that a fault could change."""
    found = []
    for path in sorted([folder, *folder.rglob("*")]):
        stat = path.lstat()
        found.append((str(path), stat.st_mode, stat.st_mtime_ns, path.read_bytes() if path.is_file() else b""))
    return found


def put(path: Path, make: Callable[[Path], object]) -> None:
    """Put something else in the place of a run's file or folder."""
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    path.parent.mkdir(exist_ok=True)
    make(path)


def look_at(run: Run) -> None:
    """All that reads a run."""
    with in_time(60):
        assert run.name in [found.name for found in runs.list_runs()]
        state = run.state
        assert state in runs.STATES and state != "queued"
        run.status(), run.events(), run.log_lines(1000), run.held, run.stop_requested(), run.group
        for action in (run.details, lambda: compare.compare([run.name, "sound"]), lambda: runs.locate(run.name)):
            with suppress(MoleError):
                action()
        assert run not in runs.waiting_runs()
        evaluation_job.list_evaluations(run)
        checkpoint.steps(run.checkpoints_dir)
        look_at_page(run)


def data_of_another(make_tiny: Make) -> str:
    """The data of the run `sound`, which stands beside. It has ended: what wakes queued runs would train it."""
    run = make_tiny("sound")
    run.append_event("stopped", 0)
    return run.config.data.path


def work_on(run: Run, data: str) -> None:
    """All that writes in a run's folder, each refused or done in it alone; then the folder is deleted."""
    with in_time(240):
        attempts: list[Callable[[], object]] = [
            runs.wake_queued,
            lambda: runs.stop(run),
            lambda: runs.start(run, resume=True),
            lambda: worker.perform(run, resume=True),
            lambda: evaluation_job.start_evaluation(f"{run.name}@3", data),
            lambda: evaluation_job.Evaluation(run, 1).cancel(),
            lambda: checkpoint.newest_good(run.checkpoints_dir),
            lambda: runs.export(run, run.path.parent.parent / "exported"),
        ]
        for attempt in attempts:
            with suppress(MoleError):
                attempt()
        runs.delete(run)
    assert not run.path.exists()


@pytest.mark.parametrize("name", ATTACKED)
def test_no_link_in_a_run_folder_is_followed(name: str, stranger: Run, make_tiny: Make, victims: Path) -> None:
    """Not by what reads, and not by what writes: the file it names stays as it is, to the time of its last change."""
    data = data_of_another(make_tiny)
    put(stranger.path / name, lambda path: path.symlink_to(victims / ("folder" if name in FOLDERS else "file")))
    before = state_of(victims)
    look_at(stranger)
    work_on(stranger, data)
    assert state_of(victims) == before


@pytest.mark.parametrize("name", FILES)
def test_no_link_to_a_file_that_is_not_there_makes_one(
    name: str, stranger: Run, make_tiny: Make, victims: Path
) -> None:
    data = data_of_another(make_tiny)
    put(stranger.path / name, lambda path: path.symlink_to(victims / "new"))
    look_at(stranger)
    work_on(stranger, data)
    assert not (victims / "new").exists()


@pytest.mark.parametrize("name", FILES)
def test_no_pipe_in_a_run_folder_is_waited_for(name: str, stranger: Run, make_tiny: Make) -> None:
    data = data_of_another(make_tiny)
    put(stranger.path / name, os.mkfifo)
    look_at(stranger)
    work_on(stranger, data)


def test_the_first_link_is_named_when_such_a_run_is_started(stranger: Run, victims: Path) -> None:
    put(stranger.log_path, lambda path: path.symlink_to(victims / "file"))
    with pytest.raises(MoleError, match=f"train.log is a link to {victims / 'file'}; a run folder has only regular"):
        runs.start(stranger, resume=True)


def test_a_run_that_was_queued_elsewhere_starts_only_when_it_is_asked_to(
    stranger: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    assert stranger.state == "imported"
    assert runs.wake_queued() == [] and not stranger.held
    assert stranger not in runs.waiting_runs()
    advice = stranger.details()["advice"]
    assert "mole runs resume stranger" in advice
    assert mole(capsys, "runs", "stop", "stranger") == 2
    runs.enqueue(stranger, resume=True)
    assert stranger.state == "queued" and runs.waiting_runs() == [stranger]


def test_a_command_in_a_device_is_no_device(stranger: Run) -> None:
    """The line that names the device goes to the run's log."""
    device = "x; touch /tmp/broken-in #"
    stranger.append_event("queued", 0, device=device, resume=False, position=1.0)
    assert runs.waiting_runs() == [] and runs.ahead_of(stranger) == []
    assert runs.queue.place_in_queue(stranger)[0] == "cpu"


class TestOrigin:
    """An event says that it was written in this home, in a way that only this home can."""

    def test_a_queued_run_of_this_home_is_woken(self, make_tiny: Make) -> None:
        run = make_tiny("ours")
        runs.enqueue(run)
        assert run.state == "queued" and [run] == runs.waiting_runs()

    @pytest.mark.parametrize("change", [{"device": "cuda:0"}, {"resume": True}, {"position": 0.5}, {"step": 3}])
    def test_a_changed_event_is_not_from_here(self, make_tiny: Make, change: dict[str, object]) -> None:
        run = make_tiny("ours")
        runs.enqueue(run)
        *others, last = run.events()
        run.events_path.write_text("".join(json.dumps(event) + "\n" for event in [*others, {**last, **change}]))
        assert run.state == "imported"

    def test_a_copy_under_another_name_is_not_from_here(self, make_tiny: Make) -> None:
        run = make_tiny("ours")
        runs.enqueue(run)
        shutil.copytree(run.path, run.path.with_name("copy"))
        assert (run.state, runs.get("copy").state) == ("queued", "imported")

    def test_a_home_that_moves_keeps_its_queue(
        self, make_tiny: Make, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        runs.enqueue(make_tiny("ours"))
        shutil.copytree(home, tmp_path / "moved")
        monkeypatch.setenv("MOLE_HOME", str(tmp_path / "moved"))
        assert [run.name for run in runs.waiting_runs()] == ["ours"]

    def test_a_run_of_an_earlier_version_that_waits_now_is_still_queued(self, stranger: Run) -> None:
        """Its process holds its lock, which no folder that was copied can bring along."""
        with locks.acquire(stranger.lock_path) or pytest.fail("held"):
            assert stranger.state == "queued"
        assert stranger.state == "imported"

    def test_the_key_is_for_its_owner_alone(self, make_tiny: Make, home: Path) -> None:
        make_tiny("ours")
        assert (home / "key").stat().st_mode & 0o777 == 0o600
        assert len((home / "key").read_bytes()) == 32

    @pytest.mark.parametrize("key", [b"", b"short", bytes(33)])
    def test_a_damaged_key_signs_nothing(self, make_tiny: Make, home: Path, key: bytes) -> None:
        """Anyone could sign with an empty one."""
        run = make_tiny("ours")
        (home / "key").write_bytes(key)
        assert run.state == "imported"
        with pytest.raises(OSError, match="Not a key of 32 bytes; delete it to get a new one"):
            make_tiny("another")


UNREADABLE = """
import os, sys
from mole import runs
from mole.cli import parser
from app.services import listing
from mole.core.errors import MoleError
if os.getuid() == 0: os.setuid(65534)
states = {run.name: run.status()["state"] for run in runs.list_runs()}
assert states.pop("sound") == "queued", states
assert states == dict.fromkeys(states, "unreadable") and len(states) == 3, states
assert {row["name"]: row["state"] for row in listing.Listing().rows()} == {"sound": "queued", **states}
assert parser.main(["runs", "list"]) == 0
for name in states:
    assert parser.main(["runs", "show", name]) == 2
"""


def test_one_run_that_may_not_be_read_hides_no_other(make_tiny: Make, home: Path) -> None:
    """As after `sudo mole train`. Root may read everything, so another user looks."""
    place = Path(tempfile.mkdtemp())
    place.chmod(0o755)
    try:
        for name in ("sound", "folder", "events", "lock"):
            run = make_tiny(name)
            runs.enqueue(run)
            run.lock_path.touch()
        shutil.copytree(home, place / "home")
        for path in (place, *(place / "home").rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)
        for path in ("folder", "events/events.jsonl", "lock/run.lock"):
            (place / "home" / "runs" / path).chmod(0)
        done = subprocess.run(
            [sys.executable, "-c", UNREADABLE], capture_output=True, text=True, cwd=ROOT,
            env={**os.environ, "MOLE_HOME": str(place / "home")},
        )  # fmt: skip
    finally:
        shutil.rmtree(place)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == 3 and all("cannot be read" in line and "Permission denied" in line for line in lines), lines
    assert all("sudo chown" in line or "Check its permissions" in line for line in lines)


def test_an_opener_takes_regular_files_only(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("content", encoding="utf-8")
    (tmp_path / "link").symlink_to("file")
    os.mkfifo(tmp_path / "pipe")
    for opener, good in ((files.regular, ("file", "link")), (files.unlinked, ("file",))):
        for name in ("file", "link", "pipe", "."):
            if name in good:
                descriptor = opener(tmp_path / name, os.O_RDONLY)
                assert os.read(descriptor, 20) == b"content"
                os.close(descriptor)
            else:
                with in_time(5), pytest.raises(OSError):
                    opener(tmp_path / name, os.O_RDONLY)
    for device in ("/dev/zero", "/dev/tty"):
        with in_time(5), pytest.raises(OSError):
            files.regular(device, os.O_RDONLY)
