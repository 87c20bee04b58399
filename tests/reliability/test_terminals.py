"""What surrounds a process goes away or was never there: its terminal, its streams, its port, its home."""

from __future__ import annotations

import fcntl
import itertools
import os
import pty
import signal
import socket
import subprocess
import sys
import termios
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from forks import PATIENCE, ROOT, Attempt, Forked, Make, leave, wait_for
from operations import EVENT, before, wait_to_be_stopped
from serving import free_port, serve, studio_command

from mole import runs
from mole.core import checkpoint, locks, processes
from mole.evaluation.job import Evaluation
from mole.preflight.job import PreflightJob
from mole.runs import recorded_job
from mole.runs.run import Run

MOLE = [sys.executable, "-m", "mole.cli"]
Done = subprocess.CompletedProcess[str]


def mole(*arguments: str, **environment: str) -> Done:
    """`mole …`, a process of its own without a terminal."""
    return subprocess.run(
        [*MOLE, *arguments], cwd=ROOT, env={**os.environ, **environment}, stdin=subprocess.DEVNULL,
        capture_output=True, text=True, errors="replace", timeout=PATIENCE,
    )  # fmt: skip


def one_line(done: Done, code: int, *words: str) -> None:
    assert (done.returncode, done.stdout) == (code, ""), done
    assert done.stderr.startswith("mole: ") and len(done.stderr.splitlines()) == 1, done.stderr
    for word in words:
        assert word in done.stderr


# The terminal is closed


def with_terminal(folder: Path, *arguments: str) -> tuple[subprocess.Popen[bytes], int]:
    """`mole …` as the leader of a session with a terminal of its own, and the terminal's other end."""
    ours, theirs = pty.openpty()

    def own_terminal() -> None:
        os.setsid()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    process = subprocess.Popen(
        [*MOLE, *arguments], cwd=ROOT, stdin=theirs, stdout=theirs, stderr=theirs, preexec_fn=own_terminal
    )
    os.close(theirs)
    return process, ours


@pytest.mark.slow
def test_a_training_whose_terminal_is_closed_saves_and_stops(make_tiny: Make, tmp_path: Path) -> None:
    """The kernel sends SIGHUP, and every write to the terminal fails from then on."""
    template = make_tiny("template", **{"training.max_steps": 100_000, "training.save_steps": 90_000})
    runs.stop(template)
    process, terminal = with_terminal(tmp_path, "train", "--config", str(template.config_path), "--name", "closed")
    run = Run("closed", runs.runs_dir() / "closed")
    os.set_blocking(terminal, False)

    def training() -> bool:
        with suppress(BlockingIOError, OSError):
            os.read(terminal, 1 << 16)  # a terminal that nobody reads would fill up
        assert process.poll() is None
        return run.step > 2

    wait_for(training)
    os.close(terminal)
    assert process.wait(PATIENCE) == 0
    assert run.state == "stopped" and run.step > 2
    assert checkpoint.newest_good(run.checkpoints_dir) == run.checkpoints_dir / f"step-{run.step}"


def test_a_detached_training_saves_and_stops_on_sighup(make_tiny: Make, tmp_path: Path) -> None:
    run, reached = make_tiny("hung-up"), tmp_path / "reached"
    attempt = Attempt(run, partial(before, EVENT, 9, partial(wait_to_be_stopped, reached, run)))
    wait_for(lambda: reached.exists() or attempt.ended(0))
    assert attempt.process.pid is not None
    os.kill(attempt.process.pid, signal.SIGHUP)
    assert attempt.code() == 0
    assert run.state == "stopped" and checkpoint.newest_good(run.checkpoints_dir) is not None


def hang_up() -> None:
    os.kill(os.getpid(), signal.SIGHUP)


