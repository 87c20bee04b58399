"""`mole data …`: check a data file."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from typing import Any

from mole.core.errors import InputError


def check_data_command(options: argparse.Namespace) -> None:
    """Read a data file as training does, and print its shape, its rows and the rejected rows with reasons."""
    from mole.data import read_examples
    from mole.data.shapes import join_names

    rows = read_examples(options.file, field="FILE")
    rejected = [{"row": item.row, "reason": item.reason} for item in rows.rejected]
    report: dict[str, Any] = {
        "data": options.file,
        "shape": rows.shape,
        "rows": len(rows.examples),
        "rejected": rejected,
        "ignored_columns": rows.ignored_columns,
        "notices": rows.notices,
        "fingerprint": rows.fingerprint,
    }
    if options.model:
        report["tokens"] = token_lengths(rows.examples, options.model, rejected)
        report["rows"] = len(rows.examples) + len(rows.rejected) - len(rejected)
    if not report["rows"]:
        raise InputError(f"{options.file}: no usable row; row {rejected[0]['row']}: {rejected[0]['reason']}")
    if options.json:
        print(json.dumps(report, indent=1))
        return
    print(f"{options.file}: {report['rows']} rows of shape {rows.shape}, {len(rejected)} rejected")
    if rows.ignored_columns:
        print("Columns that are not used: " + join_names(rows.ignored_columns))
    if options.model:
        print("Tokens per row: " + ", ".join(f"{key} {value}" for key, value in report["tokens"].items()))
    for notice in rows.notices:
        print(f"Note: {notice}")
    for item in rejected:
        print(f"  row {item['row']}: {item['reason']}")


def token_lengths(examples: Sequence[Any], model: str, rejected: list[dict[str, Any]]) -> dict[str, int]:
    """Shortest, median, longest and total length in tokens; rows that cannot be encoded are appended to `rejected`."""
    from mole.config import DataConfig
    from mole.core.errors import DataError
    from mole.data import encode_examples
    from mole.models.loading import load_tokenizer

    lengths: list[int] = []
    longest = DataConfig().max_length
    for example, encoded in zip(examples, encode_examples(examples, load_tokenizer(model), sys.maxsize), strict=True):
        if isinstance(encoded, DataError):
            rejected.append({"row": example.row, "reason": str(encoded)})
        else:
            lengths.append(len(encoded.input_ids))
    if not lengths:
        return {}
    return {
        "min": min(lengths),
        "median": int(statistics.median(lengths)),
        "max": max(lengths),
        "total": sum(lengths),
        f"longer than {longest}": sum(length > longest for length in lengths),
    }
