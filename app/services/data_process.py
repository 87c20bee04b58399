"""Reading data for the page in processes of their own: a file, a tokenizer or a chat template may be anyone's."""

from __future__ import annotations

from multiprocessing.connection import Connection
from threading import Lock
from typing import Any

from mole.config import RunConfig
from mole.core.child import Child, ChildExited, ChildTimeout, memory_limit, serve
from mole.core.errors import DataError
from mole.data import read_columns
from mole.preflight.preview import Preview, preview

PREVIEW_SECONDS, COLUMNS_SECONDS = 120.0, 20.0
"""The longest either may take; they read no more than the beginning of a file."""
MEMORY = 4 << 30
"""Bytes a process may take."""


class DataReader:
    """A process that reads data, and whose turn it is to use it; safe to call from any thread."""

    def __init__(self) -> None:
        self._in_use = Lock()
        self._child = Child("app.services.data_process")

    def read(self, request: RunConfig | str, seconds: float, rows: int = 0) -> Any:
        """What `answer` sends for a request. Raises its errors, and `DataError` past a limit."""
        values = request if isinstance(request, str) else request.to_dict()
        with self._in_use:
            try:
                return self._child.call((values, rows), seconds)
            except (ChildExited, ChildTimeout) as error:
                cause = "The file, or the model's tokenizer or chat template, is broken."
                raise DataError(f"Reading the data was given up: {error}. {cause}", field="data.path") from None

    def end(self) -> None:
        """End the process."""
        self._child.kill()


PREVIEWS, COLUMNS = DataReader(), DataReader()
"""Two, so that a file's columns do not wait for a preview."""


def preview_of(config: RunConfig, rows: int) -> Preview:
    """`mole.preflight.preview.preview`, with its errors; `DataError` if it takes too long or too much memory."""
    made: Preview = PREVIEWS.read(config, PREVIEW_SECONDS, rows)
    return made


def columns_of(path: str) -> tuple[str, ...]:
    """`mole.data.read_columns`, with its errors; `DataError` if it takes too long or too much memory."""
    names: tuple[str, ...] = COLUMNS.read(path, COLUMNS_SECONDS)
    return names


# ---------------------------------------------------------------------------------------------------------
# The process


def answer(request: tuple[dict[str, Any] | str, int], connection: Connection) -> None:
    """Send the preview of a run's settings, or the columns of a path. Raises their errors."""
    values, rows = request
    try:
        if isinstance(values, str):
            connection.send(read_columns(values))
        else:
            connection.send(preview(RunConfig.from_dict(values), rows))
    except MemoryError:
        message = f"Reading the data takes more than the {MEMORY >> 30} GB it may take."
        raise DataError(message, field="data.path") from None


if __name__ == "__main__":
    with memory_limit(MEMORY):
        serve(answer)
