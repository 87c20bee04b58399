"""The settings of a reply; the command line, the Chat tab and the API follow from them. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mole.config.fields import build_settings, check_settings, setting
from mole.core import limits
from mole.core.errors import ConfigError

GREEDY = 1e-4
"""Temperatures below this are greedy: the most likely token is certain, and dividing by them would overflow."""


@dataclass(frozen=True)
class ChatSettings:
    """How the next token is chosen and where a reply ends, in the words of transformers' `GenerationConfig`.

    Unless set, nothing is sampled or penalised, whatever the base model's own generation config says.

    Raises `ConfigError` for a value that is not allowed.
    """

    max_new_tokens: int = setting(256, "Maximum length of a reply in tokens.", ge=1, label="Maximum length")
    temperature: float = setting(0.0, "Sampling temperature; 0 takes the most likely token.", ge=0)
    top_p: float = setting(1.0, "Nucleus sampling: the most likely tokens with this probability.", gt=0, le=1)
    seed: int = setting(0, "Seed of the sampling: the same seed gives the same reply.", ge=0)
    top_k: int = setting(0, "Sample from this many most likely tokens; 0 for all.", ge=0)
    min_p: float = setting(0.0, "Sample from tokens with this share of the largest probability; 0 for all.", ge=0, le=1)
    repetition_penalty: float = setting(
        1.0, "Above 1, tokens that are already in the conversation become less likely.", gt=0, le=limits.FACTOR
    )
    stop_strings: list[str] = setting([], "Texts that end the reply; they are not part of it.")
    enable_thinking: bool = setting(False, "Let a model that can think write its thoughts first.", label="Thinking")

    def __post_init__(self) -> None:
        check_settings(self)
        if len(self.stop_strings) > limits.STOP_STRINGS or not all(self.stop_strings):
            raise ConfigError("stop_strings", self.stop_strings, f"at most {limits.STOP_STRINGS} texts, none empty")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ChatSettings:
        """Settings by name. Raises `InputError` for an unknown name, `ConfigError` for a value that is not allowed."""
        settings: ChatSettings = build_settings(cls, values, "")
        return settings

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature < GREEDY


DEFAULTS = ChatSettings()
