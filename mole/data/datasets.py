"""The data of a run: its files read, encoded and split into training and held-out rows, with a report. No torch."""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from typing import Any

from mole.config import DataConfig
from mole.core.errors import DataError
from mole.data.encoding import IGNORE_INDEX, encode_examples
from mole.data.examples import ExampleSet, RejectedRow, no_usable_rows, read_examples


@dataclass
class DataReport:
    """What became of the data: counts of rows and tokens, and the first reasons for rejecting rows."""

    rows: int
    eval_rows: int
    rejected: int
    truncated: int
    shape: str
    fingerprint: str
    tokens: int
    answer_tokens: int
    rejections: list[str] = field(default_factory=list)
    """The first ten, as `row 7: completion is null`; those of a held-out file say so."""

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON values."""
        return asdict(self)


@dataclass
class Datasets:
    """Rows of `{"input_ids": [int], "labels": [int]}` to learn from and those held out (possibly none)."""

    train: list[dict[str, list[int]]]
    eval: list[dict[str, list[int]]]
    report: DataReport


def build_datasets(config: DataConfig, tokenizer: Any, seed: int) -> Datasets:
    """Read, encode and split the data of a run; a pure function of the files, the tokenizer and `seed`.

    Held out is the file `config.eval_path`, else `config.eval_fraction` of the rows, at random but never all of them.
    Raises `DataError` as `read_examples` does, and when no row can be encoded.
    """
    source = read_examples(config.path, config.columns)
    train, rejected, cut = encode_rows(source, tokenizer, config.max_length, "data.path")
    reasons, fingerprint = list(map(str, rejected)), source.fingerprint
    if config.eval_path:
        heldout = read_examples(config.eval_path, config.columns, field="data.eval_path")
        evaluation, eval_rejected, eval_cut = encode_rows(heldout, tokenizer, config.max_length, "data.eval_path")
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
    source: ExampleSet, tokenizer: Any, max_length: int, field: str
) -> tuple[list[dict[str, list[int]]], list[RejectedRow], int]:
    """The rows as ids and labels, all that were rejected, and how many were truncated. Raises `DataError` for none."""
    rows, rejected, truncated = [], list(source.rejected), 0
    encoded = encode_examples(source.examples, tokenizer, max_length)
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
    """Rows to learn from and a random `fraction` held out, both in their order: at least one of each if it can be."""
    count = min(max(round(len(rows) * fraction), 1), len(rows) - 1) if fraction else 0
    held = set(random.Random(seed).sample(range(len(rows)), count))
    return [row for i, row in enumerate(rows) if i not in held], [rows[i] for i in sorted(held)]
