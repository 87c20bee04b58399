"""`mole models …`: list base models, and download them."""

from __future__ import annotations

import argparse
import json

from mole.cli.console import print_table
from mole.core.text import bytes_text


def list_models_command(options: argparse.Namespace) -> None:
    """List the base models that need no download."""
    from mole import models

    rows = models.list_models()
    if options.json:
        print(json.dumps(rows, indent=1, default=str))
        return
    cells = [
        [row["name"], row["kind"], bytes_text(row["size"]) if row["size"] else "-", "yes" if row["cached"] else "no"]
        for row in rows
    ]
    print_table(["NAME", "KIND", "SIZE", "CACHED"], cells)


def pull_model_command(options: argparse.Namespace) -> None:
    """Download a base model, and convert it if it is a GGUF file."""
    from mole import models

    print(f"{options.name} is ready: {models.pull(options.name)}")
