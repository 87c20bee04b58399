"""Rows as tokens, encoded as in training, with what each token is: prompt, answer, template or text. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from mole.core.errors import DataError
from mole.data import IGNORE_INDEX, Example
from mole.data.chat_templates import ChatTemplate
from mole.data.encoding import EncodedExample, encode_examples, encode_text, in_spans, join_and_truncate
from mole.data.rendering import RenderedExample, content_spans, removable_spans, render_example

PARTS = ("prompt", "answer", "template", "text")
"""Contents that are given, answers that are learnt, what the chat template writes around them, and rows of text."""
PROMPT, ANSWER, TEMPLATE, TEXT = range(len(PARTS))
MOST_BUCKETS = 24
"""Buckets of positions, `bucket_of`: enough for rows of eight million tokens."""


def length_batches(lengths: Sequence[int], tokens: int) -> Iterator[slice]:
    """Successive rows of ascending `lengths`, in batches of about `tokens` tokens with padding; at least one row."""
    start = 0
    for end in range(1, len(lengths) + 1):
        if end == len(lengths) or lengths[end] * (end + 1 - start) > tokens:
            yield slice(start, end)
            start = end


class TokenRow(NamedTuple):
    """A row, or a piece of a text that is longer than a row may be.

    Attributes:
        place: place of its example among those of the corpus, from 0.
        encoded: its token ids and labels.
        parts: for each token the place of its part in `PARTS`.
    """

    place: int
    encoded: EncodedExample
    parts: list[int]

    @property
    def ids(self) -> list[int]:
        """Its token ids."""
        return self.encoded.input_ids


def bucket_of(position: int) -> int:
    """The bucket of a position, counted from 0: 0, 1, 2–3, 4–7, 8–15, …"""
    return min(position.bit_length(), MOST_BUCKETS - 1)


def bucket_name(bucket: int) -> str:
    """The positions in a bucket, as text."""
    return str(bucket) if bucket < 2 else f"{1 << (bucket - 1)}–{(1 << bucket) - 1}"


def encode_rows(
    examples: Sequence[Example], places: Sequence[int], tokenizer: Any, max_length: int
) -> Iterator[TokenRow | DataError]:
    """The examples at some places as rows of at most `max_length` tokens, as in training, with the part of each token.

    A text that is longer gives several rows. Yields the `DataError` of an example that cannot be encoded.
    """
    template, special = ChatTemplate(tokenizer), set(tokenizer.all_special_ids)
    chosen = [examples[place] for place in places]
    encoded = encode_examples(chosen, tokenizer, max_length)
    for place, example, item in zip(places, chosen, encoded, strict=True):
        if isinstance(item, DataError):
            yield item
        elif example.text is not None:
            for piece in (item, *item.more):
                yield TokenRow(place, piece, without_special([TEXT] * len(piece.input_ids), piece, special))
        else:
            parts = conversation_parts(example, item, template, tokenizer, max_length)
            yield TokenRow(place, item, without_special(parts, item, special))


def without_special(parts: list[int], encoded: EncodedExample, special: set[int]) -> list[int]:
    """The parts of a row's tokens, in which special tokens are the template's."""
    return [TEMPLATE if token in special else part for token, part in zip(encoded.input_ids, parts, strict=True)]


def conversation_parts(
    example: Example, encoded: EncodedExample, template: ChatTemplate, tokenizer: Any, max_length: int
) -> list[int]:
    """The part of each token of an encoded conversation; what is neither learnt nor a content is the template's.

    Where the contents cannot be found in what the template writes, all that is not learnt counts as prompt.
    """
    rendered = render_example(example, template)
    spans = prompt_spans(rendered)
    prompt = encode_text(rendered.prompt, tokenizer)
    given = in_spans(spans, rendered.prompt, prompt, tokenizer) if spans is not None else [True] * len(prompt)
    answer = encode_text(rendered.answer, tokenizer)
    removable = [False] * len(prompt)
    if encoded.truncated:
        removable = in_spans(removable_spans(rendered), rendered.prompt, prompt, tokenizer, whole=True)
    # As the row was shortened, so are the marks of its contents, which take the place of its labels.
    marked = join_and_truncate(prompt, given, removable, answer, max_length)
    if isinstance(marked, DataError) or len(marked.labels) != len(encoded.labels):
        marked = encoded._replace(labels=encoded.input_ids)
    return [
        ANSWER if label != IGNORE_INDEX else PROMPT if mark != IGNORE_INDEX else TEMPLATE
        for label, mark in zip(encoded.labels, marked.labels, strict=True)
    ]


def prompt_spans(rendered: RenderedExample) -> list[tuple[int, int]] | None:
    """Character ranges of all contents in a rendered prompt; None where they cannot be found."""
    if rendered.template is None:
        return None
    before = rendered.template.prepare(rendered.example.messages)[:-1]
    try:
        whole = rendered.template.render(before)
        if not whole.startswith(rendered.prompt):
            return None
        return content_spans(before, list(range(len(before))), whole, rendered.template)
    except DataError:
        return None
