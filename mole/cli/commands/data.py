"""`mole data …`: check a data file."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from typing import TYPE_CHECKING, Any

from mole.config import DataConfig, RunConfig, coerce
from mole.core.errors import DataError, InputError

if TYPE_CHECKING:
    from mole.data import ExampleSet

BEGIN, END = "⟦", "⟧"
"""Around what is learnt, in rows that are shown."""


def check_data_command(options: argparse.Namespace) -> None:
    """Read a data file as training does, and print its shape, its rows, and the rejected rows with reasons."""
    from mole.data import read_examples

    columns = coerce(dict[str, str], options.columns, "--columns") if options.columns else {}
    source = read_examples(options.file, columns, field="FILE")
    report: dict[str, Any] = {
        "data": options.file,
        "shape": source.shape,
        "rows": len(source.examples),
        "rejected": len(source.rejected),
        "rejections": list(map(str, source.rejected)),
        "ignored_columns": source.ignored_columns,
        "notices": source.notices,
        "shown": [],
        "fingerprint": source.fingerprint,
    }
    if options.model or options.show:
        report |= encoded_report(source, options.model or RunConfig().model.name, options.show)
    if not report["rows"]:
        raise InputError(f"{options.file}: no usable row; {report['rejections'][0]}.")
    if options.json:
        print(json.dumps(report, indent=1))
    else:
        print_report(report)


def encoded_report(source: ExampleSet, model: str, show: int) -> dict[str, Any]:
    """What the report of a file has beside, or instead, with a base model's tokenizer and chat template.

    Args:
        source: the rows.
        model: name of the base model.
        show: how many rows are shown.
    """
    from mole.data import EncodedExample, Example, RejectedRow, encode_examples
    from mole.models.loading import load_tokenizer
    from mole.preflight.preview import EncodedFile, TokenLabeller, find_notices

    tokenizer = load_tokenizer(model)
    good, shown, lengths, rejected = list[Example](), list[EncodedExample](), list[int](), list(source.rejected)
    for example, item in zip(source.examples, encode_examples(source.examples, tokenizer, sys.maxsize), strict=True):
        if isinstance(item, DataError):
            rejected.append(RejectedRow(example.row, str(item)))
            continue
        good.append(example)
        lengths.append(len(item.input_ids))
        shown += [item] if len(shown) < show else []
    rejected.sort(key=lambda item: item.row)
    labeller = TokenLabeller(tokenizer)
    rows = [labeller.tokens(item) for item in shown]
    return {
        "rows": len(good),
        "rejected": len(rejected),
        "rejections": list(map(str, rejected)),
        "notices": find_notices(EncodedFile(source, good, shown, rejected, True), tokenizer),
        "shown": [{"tokens": [token.text for token in row], "learnt": [token.learnt for token in row]} for row in rows],
        "tokens": length_summary(lengths),
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
