"""Whether what a run needs is there: its data, its base model, the adapter that it begins with. No torch."""

from __future__ import annotations

from collections.abc import Callable

from mole.config import RunConfig
from mole.core.errors import ConfigError
from mole.runs.initial import check_initial


def check_inputs(config: RunConfig, read: Callable[..., str] | None = None) -> None:
    """Check that the model exists and the data can be read, before a run is created. Raises `InputError`.

    All of the data is read by `read`, by default `mole.data.fingerprint_of`.
    """
    from mole import models
    from mole.data import check_different, errors_of, fingerprint_of

    read = read or fingerprint_of
    if not config.data.path:
        raise ConfigError(
            "data.path", "", "a JSON, JSONL, CSV, Parquet or text file, or a hub id", "Give one with --data."
        )
    models.resolve(config.model.name)
    check_initial(config)
    found = []
    for item in (sources := config.data.sources):
        with errors_of(item):
            found.append(read(item.path, item.columns, field=item.field, name=item.name, split=item.split))
    check_different(sources, found)
    if config.data.eval_path:
        read(config.data.eval_path, config.data.columns, field="data.eval_path")
