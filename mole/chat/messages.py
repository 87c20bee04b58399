"""What the studio's engine and the process of its models (`mole.chat.process`) say to each other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

STOP = "stop"
"""Sent by the engine to end the reply after its current token."""


class Stage(Enum):
    """What the process does for a reply, sent as it begins."""

    STARTING = "starting"
    LOADING = "loading"
    ENCODING = "encoding"
    GENERATING = "generating"


@dataclass(frozen=True)
class ReplyJob:
    """What to generate; the fields are arguments of `Engine.reply`, `steering` as plain values."""

    target: str
    messages: list[dict[str, str]]
    settings: dict[str, Any]
    steering: Mapping[str, Any]
    device: str
    with_trace: bool


@dataclass(frozen=True)
class Opened:
    """The first message about a reply that is generated.

    Attributes:
        routing: arguments of `RoutingRecords.new`.
        prompt_tokens: number of the prompt's tokens.
        notice: what the person should know about the model, or None.
        on_gpu: whether the model is on a GPU.
    """

    routing: dict[str, Any]
    prompt_tokens: int
    notice: str | None
    on_gpu: bool


@dataclass(frozen=True)
class Part:
    """What one step added to a reply.

    Attributes:
        text: the reply so far.
        tokens: number of the tokens that were read in this step.
        routing: arguments of `RoutingRecord.extend`; empty if there is no routing.
        seconds: since the prompt was read.
        finished: whether this is the last part.
        trace: the whole routing as `mole chat --trace` writes it; in the last part, if asked for.
    """

    text: str
    tokens: int
    routing: dict[str, Any]
    seconds: float
    finished: bool
    trace: dict[str, Any] | None
