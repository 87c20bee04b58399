"""Encoding examples: token ids of the rendered text, and labels that are -100 where no loss is taken. No torch.

Prompt and answer are tokenized separately and concatenated, so that generation sees exactly the token ids of training:
those of `render_prompt`.
"""

from __future__ import annotations

import itertools
import re
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from mole.core.errors import DataError
from mole.data.examples import Example
from mole.data.rendering import END_PLAIN, PLAIN, ChatTemplate, RenderedExample, render_example

IGNORE_INDEX = -100
"""Label of tokens without loss, as in `torch.nn.functional.cross_entropy`."""


class EncodedExample(NamedTuple):
    """One example as tokens.

    Attributes:
        input_ids: token ids of prompt and answer.
        labels: the token id where there is loss, `IGNORE_INDEX` elsewhere; as long as `input_ids`.
        dropped: tokens removed at the start of the prompt.
        cut: tokens removed at the end of the answer.
    """

    input_ids: list[int]
    labels: list[int]
    dropped: int = 0
    cut: int = 0

    @property
    def truncated(self) -> bool:
        """Whether tokens were removed."""
        return bool(self.dropped or self.cut)


def encode_example(
    example: Example, tokenizer: Any, max_length: int, enable_thinking: bool | None = None
) -> EncodedExample:
    """Encode an example as at most `max_length` token ids and labels.

    Loss is taken on every answer of the assistant and its end-of-turn token; on all tokens of a text row. A prompt
    that is too long is truncated at its start; the answer is truncated at its end only if it leaves no room for one
    token of the prompt. `enable_thinking` is that of `render_example`. Raises `DataError` when the template rejects the
    example or no token has loss.
    """
    (result,) = encode_examples([example], tokenizer, max_length, enable_thinking)
    if isinstance(result, DataError):
        raise result
    return result


def encode_examples(
    examples: Iterable[Example], tokenizer: Any, max_length: int, enable_thinking: bool | None = None
) -> Iterator[EncodedExample | DataError]:
    """`encode_example` for many examples in one tokenizer call, which is faster; errors take the place of examples."""
    template = ChatTemplate(tokenizer)
    rendered: list[RenderedExample | DataError] = []
    for example in examples:
        try:
            rendered.append(render_example(example, template, enable_thinking))
        except DataError as error:
            rendered.append(error)
    good = [item for item in rendered if not isinstance(item, DataError)]
    prompts = tokenize([item.prompt for item in good], tokenizer)
    answers = tokenize([item.answer for item in good], tokenizer)
    encoded = (
        join_and_truncate(prompt, earlier_answer_mask(item, prompt, tokenizer), answer, max_length)
        for item, prompt, answer in zip(good, prompts, answers, strict=True)
    )
    return (item if isinstance(item, DataError) else next(encoded) for item in rendered)


def encode_text(text: str, tokenizer: Any) -> list[int]:
    """Token ids of a rendered text, which has its special tokens already."""
    (ids,) = tokenize([text], tokenizer)
    return ids


def tokenize(texts: list[str], tokenizer: Any) -> list[list[int]]:
    """Token ids of each rendered text: in one call, but for those with text that looks like a special token."""
    usual = [text for text in texts if PLAIN not in text]
    ids = iter(tokenizer(usual, add_special_tokens=False, verbose=False)["input_ids"] if usual else [])
    return [
        [token for piece in pieces_of(text) for token in piece.tokenize(tokenizer)["input_ids"]]
        if PLAIN in text
        else next(ids)
        for text in texts
    ]


class Piece(NamedTuple):
    """A part of a rendered text, from the character `start` on; `plain` if its special tokens are text."""

    text: str
    start: int
    plain: bool

    def tokenize(self, tokenizer: Any, **options: Any) -> Any:
        """The tokens of this part."""
        return tokenizer(self.text, add_special_tokens=False, split_special_tokens=self.plain, verbose=False, **options)


def pieces_of(text: str) -> list[Piece]:
    """A rendered text, divided where what looks like a special token is text."""
    pieces, at = [], 0
    for part in re.split(f"({PLAIN}.*?{END_PLAIN})", text, flags=re.DOTALL):
        plain = part.startswith(PLAIN)
        pieces.append(Piece(part.strip(PLAIN + END_PLAIN), at + plain, plain))
        at += len(part)
    return pieces


def earlier_answer_mask(item: RenderedExample, prompt: list[int], tokenizer: Any) -> list[bool]:
    """For each token of the prompt, whether it belongs to an earlier answer (any overlap of characters)."""
    if not item.answer_spans or not tokenizer.is_fast:  # only fast tokenizers return offsets
        return [False] * len(prompt)
    offsets = [
        (piece.start + start, piece.start + end)
        for piece in pieces_of(item.prompt)
        for start, end in piece.tokenize(tokenizer, return_offsets_mapping=True)["offset_mapping"]
    ]
    spans = sorted(item.answer_spans)
    starts = [start for start, _ in spans]
    ends = [0, *itertools.accumulate((end for _, end in spans), max)]  # of the spans so far, the farthest
    return [ends[bisect_left(starts, end)] > start for start, end in offsets]


def join_and_truncate(
    prompt: list[int], learnt: list[bool], answer: list[int], max_length: int
) -> EncodedExample | DataError:
    """Concatenate prompt and answer and truncate to `max_length`; a `DataError` when no token has loss.

    `learnt` marks the prompt tokens of earlier answers, which have loss too.
    """
    # Keep the end of the prompt: what the answer leaves of max_length, but at least one token, since the first token
    # of a sequence is never predicted.
    kept = min(len(prompt), max(max_length - len(answer), 1))
    ids = (prompt[len(prompt) - kept :] + answer)[:max_length]
    labels = [token if wanted else IGNORE_INDEX for token, wanted in zip(prompt, learnt, strict=True)]
    labels = (labels[len(prompt) - kept :] + answer)[:max_length]
    # labels[0] is never used: the model predicts labels[i] from input_ids[:i].
    if all(label == IGNORE_INDEX for label in labels[1:]):
        return DataError("nothing is left to learn from: the answer has no tokens")
    return EncodedExample(ids, labels, len(prompt) - kept, kept + len(answer) - len(ids))
