"""Encoding examples: token ids of the rendered text, and labels that are -100 where no loss is taken. No torch.

Prompt and answer are tokenized separately and concatenated, so that generation sees exactly the token ids of training:
those of `render_prompt`.
"""

from __future__ import annotations

import itertools
import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from datetime import datetime
from typing import Any, NamedTuple

from mole.core.errors import DataError
from mole.data.chat_templates import END_PLAIN, PLAIN, ChatTemplate
from mole.data.examples import Example
from mole.data.rendering import RenderedExample, removable_spans, render_example

IGNORE_INDEX = -100
"""Label of tokens without loss, as in `torch.nn.functional.cross_entropy`."""
LONG_TEXT = 1_000_000
"""Characters that are tokenized at a time: the tokenizer needs a hundred bytes for each."""


class EncodedExample(NamedTuple):
    """One example as tokens.

    Attributes:
        input_ids: token ids of prompt and answer.
        labels: the token id where there is loss, `IGNORE_INDEX` elsewhere; as long as `input_ids`.
        dropped: tokens left out of the prompt.
        cut: tokens removed at the end of the answer.
        lost_thoughts: thoughts in its answers that the chat template leaves out.
        more: what follows of a text that is longer than an example may be, in pieces that are examples too.
    """

    input_ids: list[int]
    labels: list[int]
    dropped: int = 0
    cut: int = 0
    lost_thoughts: int = 0
    more: tuple[EncodedExample, ...] = ()

    @property
    def truncated(self) -> bool:
        """Whether tokens were removed."""
        return bool(self.dropped or self.cut)


def encode_example(
    example: Example, tokenizer: Any, max_length: int, enable_thinking: bool | None = None
) -> EncodedExample:
    """Encode an example as at most `max_length` token ids and labels.

    Loss is taken on every answer of the assistant and its end-of-turn token; on all tokens of a text row. From a prompt
    that is too long the oldest contents are left out, but not the system message and what the template writes around
    them; the answer is truncated at its end only if it leaves no room for one token of the prompt. A text that is too
    long is cut into pieces. `enable_thinking` is that of `render_example`. Raises `DataError` when the template rejects
    the example or no token has loss.
    """
    (result,) = encode_examples([example], tokenizer, max_length, enable_thinking)
    if isinstance(result, DataError):
        raise result
    return result


def encode_examples(
    examples: Iterable[Example],
    tokenizer: Any,
    max_length: int,
    enable_thinking: bool | None = None,
    date: datetime | None = None,
) -> Iterator[EncodedExample | DataError]:
    """`encode_example` for many examples in one tokenizer call, which is faster; errors take the place of examples.

    `date` is what chat templates take for now.
    """
    template = ChatTemplate(tokenizer, date)
    rendered: list[RenderedExample | DataError] = []
    for example in examples:
        try:
            rendered.append(render_example(example, template, enable_thinking))
        except DataError as error:
            rendered.append(error)
    good = [item for item in rendered if isinstance(item, RenderedExample)]
    prompts = tokenize([item.prompt for item in good], tokenizer)
    answers = tokenize([item.answer for item in good], tokenizer)

    def join(item: RenderedExample, prompt: list[int], answer: list[int]) -> EncodedExample | DataError:
        if item.template is None:
            return pieces_of_text(answer, max_length)
        learnt = in_spans(item.answer_spans, item.prompt, prompt, tokenizer)
        removable = [False] * len(prompt)
        if len(prompt) + len(answer) > max_length:
            removable = in_spans(removable_spans(item), item.prompt, prompt, tokenizer, whole=True)
        joined = join_and_truncate(prompt, learnt, removable, answer, max_length)
        if item.lost_thoughts and isinstance(joined, EncodedExample):
            return joined._replace(lost_thoughts=item.lost_thoughts)
        return joined

    encoded = itertools.starmap(join, zip(good, prompts, answers, strict=True))
    return (item if isinstance(item, DataError) else next(encoded) for item in rendered)


def encode_text(text: str, tokenizer: Any) -> list[int]:
    """Token ids of a rendered text, which has its special tokens already."""
    (ids,) = tokenize([text], tokenizer)
    return ids


