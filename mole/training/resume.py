"""Whether a run may resume from a checkpoint: only with the same settings, data and base model."""

from __future__ import annotations

import dataclasses
import hashlib
from datetime import datetime, timezone
from typing import Any

import numpy as np

from mole.config import DataConfig, RunConfig
from mole.config.router_params import TopKParams
from mole.core.errors import CheckpointError
from mole.data import Datasets
from mole.models.loading import Base
from mole.models.sources import fingerprint
from mole.runs.run import Run

MAY_CHANGE = {"save_steps", "save_total_limit", "logging_steps", "eval_steps"}
"""Training settings that may differ on resume: they do not affect the weights."""


def run_identity(config: RunConfig, datasets: Datasets, base: Base) -> dict[str, Any]:
    """What a checkpoint records of its run, to be compared on resume: `config`, `data`, `tokens` and `base`."""
    return {
        "config": config.to_dict(),
        "data": datasets.report.fingerprint,
        "tokens": tokens_fingerprint(datasets),
        "base": fingerprint(base.folder) if base.folder else {},
    }


def first_date(run: Run) -> datetime | None:
    """When the run, or the one that it continues, was created (UTC); None if its events do not say."""
    try:
        return datetime.fromtimestamp(run.begun, timezone.utc)
    except (OverflowError, OSError, ValueError):
        return None


def as_begun(config: RunConfig, before: dict[str, Any]) -> RunConfig:
    """The settings of a run with the gate's meaning in its checkpoint, of which `before` is the `run_identity`.

    Earlier versions renormalised the weight of top-k's only expert; a run that they began goes on so.
    """
    params = config.adapter.params
    if not isinstance(params, TopKParams) or params.renormalize is not None:
        return config
    begun = dataclasses.replace(params, renormalize=before["config"].get("adapter", {}).get("renormalize", True))
    return dataclasses.replace(config, adapter=dataclasses.replace(config.adapter, params=begun))


def check_resumable(before: dict[str, Any], now: dict[str, Any]) -> None:
    """Compare a checkpoint's `run_identity` with the current one.

    What a checkpoint of an earlier version does not contain is not compared. Raises `CheckpointError` that names every
    changed setting, the data and the base model.
    """
    settings = changed_settings(before["config"], now["config"])
    if before.get("base") and before["base"] == now["base"]:  # the same model at another place
        settings = [change for change in settings if not change.startswith("model.name ")]
    refuse_changes([*settings, *changed_inputs(before, now)], "resumed")


def refuse_changes(changes: list[str], what: str) -> None:
    """Raise `CheckpointError` with what has changed, if anything has, so that the run cannot be `what`."""
    if changes:
        raise CheckpointError(
            f"The run cannot be {what}, because it has changed: {'; '.join(changes)}. "
            "Undo the change, or start a new run with the new settings."
        )


def changed_settings(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """The settings that differ, each with both values."""
    # settings that are newer than the checkpoint get their defaults
    before = as_begun(RunConfig.from_dict(before), {"config": before}).to_dict()
    return [
        f"{section}.{key} was {before[section].get(key)!r} and is now {now[section].get(key)!r}"
        for section in ("model", "data", "adapter", "training")
        for key in sorted({*before[section], *now[section]} - MAY_CHANGE)
        if before[section].get(key) != now[section].get(key)
    ]


def changed_inputs(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What differs in the content of the data, its tokens, and the files of the base model."""
    changes = []
    data, model = now["config"]["data"], now["config"]["model"]["name"]
    if before["data"] != now["data"]:
        named = [*(source.path for source in DataConfig(**data).sources), data["eval_path"]]
        files = " or ".join(name for name in named if name)
        changes.append(f"the content of the training data has changed ({files})")
    elif before.get("tokens", now["tokens"]) != now["tokens"]:
        changes.append(f"the same data gives different tokens: tokenizer or chat template of {model} have changed")
    base = before.get("base", now["base"])
    files = ", ".join(name for name in sorted({*base, *now["base"]}) if base.get(name) != now["base"].get(name))
    if files:
        changes.append(f"the base model {model} has changed ({files})")
    return changes


def tokens_fingerprint(datasets: Datasets) -> str:
    """SHA-256 of all token ids and labels, in order, as hex."""
    digest = hashlib.sha256()
    for row in [*datasets.train, *datasets.eval]:
        for values in (row["input_ids"], row["labels"]):
            digest.update(np.asarray([len(values), *values], dtype=np.int64).tobytes())
    return digest.hexdigest()
