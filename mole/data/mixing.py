"""Several files or hub data sets as one training set: read, checked and weighted. No torch."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeVar

from mole.config import DataConfig, DataSource
from mole.config.data_sources import SETTING
from mole.core import limits
from mole.core.errors import DataError
from mole.data.examples import ExampleSet, read_examples

_T = TypeVar("_T")


def fingerprint_of(path: str, *columns: Any, **named: Any) -> str:
    """`ExampleSet.fingerprint` of what `read_examples` reads. Raises its errors."""
    return read_examples(path, *columns, **named).fingerprint


def read_source(
    source: DataSource, limit: int | None = None, *, field: str | None = None, peek: bool = False
) -> ExampleSet:
    """`read_examples` of one of `DataConfig.sources`; errors name its place in `data.path`, or `field`."""
    with errors_of(source):
        return read_examples(
            source.path, source.columns, limit, field=field or source.field, peek=peek, name=source.name,
            split=source.split,
        )  # fmt: skip


@contextmanager
def errors_of(source: DataSource) -> Iterator[None]:
    """Let errors about `data.columns` name the columns of this source, if it is one of several."""
    try:
        yield
    except DataError as error:
        if source.field != SETTING and (error.field or "").startswith("data.columns"):
            error.field = f"{source.field}.columns"
        raise


def read_sources(config: DataConfig) -> list[ExampleSet]:
    """The training data of a run, one `ExampleSet` for each of `config.sources`.

    Raises `DataError` as `read_examples` does, and for the same content given twice.
    """
    sets = [read_source(source) for source in config.sources]
    check_different(config.sources, [found.fingerprint for found in sets])
    return sets


def check_different(sources: Sequence[DataSource], fingerprints: Sequence[str]) -> None:
    """Raise `DataError` where two sources have the same content and columns: their rows might also be held out."""
    seen: dict[tuple[str, str], DataSource] = {}
    for source, fingerprint in zip(sources, fingerprints, strict=True):
        first = seen.setdefault((fingerprint, str(sorted(source.columns.items()))), source)
        if first is not source:
            both = f"{first.label} is" if first.label == source.label else f"{first.label} and {source.label} are"
            raise DataError(
                f"{both} given twice, with the same content; give it once, with a weight of 2.", field="data.path"
            )


def joint_fingerprint(fingerprints: Sequence[str]) -> str:
    """The sha256 of several contents; of one, its own."""
    return fingerprints[0] if len(fingerprints) == 1 else sha256(" ".join(fingerprints).encode()).hexdigest()


def joint_shape(shapes: Sequence[str]) -> str:
    """The shapes of several files, each once, e.g. `messages + text`."""
    return " + ".join(dict.fromkeys(shapes))


def short_labels(sources: Sequence[DataSource]) -> list[str]:
    """What tells the sources apart: their file names, or their whole paths where those are the same."""
    names = [Path(source.label).name for source in sources]
    return names if len({*names}) == len(names) else [source.label for source in sources]


def weighted(parts: Sequence[Sequence[_T]], sources: Sequence[DataSource], seed: int) -> list[_T]:
    """The rows of an epoch: those of each source as often as its weight says, a fraction of them drawn by `seed`.

    Each source gives at least one row. Raises `DataError` for more than `limits.ROWS` rows.
    """
    counts = [
        max(round(len(part) * source.weight), 1 if part else 0) for part, source in zip(parts, sources, strict=True)
    ]
    if sum(counts) > limits.ROWS:
        raise DataError(
            f"With their weights the data have {sum(counts):,} rows per epoch; the maximum is {limits.ROWS:,}. "
            "Lower the weights.",
            field="data.path",
        )
    rows: list[_T] = []
    for number, (part, count) in enumerate(zip(parts, counts, strict=True)):
        times, rest = divmod(count, len(part)) if part else (0, 0)
        drawn = random.Random(f"{seed} {number}").sample(range(len(part)), rest)
        rows += [*part] * times + [part[index] for index in sorted(drawn)]
    return rows
