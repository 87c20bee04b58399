"""What the model sees: rows of a run's data as the very tokens training makes of them, and what became of all rows.

The work is bounded: of a large file the first rows are read, and `Preview.complete` says so. No torch until a tokenizer
is loaded.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from mole.config import DataConfig, RunConfig
from mole.core.errors import ConfigError, DataError
from mole.data.encoding import IGNORED, Encoded, Example, Rejected, Rows, encode_all, read_examples, split
from mole.data.examples import none_left
from mole.models.loading import IMPORTING, load_tokenizer, local_folder, resolve

MOST_ROWS = 2000
MOST_CHARACTERS = 4_000_000
"""How much of a file is read and tokenised, whichever comes first."""
MOST_REJECTED = 50
BINS = 40


class Token(NamedTuple):
    """A token as training has it; `learnt` when it carries loss, `special` when the tokenizer gives it a meaning."""

    id: int
    text: str
    learnt: bool
    special: bool


@dataclass
class Row:
    """One example: its row number, its tokens, and how many were cut off to fit `max_length`.

    Attributes:
        dropped: tokens of the prompt cut off at its beginning.
        cut: tokens of the answer cut off at its end.
        held_out: it is not learnt from.
    """

    number: int
    tokens: list[Token]
    dropped: int = 0
    cut: int = 0
    held_out: bool = False


@dataclass
class Histogram:
    """Examples by their length in tokens before anything is cut off.

    Attributes:
        counts: how many have a length from `i * width` to below `(i + 1) * width`.
        longest: the greatest length.
        open: the last bin holds all that are longer, too.
    """

    width: int = 1
    counts: list[int] = field(default_factory=list)
    longest: int = 0
    open: bool = False


@dataclass
class Preview:
    """The data of a run as its model will see it.

    Attributes:
        shape: which of the known shapes the rows have.
        used, held_out: examples to learn from and held out.
        rejected: how many rows cannot be used; `rejections` are the first of them.
        truncated: examples of which something was cut off.
        complete: False when only the first rows of a large file were looked at; the counts are of those.
        notices: what should be looked into, in sentences.
    """

    source: str
    shape: str
    used: int
    held_out: int
    rejected: int
    truncated: int
    complete: bool
    max_length: int
    tokens: int
    learnt_tokens: int
    rejections: list[Rejected]
    lengths: Histogram
    rows: list[Row]
    notices: list[str]

    def to_dict(self) -> dict[str, Any]:
        """The preview as JSON values."""
        return asdict(self)


@dataclass
class Part:
    """A file's examples as tokens, and the rows it cannot use."""

    source: Rows
    examples: list[Example]
    encoded: list[Encoded]
    rejected: list[Rejected]
    complete: bool


def preview(config: RunConfig, rows: int = 8) -> Preview:
    """Read and encode the data of a run as training would, and show `rows` examples of it token by token.

    Raises `DataError`, `ModelError` and `ConfigError` as training would.
    """
    data = config.data
    if not data.path:
        raise ConfigError("data.path", "", "a JSON, JSONL, CSV or Parquet file, or a hub id")
    source = glance_at(data, data.path, "data.path")  # before the tokenizer: a bad file is said at once
    folder = local_folder(resolve(config.model.name), weights=False)
    tokenizer = load_tokenizer(config.model.name, folder)
    part = encode_part(source, tokenizer, data.max_length, "data.path")
    held_file = None
    if data.eval_path:
        held_source = glance_at(data, data.eval_path, "data.eval_path")
        held_file = encode_part(held_source, tokenizer, data.max_length, "data.eval_path")
        held = {len(part.encoded) + place for place in range(len(held_file.encoded))}
    else:
        held = set(split(list(range(len(part.encoded))), data.eval_fraction, config.training.seed)[1])
    return summary(part, held_file, held, tokenizer, data, rows)


def glance_at(data: DataConfig, path: str, setting: str) -> Rows:
    """The first rows of a file or data set."""
    return read_examples(path, data.columns, MOST_ROWS, setting=setting, glance=True)


def encode_part(source: Rows, tokenizer: Any, max_length: int, setting: str) -> Part:
    """The rows as tokens, up to `MOST_CHARACTERS` of text. Raises `DataError` when no row can be used."""
    examples: list[Example] = []
    characters = 0
    for example in source.examples:
        characters += sum(len(message["content"]) for message in example.messages) + len(example.text or "")
        if examples and characters > MOST_CHARACTERS:
            break
        examples.append(example)
    last = examples[-1].row if len(examples) < len(source.examples) else math.inf
    rejected = [item for item in source.rejected if item.row <= last]
    good, encoded = list[Example](), list[Encoded]()
    for example, item in zip(examples, encode_all(examples, tokenizer, max_length), strict=True):
        if isinstance(item, DataError):
            rejected.append(Rejected(example.row, str(item)))
        else:
            good.append(example)
            encoded.append(item)
    rejected.sort(key=lambda item: item.row)
    if not encoded:
        raise none_left(source.source, rejected, setting)
    return Part(source, good, encoded, rejected, source.complete and last == math.inf)


