"""The data of a run: its files read, encoded and split into training and held-out rows, with a report. No torch."""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass, field
from datetime import datetime
from hashlib import sha256
from typing import Any

from mole.config import DataConfig
from mole.core.errors import DataError
from mole.data.encoding import IGNORE_INDEX, encode_examples
from mole.data.examples import ExampleSet, RejectedRow, no_usable_rows, read_examples


@dataclass
class DataReport:
    """Counts of rows and tokens, and the first reasons for rejecting rows.

    Attributes:
        rows: training rows.
        eval_rows: held-out rows.
        rejected: rows that cannot be used, of both files.
        truncated: rows cut to `max_length`.
        shape: the shape of the training file's rows.
        fingerprint: sha256 of the content of the file or files.
        tokens: tokens of the training rows.
        answer_tokens: tokens of the training rows with loss.
        rejections: the first ten reasons, e.g. `row 7: completion is null`; those of a held-out file say so.
    """

    rows: int
    eval_rows: int
    rejected: int
    truncated: int
    shape: str
    fingerprint: str
    tokens: int
    answer_tokens: int
    rejections: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON values."""
        return asdict(self)


@dataclass
class Datasets:
    """Training rows and held-out rows (possibly none), each `{"input_ids": [int], "labels": [int]}`."""

    train: list[dict[str, list[int]]]
    eval: list[dict[str, list[int]]]
    report: DataReport


def build_datasets(config: DataConfig, tokenizer: Any, seed: int, date: datetime | None = None) -> Datasets:
    """Read, encode and split the data of a run; a pure function of the files, the tokenizer, `seed` and `date`.

    A chat template that writes the date takes `date` for now: that of the run, which then resumes on another day.

    The held-out rows are those of `config.eval_path`, or a random `config.eval_fraction` of the rows (never all).
    Raises `DataError` as `read_examples` does, and when no row can be encoded.
    """
    source = read_examples(config.path, config.columns)
    train, rejected, cut = encode_rows(source, tokenizer, config, "data.path", date)
    reasons, fingerprint = list(map(str, rejected)), source.fingerprint
    if config.eval_path:
        heldout = read_examples(config.eval_path, config.columns, field="data.eval_path")
        evaluation, eval_rejected, eval_cut = encode_rows(heldout, tokenizer, config, "data.eval_path", date)
        reasons += [f"held-out {item}" for item in eval_rejected]
        cut += eval_cut
        fingerprint = sha256(f"{fingerprint} {heldout.fingerprint}".encode()).hexdigest()
    else:
        train, evaluation = split_rows(train, config.eval_fraction, seed)
    report = DataReport(
        rows=len(train),
        eval_rows=len(evaluation),
        rejected=len(reasons),
        truncated=cut,
        shape=source.shape,
        fingerprint=fingerprint,
        tokens=sum(len(row["input_ids"]) for row in train),
        answer_tokens=sum(label != IGNORE_INDEX for row in train for label in row["labels"]),
        rejections=reasons[:10],
    )
    return Datasets(train, evaluation, report)


def encode_rows(
    source: ExampleSet, tokenizer: Any, config: DataConfig, field: str, date: datetime | None
) -> tuple[list[dict[str, list[int]]], list[RejectedRow], int]:
    """Encoded rows, all rejected rows, and the number of truncated rows. Raises `DataError` when no row is left."""
    rows, rejected, truncated = [], list(source.rejected), 0
    encoded = encode_examples(source.examples, tokenizer, config.max_length, config.enable_thinking, date)
    for example, item in zip(source.examples, encoded, strict=True):
        if isinstance(item, DataError):
            rejected.append(RejectedRow(example.row, str(item)))
        else:
            rows.append({"input_ids": item.input_ids, "labels": item.labels})
            truncated += item.truncated
    rejected.sort(key=lambda item: item.row)
    if not rows:
        raise no_usable_rows(source.source, rejected, field)
    return rows, rejected, truncated


def split_rows(rows: list[Any], fraction: float, seed: int) -> tuple[list[Any], list[Any]]:
    """Split off a random `fraction` → (training rows, held-out rows), both in order and with at least one row each.

    Nothing is held out when `fraction` is 0 or there is only one row.
    """
    count = min(max(round(len(rows) * fraction), 1), len(rows) - 1) if fraction else 0
    held = set(random.Random(seed).sample(range(len(rows)), count))
    return [row for i, row in enumerate(rows) if i not in held], [rows[i] for i in sorted(held)]
