"""What there is to chat with: the demo adapter, finished runs, checkpoints and base models."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from app import settings
from app.services import visitors
from app.services.listing import LISTING
from mole import runs
from mole.config import ModelConfig
from mole.core import checkpoint
from mole.core.errors import InputError, ModelError

DEFAULT_TARGET = f"base:{ModelConfig().name}"
RUNS_WITH_CHECKPOINTS = 8
"""The checkpoints of this many newest runs are offered; others can be typed as RUN@STEP."""


def chat_targets(own: Any = ()) -> list[tuple[str, str]]:
    """What there is to chat with, as (label, target): demo, finished runs (newest first), checkpoints, base models.

    First come the visitor's runs, of which `own` has the names.
    """
    demo = settings.demo()
    demos = [("Demo: four skills (DynMoLE)", str(demo))] if demo else []
    rows = LISTING.rows()
    bases = dict.fromkeys([ModelConfig().name, *(row["model"] for row in rows if row["state"] == "finished")])
    mine = of_runs(visitors.own_rows(own)[::-1])
    return [*mine, *demos, *of_runs(rows), *((f"Base model: {Path(base).name}", f"base:{base}") for base in bases)]


def run_targets() -> list[tuple[str, str]]:
    """Finished runs and checkpoints, as (label, target)."""
    return of_runs(LISTING.rows())


def of_runs(rows: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """The targets of these runs: the finished ones, then checkpoints."""
    adapters: list[tuple[str, str]] = []
    checkpoints: list[tuple[str, str]] = []
    for number, row in enumerate(rows):
        name, finished = row["name"], row["state"] == "finished"
        label = run_label(name)
        if finished:
            adapters.append((f"{label} · {row['router']}", name))
        if number < RUNS_WITH_CHECKPOINTS:
            steps = [step for step, _ in checkpoint.steps(runs.runs_dir() / name / "checkpoints")]
            last = row["step"] if finished else None  # the finished adapter is this checkpoint
            checkpoints += [(f"{label} · step {step}", f"{name}@{step}") for step in steps if step != last]
    return [*adapters, *checkpoints]


def target_label(target: str) -> str:
    """A target in a few words."""
    labels = {value: label for label, value in chat_targets()}
    return labels.get(target) or run_label(Path(target.removeprefix("base:")).name)


def run_label(name: str) -> str:
    """A run's name, or `RUN@STEP`; that of a visitor's run is a secret, and only its beginning is told."""
    run, at, step = name.partition("@")
    return f"Your run {run[8:14]}{at}{step}" if runs.is_unlisted(run) else name


def check_target(target: str) -> None:
    """Raise `InputError` without a target, and on a Space `ModelError` for one that is not offered there."""
    if not target:
        raise InputError("Choose what to chat with first.", field="target")
    if settings.space_id() and not is_offered(target):
        raise ModelError("This Space has no such model to chat with.", field="target")


def is_offered(target: str) -> bool:
    """Whether a Space offers a target: everybody's, and by their names visitors' runs and their checkpoints."""
    name, at, step = target.partition("@")
    if visitors.is_visitors(name) and (step.isdecimal() or not at):
        return bool(visitors.own_runs([name]))
    return target in {value for _, value in chat_targets()}
