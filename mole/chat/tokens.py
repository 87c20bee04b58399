"""Between the text of a conversation and its tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from mole.core.errors import ConfigError
from mole.data import Message, render_prompt
from mole.data.chat_templates import chat_template
from mole.data.encoding import encode_text
from mole.data.rendering import answer_ending


def prompt_text(messages: Sequence[Message], tokenizer: Any, enable_thinking: bool = False) -> str:
    """A conversation up to the assistant's next answer, as in training.

    Raises `ConfigError` if the model shall think, and its chat template has no such choice.
    """
    if enable_thinking and "enable_thinking" not in chat_template(tokenizer):
        raise ConfigError("enable_thinking", True, "false with this model: its chat template has no such choice")
    return render_prompt(messages, tokenizer, enable_thinking)


def prompt_ids(messages: Sequence[Message], tokenizer: Any) -> list[int]:
    """The token ids of a conversation up to the assistant's next answer, encoded as in training."""
    return encode_text(prompt_text(messages, tokenizer), tokenizer)


class AnswerEnds(NamedTuple):
    """What ends an answer.

    Attributes:
        ids: the model's and the tokenizer's end tokens, and the one that training appends to answers.
        text: the text that ends it where the chat template ends answers with one that is no single special token; empty
            for most templates, whose end is one of `ids`.
        special: ids of the tokenizer's special tokens.
    """

    ids: set[int]
    text: str
    special: set[int]


def answer_ends(tokenizer: Any, model: Any = None) -> AnswerEnds:
    """What ends an answer with this tokenizer's chat template, and of this model if one is given."""
    given = None if model is None else model.generation_config.eos_token_id
    stop = {tokenizer.eos_token_id, *(given if isinstance(given, list) else [given])} - {None}
    special = special_ids(tokenizer)
    written = answer_ending(tokenizer).strip()
    last = {*encode_text(written, tokenizer)[-1:]}
    return AnswerEnds(stop | (last & special), "" if last <= special else written, special)


def special_ids(tokenizer: Any) -> set[int]:
    """The ids of the tokenizer's special tokens."""
    added = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | set(tokenizer.all_special_ids)


class TokenTexts:
    """Maps token ids to pieces of text; a character made of several tokens belongs to the last of them."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.ids: list[int] = []
        self.done = 0
        """How many of `ids` have been returned as text; they stay as context, because it decides about spaces."""

    def push(self, ids: Sequence[int]) -> list[tuple[int, str]]:
        """The new tokens with their texts."""
        return [(token, self._next(token)) for token in ids]

    def _next(self, token: int) -> str:
        before = self._decode(self.ids[: self.done])
        self.ids.append(token)
        after = self._decode(self.ids)
        if after.endswith("\ufffd"):
            return ""
        self.ids, self.done = self.ids[self.done :], len(self.ids) - self.done
        return after[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        text: str = self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text
