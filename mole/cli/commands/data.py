"""`mole data …`: check data files."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mole.config import DataConfig, DataSource, RunConfig, coerce
from mole.core.errors import DataError, InputError

if TYPE_CHECKING:
    from mole.data import ExampleSet

BEGIN, END = "⟦", "⟧"
"""Around what is learnt, in rows that are shown."""


def check_data_command(options: argparse.Namespace) -> None:
    """Read data files as training does, and print their shapes, their rows, and the rejected rows with reasons."""
    from mole.data import check_different, read_source

    columns = coerce(dict[str, str], options.columns, "--columns") if options.columns else {}
    given = options.files[0] if len(options.files) == 1 else options.files
    sources = DataConfig(path=given, columns=columns, name=options.name, split=options.split).sources or [DataSource()]
    found = [read_source(source, field="FILE") for source in sources]
    check_different(sources, [one.fingerprint for one in found])
    tokenizer = None
    if options.model or options.show:
        from mole.models.loading import load_tokenizer

        tokenizer = load_tokenizer(options.model or RunConfig().model.name)
    reports = [file_report(source, one, tokenizer, options.show) for source, one in zip(sources, found, strict=True)]
    report = reports[0] if len(reports) == 1 else joint_report(sources, reports)
    if options.json:
        print(json.dumps(report, indent=1))
        return
    for number, each in enumerate(reports):
        print(end="\n" if number else "")
        print_report(each)
    if len(reports) > 1:
        print(f"\nTogether: {report['rows']} rows, {report['rows_per_epoch']} per epoch, {report['rejected']} rejected")


def file_report(source: DataSource, found: ExampleSet, tokenizer: Any, show: int) -> dict[str, Any]:
    """The report of one file, with its tokens if there is a tokenizer. Raises `InputError` when no row can be used."""
    report: dict[str, Any] = {
        "data": source.label,
        "shape": found.shape,
        "rows": len(found.examples),
        "rejected": len(found.rejected),
        "rejections": list(map(str, found.rejected)),
        "ignored_columns": found.ignored_columns,
        "notices": found.notices,
        "shown": [],
        "fingerprint": found.fingerprint,
    }
    if tokenizer is not None:
        report |= encoded_report(found, tokenizer, show)
    if not report["rows"]:
        raise InputError(f"{source.label}: no usable row; {report['rejections'][0]}.")
    return report


def joint_report(sources: Sequence[DataSource], reports: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The report of several files together, with those of each as `files`."""
    from mole.data import short_labels, weighted
    from mole.data.mixing import joint_fingerprint, joint_shape

    labels = short_labels(sources)
    named = list(zip(labels, reports, strict=True))
    return {
        "data": ", ".join(source.label for source in sources),
        "shape": joint_shape([report["shape"] for report in reports]),
        "rows": sum(report["rows"] for report in reports),
        "rows_per_epoch": len(weighted([range(report["rows"]) for report in reports], sources, seed=0)),
        "rejected": sum(report["rejected"] for report in reports),
        "rejections": [f"{label} {text}" for label, report in named for text in report["rejections"]],
        "ignored_columns": list(dict.fromkeys(name for report in reports for name in report["ignored_columns"])),
        "notices": [f"{label}: {text}" for label, report in named for text in report["notices"]],
        "shown": [row for report in reports for row in report["shown"]],
        "fingerprint": joint_fingerprint([report["fingerprint"] for report in reports]),
        "files": [{**report, "weight": source.weight} for source, report in zip(sources, reports, strict=True)],
    }


def encoded_report(source: ExampleSet, tokenizer: Any, show: int) -> dict[str, Any]:
    """What the report of a file has beside, or instead, with a base model's tokenizer and chat template.

    Args:
        source: the rows.
        tokenizer: the base model's.
        show: how many rows are shown.
    """
    from mole.data import EncodedExample, Example, RejectedRow, encode_examples
    from mole.data.encoding import pieces_of_text
    from mole.preflight.preview import EncodedFile, TokenLabeller, find_notices

    good, encoded, rejected = list[Example](), list[EncodedExample](), list(source.rejected)
    for example, item in zip(source.examples, encode_examples(source.examples, tokenizer, sys.maxsize), strict=True):
        if isinstance(item, DataError):
            rejected.append(RejectedRow(example.row, str(item)))
            continue
        good.append(example)
        encoded.append(item)
    rejected.sort(key=lambda item: item.row)
    labeller = TokenLabeller(tokenizer)
    shown = encoded[:show]
    if source.shape == "text":  # long texts are learnt in pieces
        texts = (pieces_of_text(item.input_ids, DataConfig().max_length) for item in shown)
        shown = [piece for text in texts if isinstance(text, EncodedExample) for piece in (text, *text.more)][:show]
    rows = [labeller.tokens(item) for item in shown]
    return {
        "rows": len(good),
        "rejected": len(rejected),
        "rejections": list(map(str, rejected)),
        "notices": find_notices(EncodedFile(source, good, encoded, rejected, True), tokenizer),
        "shown": [{"tokens": [token.text for token in row], "learnt": [token.learnt for token in row]} for row in rows],
        "tokens": length_summary([len(item.input_ids) for item in encoded]),
    }


def length_summary(lengths: list[int]) -> dict[str, int]:
    """Shortest, median, longest and total length in tokens; empty without rows."""
    if not lengths:
        return {}
    longest = DataConfig().max_length
    return {
        "min": min(lengths),
        "median": int(statistics.median(lengths)),
        "max": max(lengths),
        "total": sum(lengths),
        f"longer than {longest}": sum(length > longest for length in lengths),
    }


def print_report(report: dict[str, Any]) -> None:
    """Print the report of a file for people."""
    from mole.data.shapes import join_names

    print(f"{report['data']}: {report['rows']} rows of shape {report['shape']}, {report['rejected']} rejected")
    if report["ignored_columns"]:
        print("Columns that are not used: " + join_names(report["ignored_columns"]))
    if "tokens" in report:
        print("Tokens per row: " + ", ".join(f"{key} {value}" for key, value in report["tokens"].items()))
    for notice in report["notices"]:
        print(f"Note: {notice}")
    for rejection in report["rejections"]:
        print(f"  {rejection}")
    for number, row in enumerate(report["shown"], start=1):
        print(f"\nExample {number}; what is learnt stands between {BEGIN} and {END}:\n{marked_text(**row)}")


def marked_text(tokens: list[str], learnt: list[bool]) -> str:
    """The text of a row with marks around what is learnt."""
    text, inside = "", False
    for token, wanted in zip(tokens, learnt, strict=True):
        text += (BEGIN if wanted else END) * (wanted != inside) + token
        inside = wanted
    return text + END * inside
