"""How many tokens of a row a base model can read. No torch."""

from __future__ import annotations

import dataclasses
from typing import Any

from mole.config import RunConfig

UNLIMITED = 1 << 30


def context_length(hf_config: Any) -> int:
    """Tokens that a model was made for, with those of its answer; practically unlimited if its config does not say."""
    text = None if hf_config is None else hf_config.get_text_config()
    return getattr(text, "max_position_embeddings", None) or getattr(text, "max_seq_len", None) or UNLIMITED


def learnt_positions(hf_config: Any) -> int | None:
    """The number of positions in a model's table of them, after which it fails; None where positions are rotations."""
    length = context_length(hf_config)
    if length == UNLIMITED or getattr(hf_config.get_text_config(), "rope_parameters", None) is not None:
        return None
    return length


def within_positions(config: RunConfig, hf_config: Any) -> RunConfig:
    """The run's settings with rows no longer than the model has positions; `positions_notice` tells."""
    limit = learnt_positions(hf_config)
    if limit is None or config.data.max_length <= limit:
        return config
    return dataclasses.replace(config, data=dataclasses.replace(config.data, max_length=limit))


def positions_notice(config: RunConfig, hf_config: Any, longest: int = 0) -> str | None:
    """What to tell of rows that are longer than the model was made for, in a sentence; None if none are.

    Args:
        config: the run's settings, as they were given.
        hf_config: the base model's config.
        longest: tokens of the longest row; 0 if unknown.
    """
    limit, name = context_length(hf_config), config.model.name
    if within_positions(config, hf_config) is not config:
        return f"data.max_length is {config.data.max_length}, and {name} has {limit:,} positions: rows are cut to that."
    if longest > limit:
        return (
            f"The longest row has {longest:,} tokens, and {name} was made for {limit:,}: it may read the rest badly. "
            f"data.max_length {limit} leaves that out."
        )
    return None
