"""A child process: it answers, ends with its parent whatever it is doing, and what it takes is bounded."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from serving import until

from mole.core.child import Child, ChildExited, ChildTimeout
from mole.core.errors import ConfigError, DataError, MoleError

MODULE = "a_child"
SOURCE = """
import os, re, subprocess
from mole.core.child import memory_limit, serve
from mole.core.errors import ConfigError

def answer(request, connection):
    what, value = request
    if what == "echo":
        connection.send(value)
    elif what == "environment":
        connection.send(os.environ.get(value, ""))
    elif what == "hang":  # Python's `re` holds the interpreter's lock meanwhile
        connection.send(os.getpid())
        re.fullmatch("(.+)+!", "a" * 64)
    elif what == "start":
        connection.send(subprocess.Popen(["sleep", "600"]).pid)
    elif what == "raise":
        raise value
    elif what == "allocate":
        with memory_limit(1 << 28):
            connection.send(len(b"x" * value))
    elif what == "exit":
        os._exit(3)

serve(answer)
"""
PARENT = f"""
from mole.core.child import Child
child = Child({MODULE!r})
child.start()
child.send(("hang", None))
print(child.receive(60), flush=True)
child.receive(600)
"""


@pytest.fixture
def child(home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Child]:
    (tmp_path / f"{MODULE}.py").write_text(SOURCE)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")])))
    child = Child(MODULE)
    yield child
    child.kill()


def test_it_answers_one_request_after_another(child: Child) -> None:
    assert [child.call(("echo", value), 60) for value in (1, "two", {"three": [b"\0", None]})] == [
        1,
        "two",
        {"three": [b"\0", None]},
    ]


@pytest.mark.parametrize(
    "error",
    [ConfigError("adapter.r", -1, "at least 1"), DataError("row 3", field="data.path", rejected=[3]), MoleError("no")],
)
def test_our_errors_arrive_as_they_were_raised(child: Child, error: MoleError) -> None:
    with pytest.raises(type(error)) as raised:
        child.call(("raise", error), 60)
    assert (str(raised.value), raised.value.field) == (str(error), error.field)
    assert raised.value.__dict__ == error.__dict__ and raised.value.exit_code == error.exit_code


def test_an_error_of_a_library_arrives_without_the_library(child: Child) -> None:
    with pytest.raises(RuntimeError, match="KeyError: 'missing'"):
        child.call(("raise", KeyError("missing")), 60)
    assert child.call(("echo", 1), 60) == 1, "the process goes on"


def test_what_takes_too_long_is_ended_and_the_next_request_answered(child: Child) -> None:
    child.call(("echo", 1), 60)
    begun = time.monotonic()
    with pytest.raises(ChildTimeout, match="did not end within 1 s"):
        child.call(("hang", None), 1)
    assert time.monotonic() - begun < 10 and not child.alive
    assert child.call(("echo", 2), 60) == 2


def test_too_much_memory_is_an_error_in_the_child_and_nowhere_else(child: Child) -> None:
    assert child.call(("allocate", 1 << 20), 60) == 1 << 20
    with pytest.raises(RuntimeError, match="MemoryError"):
        child.call(("allocate", 10**10), 60)
    assert child.call(("allocate", 1 << 20), 60) == 1 << 20, "the limit held for a block"


def test_a_process_that_ends_is_reported_and_started_again(child: Child) -> None:
    with pytest.raises(ChildExited, match="its process was ended"):
        child.call(("exit", None), 60)
    assert child.call(("echo", 1), 60) == 1


def test_killing_it_ends_what_it_has_started(child: Child) -> None:
    pid = child.call(("start", None), 60)
    child.kill()
    until(lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    child.kill()  # twice is nothing


def test_it_ends_with_its_parent_even_while_no_python_code_can_run(child: Child, tmp_path: Path) -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    hanging = psutil.Process(pid)
    parent.kill()
    parent.wait()
    hanging.wait(timeout=10)
    parent.stdout.close()


def test_another_home_gets_another_process(child: Child, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = child.call(("environment", "MOLE_HOME"), 60)
    monkeypatch.setenv("MOLE_HOME", str(tmp_path / "other"))
    assert child.call(("environment", "MOLE_HOME"), 60) == str(tmp_path / "other") != first


def test_it_inherits_no_secret_that_it_does_not_need(child: Child, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOLE_AUTH", "someone:a-long-password")
    assert child.call(("environment", "MOLE_AUTH"), 60) == ""
