"""Previews of data, made in a process of their own: file, tokenizer and chat template may be anyone's."""

from __future__ import annotations

from multiprocessing.connection import Connection
from threading import Lock
from typing import Any

from mole.config import RunConfig
from mole.core.child import Child, ChildExited, ChildTimeout, memory_limit, serve
from mole.core.errors import DataError
from mole.models.loading import import_ahead
from mole.preflight.preview import Preview, preview

SECONDS = 120.0
"""The longest a preview may take; it reads no more than the beginning of a file."""
MEMORY = 4 << 30
"""Bytes its process may take beyond those of the libraries."""


class Previewer:
    """The process that makes previews, and whose turn it is to use it; safe to call from any thread."""

    def __init__(self) -> None:
        self._in_use = Lock()
        self._child = Child("app.services.previews")

    def preview(self, config: RunConfig, rows: int) -> Preview:
        """`mole.preflight.preview.preview`, with its errors; `DataError` if it takes too long or too much memory."""
        with self._in_use:
            try:
                made: Preview = self._child.call((config.to_dict(), rows), SECONDS)
                return made
            except (ChildExited, ChildTimeout) as error:
                cause = "The data, or the model's tokenizer or chat template, is broken."
                raise DataError(f"The preview was given up: {error}. {cause}", field="data.path") from None


PREVIEWER = Previewer()


def answer(request: tuple[dict[str, Any], int], connection: Connection) -> None:
    """Make a preview and send it. Raises the errors of `preview`."""
    values, rows = request
    try:
        connection.send(preview(RunConfig.from_dict(values), rows))
    except MemoryError:
        raise DataError("The preview needs more than the 4 GB it may take.", field="data.path") from None


if __name__ == "__main__":
    import_ahead()
    with memory_limit(MEMORY):
        serve(answer)
