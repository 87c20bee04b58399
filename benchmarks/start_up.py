"""Where the first seconds go: loading the base model from a warm cache, and ten thousand rows into tokens."""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from common import Figure, figure, in_turns, main

LOADING = """
import time
from mole.config import ModelConfig
from mole.models.loading import import_ahead, load_base
import_ahead()  # measured by itself
begun = time.perf_counter()
load_base(ModelConfig(device="cpu", dtype="float32"))
print(time.perf_counter() - begun)
"""
TOKENISING = """
import sys, time
from mole import models
from mole.config import DataConfig
from mole.data import build_datasets
tokenizer = models.load_tokenizer(models.EMBEDDED)
begun = time.perf_counter()
found = build_datasets(DataConfig(path=sys.argv[1]), tokenizer, seed=0)
print(time.perf_counter() - begun)
"""
IMPORTING = """
import time
begun = time.perf_counter()
import mole.training.trainer, mole.chat.generate
from mole.models.loading import import_ahead
import_ahead()
print(time.perf_counter() - begun)
"""
SAMPLE = Path(__file__).parents[1] / "assets" / "data" / "skills_train.jsonl"


def seconds_of(code: str, *given: str) -> float:
    """What a program prints, in a process of its own."""
    command = [sys.executable, "-c", code, *given]
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=SAMPLE.parents[2]).stdout
    return float(printed.split()[-1])


def measure(options: argparse.Namespace) -> Iterator[Figure]:
    """Each in fresh processes, in turns."""
    with tempfile.TemporaryDirectory() as folder:
        rows = SAMPLE.read_text(encoding="utf-8").splitlines()
        many = Path(folder) / "rows.jsonl"
        many.write_text("\n".join(rows[number % len(rows)] for number in range(options.rows)) + "\n", encoding="utf-8")
        work = {
            "load the base model, s": lambda: seconds_of(LOADING),
            f"{options.rows:,} rows into tokens, s": lambda: seconds_of(TOKENISING, str(many)),
            "import torch, transformers and PEFT, s": lambda: seconds_of(IMPORTING),
        }
        goals = dict(zip(work, ("<= 2.00", "<= 5.00", ""), strict=True))
        for name, seconds in in_turns(work, options.rounds).items():
            yield figure(name, seconds, goals[name])


if __name__ == "__main__":
    main(__doc__ or "", measure, rows=10_000, rounds=3)
