"""What a visitor of a Space with ZeroGPU may train: bounds of the settings, and how long a run takes. No torch."""

from __future__ import annotations

import math
import os

from app import settings
from mole.config import AdapterConfig, DataConfig, RunConfig, TrainingConfig
from mole.core.errors import ConfigError, DataError
from mole.core.paths import local_path
from mole.core.text import bytes_text

MOST_SECONDS = 110.0
"""A run whose estimate is longer is refused; a call for a GPU takes at most `app.services.zerogpu.LONGEST`."""
SAVING_SECONDS = 8.0
"""So long before its time is over the training ends, to save the adapter."""
DATA_BYTES = 2 << 20
"""Bytes of a run's data files together; as a file of text that is read uncompressed."""
FILES = 4
RANKS = 512
"""Experts × rank of a projection."""

LOAD_SECONDS = 15.0
"""From the start of a call to the first step: the fork, the model, the data."""
PASS_SECONDS = 0.5
TOKENS_PER_SECOND = 20_000.0
"""A micro-batch of the 135M model takes at least so long, and trains so many tokens per second: a third of an H200 with
torch 2.11. Both are cautious guesses from the number of kernels and of operations, to be replaced by a measurement."""
CHECKPOINTING = 1.4
"""Gradient checkpointing computes each forward pass twice."""
FORWARD_SHARE = 0.5
"""An evaluation's share of the time that training on the same tokens takes."""
SAVE_SECONDS = 1.0
BYTES_PER_TOKEN = 2.0
"""Few, so that held-out files are rather counted as too long."""

ADVICE = "For everything else: Train this on your own hardware, below the button."
UNCHANGED = ("init_from", "modules_to_save", "bias", "trainable_token_indices", "rank_pattern")
"""Settings of the adapter that make it large, or read other runs: they stay as they are by default."""


def check(config: RunConfig) -> float:
    """Check the settings of a visitor's run → the seconds it will take, at most `MOST_SECONDS`.

    Raises `ConfigError`, `DataError` or `ModelError` that names the field, its value and what is allowed.
    """
    settings.check_public(config)
    given, default = config.adapter, AdapterConfig()
    for name in UNCHANGED:
        value, kept = getattr(given, name), getattr(default, name)
        if value != kept:
            raise ConfigError(f"adapter.{name}", value, f"{kept or 'empty'} on this Space", ADVICE)
    ranks = max(given.expert_counts) * given.r
    if ranks > RANKS:
        raise ConfigError("adapter.num_experts", given.num_experts, f"such that experts × rank ({given.r}) is at most "
                          f"{RANKS} on this Space", ADVICE)  # fmt: skip
    kept_most, allowed = config.training.save_total_limit, TrainingConfig().save_total_limit
    if kept_most > allowed:
        raise ConfigError("training.save_total_limit", kept_most, f"at most {allowed} on this Space", ADVICE)
    check_data(config.data)
    check_steps(config)
    return estimated_seconds(config)


def check_data(config: DataConfig) -> None:
    """Raise `DataError` unless the files are few and small."""
    paths = [source.path for source in config.sources] + ([config.eval_path] if config.eval_path else [])
    if not config.sources or not all(os.path.isfile(local_path(path)) for path in paths):
        raise DataError("Choose the sample or upload a file first: there is no such file.", field="data.path")
    if len(paths) > FILES:
        raise DataError(f"{len(paths)} data files; a run here has at most {FILES}. {ADVICE}", field="data.path")
    if (size := sum(map(size_of, paths))) > DATA_BYTES:
        allowed = f"on this Space the files of a run have at most {bytes_text(DATA_BYTES)}, uncompressed text"
        raise DataError(f"The data files have {bytes_text(size)}; {allowed}. {ADVICE}", field="data.path")


def check_steps(config: RunConfig) -> None:
    """Raise `ConfigError` unless the steps are given, and as few as fit."""
    steps, most = config.training.max_steps, most_steps(config)
    if most < 1:
        batch, length = config.training.per_device_train_batch_size, config.data.max_length
        allowed = f"fewer examples: one step of so many, each of up to {length} tokens, takes too long on this Space"
        raise ConfigError("training.per_device_train_batch_size", batch, allowed, ADVICE)
    if not 1 <= steps <= most:
        allowed = f"1 to {most} on this Space, which is what fits into {MOST_SECONDS:g} seconds with these settings"
        raise ConfigError("training.max_steps", steps, allowed, ADVICE)


def most_steps(config: RunConfig) -> int:
    """The most steps whose estimate is within the bounds; 0 if not even one is."""
    left = MOST_SECONDS - LOAD_SECONDS - evaluation_seconds(config.data)
    return max(0, math.floor(left / seconds_per_step(config) + 1e-9))


def estimated_seconds(config: RunConfig) -> float:
    """How long a run of so many steps takes from the start of its call, in seconds."""
    steps = config.training.max_steps * seconds_per_step(config)
    return LOAD_SECONDS + steps + evaluation_seconds(config.data)


def seconds_per_step(config: RunConfig) -> float:
    """Seconds of an optimizer step with rows as long as allowed, with its share of checkpoints and evaluations."""
    training = config.training
    tokens = training.per_device_train_batch_size * config.data.max_length
    once = max(PASS_SECONDS, tokens / TOKENS_PER_SECOND) * (CHECKPOINTING if training.gradient_checkpointing else 1.0)
    evaluated = evaluation_seconds(config.data) / training.eval_steps if training.eval_steps else 0.0
    return once * training.gradient_accumulation_steps + SAVE_SECONDS / training.save_steps + evaluated


def evaluation_seconds(config: DataConfig) -> float:
    """Seconds of one evaluation of the held-out rows."""
    if config.eval_path:
        held_out = float(size_of(config.eval_path))
    else:
        held_out = config.eval_fraction * sum(size_of(source.path) for source in config.sources)
    return held_out / BYTES_PER_TOKEN / TOKENS_PER_SECOND * FORWARD_SHARE


def size_of(path: str) -> int:
    """A data file's bytes. Raises `DataError` for a format whose size does not tell how much text it holds."""
    file = local_path(path)
    if file.suffix.lower() in (".gz", ".zip", ".parquet"):
        raise DataError(
            f"{file.name} is compressed; this Space trains on uncompressed JSON, JSONL, CSV and text. {ADVICE}",
            field="data.path",
        )
    try:
        return file.stat().st_size
    except OSError:
        return 0
