"""Reading data in processes of their own, for the studio: a file, a tokenizer or a chat template may be anyone's."""

from __future__ import annotations

from collections.abc import Callable
from multiprocessing.connection import Connection
from threading import Lock
from typing import Any

from mole import runs
from mole.config import RunConfig
from mole.core.child import Child, ChildExited, ChildTimeout, memory_limit, serve
from mole.core.devices import free_on_cpu
from mole.core.errors import DataError
from mole.data import fingerprint_of, read_columns
from mole.evaluation.job import data_columns, start_evaluation
from mole.preflight.preview import Preview, preview
from mole.runs.run import Run

COLUMNS_SECONDS, PREVIEW_SECONDS = 20.0, 120.0
"""The longest that reading the beginning of a file may take."""
BEGINNING_MEMORY = 4 << 30
"""Bytes that it may take."""
FILE_SECONDS = 1800.0
"""The longest that reading a whole file may take; it may take the memory that is free."""


class DataReader:
    """A process that reads data, and whose turn it is to use it; safe to call from any thread.

    Args:
        module: run as `python -m module`; its requests are the name of an action, here of `ACTIONS`, and arguments.
    """

    def __init__(self, module: str = "mole.preflight.data_process") -> None:
        self._in_use = Lock()
        self._child = Child(module)

    def read(self, action: str, *arguments: Any, seconds: float) -> Any:
        """What an action returns. Raises its errors, and `DataError` for too much time or memory."""
        with self._in_use:
            try:
                return self._child.call((action, arguments), seconds)
            except (ChildExited, ChildTimeout) as error:
                cause = "The file, or the model's tokenizer or chat template, is broken."
                raise DataError(f"Reading the data was given up: {error}. {cause}", field="data.path") from None

    def end(self) -> None:
        """End the process, and with it what it does."""
        self._child.kill()


PREVIEWS, COLUMNS = DataReader(), DataReader()
"""Two, so that a file's columns do not wait for a preview. They are kept, as they import libraries for seconds."""


def preview_of(config: RunConfig, rows: int) -> Preview:
    """`mole.preflight.preview.preview`. Raises its errors and those of `DataReader.read`."""
    made: Preview = PREVIEWS.read("preview", config, rows, seconds=PREVIEW_SECONDS)
    return made


def columns_of(path: str) -> tuple[str, ...]:
    """`mole.data.read_columns`. Raises its errors and those of `DataReader.read`."""
    names: tuple[str, ...] = COLUMNS.read("columns", path, seconds=COLUMNS_SECONDS)
    return names


def check_inputs(config: RunConfig) -> None:
    """`mole.runs.check_inputs`, which reads all of the data. Raises its errors and those of `DataReader.read`."""

    def read(*source: Any, **named: Any) -> str:
        return str(read_once(DataReader(), "rows", source, named))

    runs.check_inputs(config, read)


def evaluate(target: str, data: str, limit: int | None) -> None:
    """`mole.evaluation.job.start_evaluation`, which reads all of the data. Raises its errors, and as `check_inputs`."""

    def read(run: Run, *source: Any) -> tuple[dict[str, str], str]:
        found: tuple[dict[str, str], str] = read_once(DataReader(), "evaluation", run.name, *source)
        return found

    start_evaluation(target, data, limit, read)


def read_once(reader: DataReader, action: str, *arguments: Any) -> Any:
    """`DataReader.read` of a whole file, in a process that gives the memory of it back by ending."""
    try:
        return reader.read(action, *arguments, seconds=FILE_SECONDS)
    finally:
        reader.end()


# ---------------------------------------------------------------------------------------------------------
# The process


def check_rows(source: tuple[Any, ...], named: dict[str, Any]) -> str:
    """`mole.data.fingerprint_of`."""
    return fingerprint_of(*source, **named)


BEGINNINGS: dict[str, Callable[..., Any]] = {"preview": preview, "columns": read_columns}
ACTIONS: dict[str, Callable[..., Any]] = {
    **BEGINNINGS,
    "rows": check_rows,
    "evaluation": lambda name, *source: data_columns(runs.get(name), *source),
}


def answer(request: tuple[str, tuple[Any, ...]], connection: Connection) -> None:
    """Do one of `ACTIONS`, and send what it returns, if anything. Raises its errors, and `DataError` without memory."""
    action, arguments = request
    memory = min(free_on_cpu(), BEGINNING_MEMORY) if action in BEGINNINGS else free_on_cpu()
    send_result(connection, memory, ACTIONS[action], *arguments)


def send_result(connection: Connection, memory: int, action: Callable[..., Any], *arguments: Any) -> None:
    """Send what an action returns, if anything. Raises its errors, and `DataError` if it takes more bytes of memory."""
    try:
        with memory_limit(memory):
            result = action(*arguments)
    except MemoryError:
        raise DataError("There is not enough memory to read the data.", field="data.path") from None
    if result is not None:
        connection.send(result)


if __name__ == "__main__":
    serve(answer)