def tokenize(texts: list[str], tokenizer: Any) -> list[list[int]]:
    """Token ids of each rendered text: in one call, but for those with text that looks like a special token."""
    usual = [text for text in texts if not divided(text)]
    ids = iter(tokenizer(usual, add_special_tokens=False, verbose=False)["input_ids"] if usual else [])
    return [
        [token for piece in pieces_of(text) for token in piece.tokenize(tokenizer)["input_ids"]]
        if divided(text)
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


def divided(text: str) -> bool:
    """Whether a text is tokenized in several parts: what looks like a special token is text, or it is very long."""
    return PLAIN in text or len(text) > LONG_TEXT


def pieces_of(text: str) -> list[Piece]:
    """A rendered text, divided where what looks like a special token is text, and within a very long text at lines."""
    pieces, at = [], 0
    for part in re.split(f"({PLAIN}.*?{END_PLAIN})", text, flags=re.DOTALL):
        plain = part.startswith(PLAIN)
        rest, begin = part.strip(PLAIN + END_PLAIN), at + plain
        while len(rest) > LONG_TEXT:
            end = rest.rfind("\n", 0, LONG_TEXT) + 1 or LONG_TEXT
            pieces.append(Piece(rest[:end], begin, plain))
            rest, begin = rest[end:], begin + end
        pieces.append(Piece(rest, begin, plain))
        at += len(part)
    return pieces


def in_spans(
    spans: list[tuple[int, int]], text: str, ids: list[int], tokenizer: Any, whole: bool = False
) -> list[bool]:
    """For each token of a rendered text, whether some of its characters, or its `whole`, are in one of the ranges."""
    if not spans or not tokenizer.is_fast:  # only fast tokenizers return offsets
        return [False] * len(ids)
    offsets = [
        (piece.start + start, piece.start + end)
        for piece in pieces_of(text)
        for start, end in piece.tokenize(tokenizer, return_offsets_mapping=True)["offset_mapping"]
    ]
    spans = sorted(spans)
    starts = [start for start, _ in spans]
    ends = [0, *itertools.accumulate((end for _, end in spans), max)]  # of the spans so far, the farthest
    if whole:
        return [start < end <= ends[bisect_right(starts, start)] for start, end in offsets]
    return [ends[bisect_left(starts, end)] > start for start, end in offsets]


def pieces_of_text(ids: list[int], max_length: int) -> EncodedExample | DataError:
    """A text as one example or several; a `DataError` when no token has loss.

    Each piece begins with the last token of the piece before, without loss, so that every token but the first of the
    text is predicted once.
    """
    first = join_and_truncate([], [], [], ids[:max_length], max_length)
    if isinstance(first, DataError):
        return first
    pieces = [ids[start : start + max_length] for start in range(max_length - 1, len(ids) - 1, max_length - 1)]
    return first._replace(more=tuple(EncodedExample(piece, [IGNORE_INDEX, *piece[1:]]) for piece in pieces))


def join_and_truncate(
    prompt: list[int], learnt: list[bool], removable: list[bool], answer: list[int], max_length: int
) -> EncodedExample | DataError:
    """Concatenate prompt and answer and truncate to `max_length`; a `DataError` when no token has loss.

    Args:
        prompt: token ids.
        learnt: whether each of them has loss, as those of earlier answers have.
        removable: whether each of them may be left out of a prompt that is too long.
        answer: token ids, which all have loss.
        max_length: of both together.
    """
    labels = [token if wanted else IGNORE_INDEX for token, wanted in zip(prompt, learnt, strict=True)]
    # The oldest contents go, and what is around them stays. Where that is not enough, the end of the prompt stays: what
    # the answer leaves of max_length, but at least one token, since the first token of a sequence is never predicted.
    excess = len(prompt) + len(answer) - max_length
    left_out = set(itertools.islice((place for place, may in enumerate(removable) if may), max(excess, 0)))
    kept = [place for place in range(len(prompt)) if place not in left_out]
    kept = kept[-max(max_length - len(answer), 1) :]
    ids = ([prompt[place] for place in kept] + answer)[:max_length]
    labels = ([labels[place] for place in kept] + answer)[:max_length]
    # labels[0] is never used: the model predicts labels[i] from input_ids[:i].
    if all(label == IGNORE_INDEX for label in labels[1:]):
        return DataError("nothing is left to learn from: the answer has no tokens")
    return EncodedExample(ids, labels, len(prompt) - len(kept), len(kept) + len(answer) - len(ids))
