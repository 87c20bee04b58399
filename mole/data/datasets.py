"""The data of a run: its files read, encoded and split into training and held-out rows, with a report. No torch."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from hashlib import sha256
from typing import Any

from mole.config import DataConfig, DataSource
from mole.core.errors import DataError
from mole.data.chat_templates import ChatTemplate
from mole.data.encoding import IGNORE_INDEX, encode_examples
from mole.data.examples import Example, ExampleSet, RejectedRow, no_usable_rows, read_examples
from mole.data.mixing import joint_fingerprint, joint_shape, read_sources, short_labels, weighted
from mole.data.shapes import join_names

EncodedRow = dict[str, list[int]]


@dataclass
class DataReport:
    """Counts of rows and tokens, and the first reasons for rejecting rows.

    Attributes:
        rows: training rows of an epoch: those of several files as often as their weights say.
        eval_rows: held-out rows.
        rejected: rows that cannot be used, of all files.
        truncated: rows cut to `max_length`.
        shape: the shape of the training rows; of several files, all of theirs.
        fingerprint: sha256 of the content of the file or files.
        tokens: tokens of the training rows.
        answer_tokens: tokens of the training rows with loss.
        rejections: the first ten reasons, e.g. `row 7: completion is null`; those of a held-out file say so.
        sources: of several training files, for each its `source`, `shape` and `weight`, and the numbers of its `rows`
            (without those held out, each counted once), `eval_rows` and `rejected` rows, and the `ignored_columns`.
        notices: what was guessed about the files, what the chat template changes, and the columns that are not used.
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
    sources: list[dict[str, Any]] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON values."""
        return asdict(self)


@dataclass
class Datasets:
    """Training rows and held-out rows (possibly none), each `{"input_ids": [int], "labels": [int]}`."""

    train: list[EncodedRow]
    eval: list[EncodedRow]
    report: DataReport


@dataclass
class EncodedPart:
    """One of the training files, or the held-out one: its encoded rows, the rejected ones and how many were cut."""

    source: ExampleSet
    rows: list[EncodedRow]
    rejected: list[RejectedRow]
    truncated: int


def build_datasets(config: DataConfig, tokenizer: Any, seed: int, date: datetime | None = None) -> Datasets:
    """Read, encode and split the data of a run; a pure function of the files, the tokenizer, `seed` and `date`.

    A chat template that writes the date takes `date` for now: that of the run, which then resumes on another day.

    The held-out rows are those of `config.eval_path`, or a random `config.eval_fraction` of the rows (never all), which
    are held out before weights repeat some. Raises `DataError` as `read_sources` does, and when no row of a file can be
    encoded.
    """
    sources = config.sources
    parts = [
        EncodedPart(item, *encode_rows(item, tokenizer, config, source.field, date))
        for item, source in zip(read_sources(config), sources, strict=True)
    ]
    labels = short_labels(sources) if len(parts) > 1 else [""]
    reasons = [
        str(replace(row, source=label)) for part, label in zip(parts, labels, strict=True) for row in part.rejected
    ]
    numbered = [(number, row) for number, part in enumerate(parts) for row in part.rows]
    fingerprint, cut = joint_fingerprint([part.source.fingerprint for part in parts]), sum(p.truncated for p in parts)
    if config.eval_path:
        heldout = read_examples(config.eval_path, config.columns, field="data.eval_path")
        evaluation, eval_rejected, eval_cut = encode_rows(heldout, tokenizer, config, "data.eval_path", date)
        reasons += [f"held-out {item}" for item in eval_rejected]
        cut += eval_cut
        fingerprint = sha256(f"{fingerprint} {heldout.fingerprint}".encode()).hexdigest()
        held: list[tuple[int, EncodedRow]] = []
    else:
        numbered, held = split_rows(numbered, config.eval_fraction, seed)
        evaluation = [row for _, row in held]
    train = weighted([[row for of, row in numbered if of == number] for number in range(len(parts))], sources, seed)
    report = DataReport(
        rows=len(train),
        eval_rows=len(evaluation),
        rejected=len(reasons),
        truncated=cut,
        shape=joint_shape([part.source.shape for part in parts]),
        fingerprint=fingerprint,
        tokens=sum(len(row["input_ids"]) for row in train),
        answer_tokens=sum(label != IGNORE_INDEX for row in train for label in row["labels"]),
        rejections=reasons[:10],
        sources=describe_parts(sources, parts, Counter(of for of, _ in held)) if len(parts) > 1 else [],
        notices=source_notices([part.source for part in parts], labels, tokenizer),
    )
    return Datasets(train, evaluation, report)


def source_notices(sources: Sequence[ExampleSet], labels: Sequence[str], tokenizer: Any) -> list[str]:
    """What to tell of the files that a run learns from, in sentences; of several files each begins with its label."""
    found: list[str] = []
    for source, label in zip(sources, labels, strict=True):
        unused = source.ignored_columns
        texts = [*source.notices, *([f"Columns that are not used: {join_names(unused)}."] if unused else [])]
        found += [f"{label}: {text}" if label else text for text in texts]
    examples = [example for source in sources for example in source.examples]
    found += system_notices(examples, tokenizer)
    return list(dict.fromkeys(found))


def system_notices(examples: Sequence[Example], tokenizer: Any) -> list[str]:
    """What to tell of system messages that the chat template does not take, in at most one sentence."""
    count = sum(bool(example.messages) and example.messages[0]["role"] == "system" for example in examples)
    if not count or ChatTemplate(tokenizer).takes_system:
        return []
    return [f"The chat template takes no system message: in {count} rows it begins the first question."]


def describe_parts(
    sources: Sequence[DataSource], parts: Sequence[EncodedPart], held: Counter[int]
) -> list[dict[str, Any]]:
    """`DataReport.sources`; `held` are the numbers of held-out rows."""
    return [
        {
            "source": source.label,
            "shape": part.source.shape,
            "weight": source.weight,
            "rows": len(part.rows) - held[number],
            "eval_rows": held[number],
            "rejected": len(part.rejected),
            "ignored_columns": part.source.ignored_columns,
        }
        for number, (source, part) in enumerate(zip(sources, parts, strict=True))
    ]


def encode_rows(
    source: ExampleSet, tokenizer: Any, config: DataConfig, field: str, date: datetime | None
) -> tuple[list[EncodedRow], list[RejectedRow], int]:
    """Encoded rows, all rejected rows, and the number of truncated rows. Raises `DataError` when no row is left."""
    rows, rejected, truncated = [], list(source.rejected), 0
    encoded = encode_examples(source.examples, tokenizer, config.max_length, config.enable_thinking, date)
    for example, item in zip(source.examples, encoded, strict=True):
        if isinstance(item, DataError):
            rejected.append(RejectedRow(example.row, str(item)))
        else:
            rows += [{"input_ids": piece.input_ids, "labels": piece.labels} for piece in (item, *item.more)]
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
