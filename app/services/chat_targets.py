"""What there is to chat with: the demo adapter, finished runs, checkpoints and base models."""

from __future__ import annotations

from pathlib import Path

from app import settings
from app.services.listing import LISTING
from mole import runs
from mole.config import ModelConfig
from mole.core import checkpoint
from mole.core.errors import InputError, ModelError

DEFAULT_TARGET = f"base:{ModelConfig().name}"
RUNS_WITH_CHECKPOINTS = 8
"""The checkpoints of this many newest runs are offered; others can be typed as RUN@STEP."""


def chat_targets() -> list[tuple[str, str]]:
    """What there is to chat with, as (label, target): demo, finished runs (newest first), checkpoints, base models."""
    demo = settings.demo()
    adapters = [("Demo: four skills (DynMoLE)", str(demo))] if demo else []
    checkpoints: list[tuple[str, str]] = []
    bases = dict.fromkeys([ModelConfig().name])
    for number, row in enumerate(LISTING.rows()):
        name, finished = row["name"], row["state"] == "finished"
        if finished:
            adapters.append((f"{name} · {row['router']}", name))
            bases[row["model"]] = None
        if number < RUNS_WITH_CHECKPOINTS:
            steps = [step for step, _ in checkpoint.steps(runs.runs_dir() / name / "checkpoints")]
            last = row["step"] if finished else None  # the finished adapter is this checkpoint
            checkpoints += [(f"{name} · step {step}", f"{name}@{step}") for step in steps if step != last]
    return [*adapters, *checkpoints, *((f"Base model: {Path(base).name}", f"base:{base}") for base in bases)]


def target_label(target: str) -> str:
    """A target in a few words."""
    labels = {value: label for label, value in chat_targets()}
    return labels.get(target) or f"{Path(target.removeprefix('base:')).name}"


def check_target(target: str) -> None:
    """Raise `InputError` without a target, and on a Space `ModelError` for one that is not offered there."""
    if not target:
        raise InputError("Choose what to chat with first.", field="target")
    if settings.space_id() and target not in {value for _, value in chat_targets()}:
        raise ModelError("This Space has no such model to chat with.", field="target")
