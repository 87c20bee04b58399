"""Reading the inputs of an atlas in a process of its own, for the studio: a data file may be anyone's."""

from __future__ import annotations

from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any

from mole import runs
from mole.analysis.atlas.job import AtlasJob, read_inputs, start_atlas
from mole.core.child import serve
from mole.core.devices import free_on_cpu
from mole.preflight.data_process import DataReader, read_once, send_result
from mole.runs.run import Run


def begin_atlas(target: str, data: str, by: Sequence[str], limit: int | None, quick: bool) -> AtlasJob:
    """`start_atlas`, whose data are read in a process that ends. Raises its errors and those of `DataReader.read`."""

    def read(run: Run, *source: Any) -> tuple[dict[str, str], str]:
        reader = DataReader("mole.analysis.atlas.inputs_process")
        found: tuple[dict[str, str], str] = read_once(reader, "inputs", run.name, *source)
        return found

    return start_atlas(target, data, by, limit, quick=quick, read=read)


def answer(request: tuple[str, tuple[Any, ...]], connection: Connection) -> None:
    """Send what `read_inputs` returns for a run's name and the other arguments. Raises its errors."""
    name, *source = request[1]
    send_result(connection, free_on_cpu(), lambda: read_inputs(runs.get(name), *source))


if __name__ == "__main__":
    serve(answer)