def summary(part: Part, held_file: Part | None, held: set[int], tokenizer: Any, data: DataConfig, rows: int) -> Preview:
    """All that is shown of the encoded rows."""
    parts = [part, *([held_file] if held_file else [])]
    encoded = [item for one in parts for item in one.encoded]
    numbers = [example.row for one in parts for example in one.examples]
    rejected = part.rejected + [
        Rejected(item.row, f"in the held-out file: {item.reason}") for item in (held_file.rejected if held_file else [])
    ]
    learnt_from = [item for place, item in enumerate(encoded) if place not in held]
    pieces = Pieces(tokenizer)
    return Preview(
        source=data.path,
        shape=part.source.shape,
        used=len(learnt_from),
        held_out=len(held),
        rejected=len(rejected),
        truncated=sum(item.truncated for item in encoded),
        complete=all(one.complete for one in parts),
        max_length=data.max_length,
        tokens=sum(len(item.input_ids) for item in learnt_from),
        learnt_tokens=sum(label != IGNORED for item in learnt_from for label in item.labels),
        rejections=rejected[:MOST_REJECTED],
        lengths=histogram([length_of(item) for item in encoded], 3 * data.max_length),
        rows=[
            Row(numbers[at], pieces.of(encoded[at]), encoded[at].dropped, encoded[at].cut, at in held)
            for at in chosen(encoded, rows)
        ],
        notices=notices(part, tokenizer),
    )


class Pieces:
    """Tokens with their texts, by one tokenizer; put together, the texts are the text of the whole row."""

    def __init__(self, tokenizer: Any) -> None:
        with IMPORTING:
            from mole.chat.generate import TokenTexts, special_ids

        self.tokenizer = tokenizer
        self.special = special_ids(tokenizer)
        self.texts = TokenTexts

    def of(self, encoded: Encoded) -> list[Token]:
        """The tokens of one example; a character that several tokens make is the text of the last of them."""
        texts = [text for _, text in self.texts(self.tokenizer).push(encoded.input_ids)]
        # What was cut off in the middle of a character never becomes one: it is shown as it would be printed.
        whole = self.tokenizer.decode(encoded.input_ids, clean_up_tokenization_spaces=False)
        texts[-1] += whole[len("".join(texts)) :]
        return [
            Token(token, text, label != IGNORED, token in self.special)
            for token, text, label in zip(encoded.input_ids, texts, encoded.labels, strict=True)
        ]


def length_of(encoded: Encoded) -> int:
    """The example's length in tokens before anything was cut off."""
    return len(encoded.input_ids) + encoded.dropped + encoded.cut


def chosen(encoded: Sequence[Encoded], rows: int) -> list[int]:
    """The examples to show: the first ones, and as the last of them one that was truncated if none is."""
    places = list(range(min(rows, len(encoded))))
    cut = next((place for place, item in enumerate(encoded) if item.truncated), None)
    if cut is not None and places and cut > places[-1]:
        places[-1] = cut
    return places


def histogram(lengths: Sequence[int], most: int) -> Histogram:
    """Lengths in at most `BINS` + 1 bins of a round width; those above `most` are all in the last."""
    longest = min(max(lengths), most)
    power = 10 ** math.floor(math.log10(max(longest / BINS, 1)))
    width = next(step * power for step in (1, 2, 5, 10) if step * power * BINS >= longest)
    counts = [0] * (longest // width + 1)
    for length in lengths:
        counts[min(length, most) // width] += 1
    return Histogram(width, counts, max(lengths), max(lengths) > most)


def notices(part: Part, tokenizer: Any) -> list[str]:
    """What is allowed and yet seldom meant, in sentences."""
    found = []
    count = len(part.examples)
    if part.source.shape != "text":
        if tokenizer.chat_template is None:
            found.append("The tokenizer has no chat template: messages are headed “### User:” and “### Assistant:”.")
        if count > 2 and len({example.target for example in part.examples}) == 1:
            found.append(f"All {count} rows have the same answer; is the right column mapped?")
        if count > 2 and len({example.prompt[-1]["content"] for example in part.examples}) == 1:
            found.append(f"All {count} rows have the same question; is the right column mapped?")
    cut = sum(item.cut > 0 for item in part.encoded)
    if cut:
        found.append(f"{cut} {'row loses' if cut == 1 else 'rows lose'} the end of the answer; raise data.max_length.")
    return found
