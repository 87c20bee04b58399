"""A child process that works for this one under limits of time and memory, and ends with it. No torch.

Files from elsewhere are loaded there: a template or a pattern that never ends, or takes all the memory, costs the
child, which is killed and started again. Messages are pickled in both directions: the child is trusted, what it reads
is not.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import resource
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from threading import Lock
from typing import Any, NoReturn

from mole.core.errors import MoleError
from mole.core.paths import home
from mole.core.processes import be_killed_first, data_limit, python_environment
from mole.core.text import one_line

DONE = "done"
"""The child's last message about a request."""


class ChildExited(MoleError):
    """The child process ended before it had answered."""


class ChildTimeout(MoleError):
    """The child process did not answer in time and was ended."""


class Failed:
    """The child's last message about a request that raised an error."""

    def __init__(self, error: Exception) -> None:
        # Other libraries' exceptions are not sent: unpickling one would import its library here.
        own = isinstance(error, MoleError)
        self.error = error if own else RuntimeError(f"{type(error).__name__}: {one_line(error)}")


class Child:
    """A process that answers requests, one at a time; it is started when needed, and again after it ended.

    Args:
        module: run as `python -m module`; it calls `serve`.
    """

    def __init__(self, module: str) -> None:
        self._module = module
        self._starting = Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        self._life: socket.socket | None = None
        self._home: Path | None = None

    @property
    def alive(self) -> bool:
        """Whether the process runs."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Start the process, unless it runs; returns at once."""
        with self._starting:
            if self.alive and self._home == home():
                return
            self._end()
            ours, theirs = socket.socketpair()
            self._life, their_life = socket.socketpair()
            with theirs, their_life:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", self._module, str(theirs.fileno()), str(their_life.fileno())],
                    env=python_environment(),
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    pass_fds=(theirs.fileno(), their_life.fileno()),
                    start_new_session=True,  # Ctrl-C in the terminal is for this process
                )
            self._connection, self._home = Connection(ours.detach()), home()

    def kill(self) -> None:
        """End the process and what it has started, whatever it is doing; does nothing when there is none."""
        with self._starting:
            self._end()

    def _end(self) -> None:
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        for end in (self._connection, self._life):
            if end is not None:
                end.close()
        self._process = self._connection = self._life = None

    def send(self, message: Any) -> None:
        """Send a message to the process. Raises `ChildExited`."""
        with self._exiting():
            self._open_connection().send(message)

    def receive(self, seconds: float) -> Any:
        """The next message of the process, which is never None; None for none in `seconds`. Raises `ChildExited`."""
        with self._exiting():
            connection = self._open_connection()
            return connection.recv() if connection.poll(seconds) else None

    def call(self, request: Any, seconds: float) -> Any:
        """Start the process if needed, and return its answer, the last message it sends before `DONE`.

        Raises the error that answering it raised, `ChildExited`, or `ChildTimeout` after `seconds`.
        """
        self.start()
        self.send(request)
        deadline, answer = time.monotonic() + seconds, None
        while (message := self.receive(max(deadline - time.monotonic(), 0))) is not None:
            if isinstance(message, Failed):
                raise message.error
            if message == DONE:
                return answer
            answer = message
        self.kill()
        raise ChildTimeout(f"it did not end within {seconds:.0f} s")

    def _open_connection(self) -> Connection:
        if self._connection is None:
            raise EOFError
        return self._connection

    @contextmanager
    def _exiting(self) -> Iterator[None]:
        try:
            yield
        except (EOFError, OSError):  # it was killed, by us or by the kernel
            self.kill()  # its connection ends a moment before the process does
            raise ChildExited("its process was ended, most likely because the memory ran out") from None


# ---------------------------------------------------------------------------------------------------------
# In the child


def serve(answer: Callable[[Any, Connection], None]) -> NoReturn:
    """Answer the parent's requests until it ends: `answer(request, connection)` may send messages of its own.

    Each request's last message is `DONE` or a `Failed`. A text is not a request: it ends the one before it, if that is
    still being answered (`connection.poll()`).
    """
    connection, life = Connection(int(sys.argv[1])), socket.socket(fileno=int(sys.argv[2]))
    end_with(life)
    be_killed_first()
    while True:
        try:
            request = connection.recv()
            if isinstance(request, str):
                continue
            try:
                answer(request, connection)
            except Exception as error:
                connection.send(Failed(error))
            else:
                connection.send(DONE)
        except (EOFError, OSError):  # the parent is gone
            sys.exit(0)


def end_with(life: socket.socket) -> None:
    """Let the kernel end this process as soon as the other end of `life` is closed, even while no Python code runs.

    A thread that waits for it would never get its turn while a regular expression holds the interpreter's lock. SIGIO
    needs no handler: it ends a process.
    """
    signal.signal(signal.SIGIO, signal.SIG_DFL)
    fcntl.fcntl(life, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(life, fcntl.F_SETFL, fcntl.fcntl(life, fcntl.F_GETFL) | os.O_ASYNC)
    if select.select([life], [], [], 0)[0]:  # closed before the kernel watched
        sys.exit(0)


@contextmanager
def memory_limit(more: int) -> Iterator[None]:
    """A block in which this process may take `more` bytes beyond what it has; then `MemoryError` (on Linux)."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[5])  # private, writable
    except OSError:
        yield
        return
    with data_limit(pages * resource.getpagesize() + more):
        yield