def ignored_and_sent(run: Run) -> None:
    """What `nohup` sets, and the signal in the middle of the training."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    before(EVENT, 9, hang_up, run)


def test_under_nohup_a_training_goes_on(make_tiny: Make) -> None:
    run = make_tiny("nohup")
    assert Attempt(run, ignored_and_sent).code() == 0
    assert run.state == "finished"


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGHUP, marks=pytest.mark.soak)])
def test_a_preflight_ends_with_the_command_that_asked_for_it(
    make_tiny: Make, busy_cpu: locks.Lock, number: signal.Signals
) -> None:
    run = make_tiny("asked")
    command = [*MOLE, "preflight", "--measure", "--wait", "--config", str(run.config_path)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    check = PreflightJob.of(run.config)
    wait_for(lambda: check.state().get("phase") == "waiting" or process.poll() is not None)
    process.send_signal(number)
    out, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1 and b"Traceback" not in out, out
    assert check.state()["phase"] == "cancelled" and not locks.is_held(check.lock_path)


def test_the_studio_ends_when_its_terminal_is_closed(home: Path) -> None:
    port = free_port()
    command = ["sh", "-c", 'echo $$ >"$MOLE_HOME/pid"; exec "$@"', "sh", *studio_command(port)]
    with serve(command, port, home):
        pid = int((home / "pid").read_text())
        os.kill(pid, signal.SIGHUP)
        wait_for(lambda: stopped_listening(port))


def stopped_listening(port: int) -> bool:
    with socket.socket() as tried:
        return tried.connect_ex(("127.0.0.1", port)) != 0


# Streams


@pytest.mark.parametrize(
    "closed", [" ".join(some) for n in (1, 2, 3) for some in itertools.combinations(("<&-", ">&-", "2>&-"), n)]
)
def test_closed_streams_are_no_error(home: Path, closed: str) -> None:
    """Also with a file whose number would be a stream's: nothing is printed into it."""
    (home / "rows.jsonl").write_text('{"text": "x"}\n')
    for arguments, code in (("runs list", 0), ("presets", 0), ('data check "$MOLE_HOME/rows.jsonl"', 0),
                            ("runs delete nothing", 2), ("runs nothing", 2)):  # fmt: skip
        command = f"exec {sys.executable} -m mole.cli {arguments} {closed}"
        done = subprocess.run(
            ["sh", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE, stdin=subprocess.DEVNULL
        )
        assert done.returncode == code and "Traceback" not in done.stderr, done


def chat_without_streams(home: str, target: str) -> None:
    os.environ["MOLE_HOME"] = home
    os.closerange(0, 3)
    sys.stdin = sys.stdout = sys.stderr = None  # type: ignore[assignment]  # as Python does at its start
    from mole.cli import main

    code = main(["chat", target]) or main(["chat", target, "--prompt", "hi", "--max-new-tokens", "2"])
    leave(code)


def test_chat_without_any_stream(home: Path, tiny_adapter: Path) -> None:
    child = Forked(chat_without_streams, str(home), str(tiny_adapter))
    assert child.ended() and child.process.exitcode == 0


@pytest.mark.parametrize(
    "environment",
    [
        {"PYTHONIOENCODING": "ascii"},
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        {"PYTHONIOENCODING": "latin-1"},
    ],
)  # fmt: skip
def test_a_terminal_without_these_characters_shows_others(home: Path, environment: dict[str, str]) -> None:
    for arguments in (["presets"], ["train", "--help"], ["runs", "compare", "--help"], ["runs", "show", "größer…"]):
        done = mole(*arguments, **environment)
        assert done.returncode == (2 if "show" in arguments else 0), done
        assert "Traceback" not in done.stderr and "UnicodeEncodeError" not in done.stderr


# Places


@pytest.mark.parametrize("given", ["~no-such-user/x", "file", "file/below", "~no-such-user"])
@pytest.mark.parametrize("arguments", [["runs", "list"], ["presets"], ["studio"]], ids=" ".join)
def test_a_home_that_cannot_be_is_one_line(tmp_path: Path, given: str, arguments: list[str]) -> None:
    (tmp_path / "file").write_text("")
    given = given if given.startswith("~") else str(tmp_path / given)
    one_line(mole(*arguments, MOLE_HOME=given), 2, "MOLE_HOME is", "Set MOLE_HOME to a folder")


def test_a_port_in_use_is_one_line(home: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        one_line(mole("studio", "--port", port), 2, f"Port {port} of 127.0.0.1 is in use", "--port")
    assert not (home / "tmp").exists(), "said before anything is made"
    one_line(mole("studio", "--host", "192.0.2.1", "--allow-anyone"), 2, "cannot listen on 192.0.2.1", "--host")


# The home is moved


def moved(home: Path) -> Path:
    return home.rename(home.with_name("moved"))


def last_line(file: Path) -> str:
    return (file.read_text().splitlines() or [""])[-1]


def ended(run_log: Path, home: Path) -> None:
    """The process wrote one line and is gone, and there is nothing at the old place."""
    wait_for(lambda: "was moved, renamed or deleted" in last_line(run_log))  # a log with its traceback comes first
    wait_for(lambda: last_line(run_log).startswith("mole: "))
    assert not home.exists()


@pytest.mark.parametrize("what", ["run", "evaluation", "preflight"])
def test_what_waits_for_its_device_ends_when_the_home_is_moved(
    make_tiny: Make, home: Path, busy_cpu: locks.Lock, tiny: dict[str, Any], what: str
) -> None:
    run = make_tiny("waiting")
    if what == "run":
        runs.start(run)
        lock, log = run.lock_path, run.log_path
        wait_for(lambda: run.held and "Waiting for cpu" in log.read_text())
    elif what == "evaluation":
        claimed = recorded_job.claim(Evaluation, run, recorded_job.new_record(run.name, tiny["data"]["path"], 1, ""))
        lock, log = claimed.file("lock"), claimed.file("log")
        processes.detach("mole.evaluation.job", run.name, str(claimed.number), log=log)
        wait_for(lambda: "Waiting" in claimed.record().get("note", ""))
    else:
        check = PreflightJob.of(run.config)
        check.start(run.config, "measurement", wait=True)
        lock, log = check.lock_path, check.folder / "log.txt"
        wait_for(lambda: check.state().get("phase") == "waiting")
    new = moved(home)
    ended(new / log.relative_to(home), home)
    wait_for(lambda: not locks.is_held(new / lock.relative_to(home)))


def test_a_studio_ends_when_its_home_is_moved(home: Path) -> None:
    port = free_port()
    with serve(studio_command(port), port, home):
        new = moved(home)
        wait_for(lambda: stopped_listening(port))
    lines = [line for line in (new / "studio.log").read_text().splitlines() if line.startswith("mole: ")]
    assert len(lines) == 1 and "was moved, renamed or deleted" in lines[0]
    assert "Traceback" not in (new / "studio.log").read_text() and not home.exists()
