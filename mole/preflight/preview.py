"""Previews a run's data as the model will see it: rows as tokens, exactly as in training, and statistics of all rows.

The work is bounded: of a large file only the first rows are read, and `Preview.complete` is False. Does not import
torch until a tokenizer is loaded.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import zip_longest
from typing import Any, NamedTuple

from mole.config import DataConfig, DataSource, RunConfig
from mole.core.errors import ConfigError, DataError, brief
from mole.data import (
    IGNORE_INDEX,
    EncodedExample,
    Example,
    ExampleSet,
    RejectedRow,
    encode_examples,
    no_usable_rows,
    read_examples,
    read_source,
    short_labels,
    split_rows,
    weighted,
)
from mole.data.datasets import system_notices
from mole.data.mixing import joint_shape
from mole.models.context import positions_notice, within_positions
from mole.models.loading import load_tokenizer, local_folder, read_config, resolve
from mole.preflight.plan import character_count

MAX_ROWS = 2000
MAX_CHARACTERS = 4_000_000
"""Limits of what is read and tokenised of a file; the one that is reached first counts."""
MAX_REJECTIONS = 50
MAX_BINS = 40


class PreviewToken(NamedTuple):
    """A token of the encoded row: `learnt` if it counts for the loss, `special` if it is a special token."""

    id: int
    text: str
    learnt: bool
    special: bool


@dataclass
class PreviewRow:
    """One encoded example.

    Attributes:
        number: its row number in the file.
        tokens: its tokens.
        dropped: tokens left out of the prompt to fit `max_length`, the oldest first.
        cut: tokens cut off at the end of the answer to fit `max_length`.
        held_out: whether it is held out from training.
        source: of several files, the one that it is in.
    """

    number: int
    tokens: list[PreviewToken]
    dropped: int = 0
    cut: int = 0
    held_out: bool = False
    source: str = ""


@dataclass
class PreviewSource:
    """One of several training files: its name, shape and weight, and how many of its rows are used, each counted once,
    held out and rejected."""

    name: str
    shape: str
    weight: float
    used: int
    held_out: int
    rejected: int


@dataclass
class Histogram:
    """Distribution of the examples' lengths in tokens, before truncation.

    Attributes:
        width: tokens per bin.
        counts: `counts[i]` examples have a length in `[i * width, (i + 1) * width)`.
        longest: the maximum length.
        open: whether the last bin also holds all longer examples.
    """

    width: int = 1
    counts: list[int] = field(default_factory=list)
    longest: int = 0
    open: bool = False


@dataclass
class Preview:
    """The data of a run as its model will see it.

    Attributes:
        source: the data's path or hub id, or several.
        shape: the shape of the rows, such as `messages`.
        used, held_out: numbers of training examples of an epoch, with repetitions by weight, and of held-out ones.
        rejected, rejections: number of rows that cannot be used, and the first of them with their reasons.
        truncated: number of truncated examples.
        complete: False if only the first rows of a large file were read; all counts are of those.
        max_length: the run's limit, in tokens.
        tokens, learnt_tokens: tokens of the training examples, and those of them that count for the loss.
        lengths: distribution of the examples' lengths.
        rows: the examples shown token by token.
        notices: likely mistakes in the data, in sentences.
        read: number of rows that were read.
        sources: of several training files, what is in each.
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
    rejections: list[RejectedRow]
    lengths: Histogram
    rows: list[PreviewRow]
    notices: list[str]
    read: int = 0
    sources: list[PreviewSource] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """The preview as JSON values."""
        return asdict(self)


@dataclass
class EncodedFile:
    """The encoded examples of a file, and the rows that cannot be used; `label` tells it from others."""

    source: ExampleSet
    examples: list[Example]
    encoded: list[EncodedExample]
    rejected: list[RejectedRow]
    complete: bool
    label: str = ""


def preview(config: RunConfig, rows: int = 8) -> Preview:
    """Read and encode the data of a run as training does, and show `rows` of its examples token by token.

    Raises the same `DataError`, `ModelError` and `ConfigError` as training.
    """
    data, seed = config.data, config.training.seed
    sources = data.sources
    if not sources:
        raise ConfigError("data.path", "", "a JSON, JSONL, CSV, Parquet or text file, or a hub id")
    # before loading the tokenizer: a bad file fails at once
    begun = [read_source(source, MAX_ROWS // len(sources), peek=True) for source in sources]
    folder = local_folder(resolve(config.model.name), weights=False)
    tokenizer = load_tokenizer(config.model.name, folder)
    data = within_positions(config, hf_config := read_config(folder)).data
    files = [
        encode_file(item, tokenizer, data, source.field, MAX_CHARACTERS // len(sources))
        for item, source in zip(begun, sources, strict=True)
    ]
    if len(files) > 1:
        for file, label in zip(files, short_labels(sources), strict=True):
            file.label = label
            file.rejected = [replace(item, source=label) for item in file.rejected]
    parts = indices_of(files)
    held_files: list[EncodedFile] = []
    if data.eval_path:
        held_source = read_examples(data.eval_path, data.columns, MAX_ROWS, field="data.eval_path", peek=True)
        held_files = [encode_file(held_source, tokenizer, data, "data.eval_path", MAX_CHARACTERS)]
        held_out = {*indices_of([*files, *held_files])[-1]}
    else:
        held_out = set(split_rows([at for part in parts for at in part], data.eval_fraction, seed)[1])
    trained = weighted([[at for at in part if at not in held_out] for part in parts], sources, seed)
    shown = build_preview(files, held_files, held_out, trained, tokenizer, data, rows)
    longest = max(len(item.input_ids) for file in files for item in file.encoded)
    shown.notices += filter(None, [positions_notice(config, hf_config, longest)])
    shown.sources = describe_sources(files, sources, held_out)
    return shown


def describe_sources(
    files: Sequence[EncodedFile], sources: Sequence[DataSource], held_out: set[int]
) -> list[PreviewSource]:
    """`Preview.sources`; `held_out` are indices into the examples of all files."""
    if len(files) == 1:
        return []
    return [
        PreviewSource(
            file.label, file.source.shape, source.weight, len({*part} - held_out), len({*part} & held_out),
            len(file.rejected),
        )
        for file, source, part in zip(files, sources, indices_of(files), strict=True)
    ]  # fmt: skip


def encode_file(source: ExampleSet, tokenizer: Any, data: DataConfig, setting: str, most: int) -> EncodedFile:
    """Encode the rows, up to `most` characters of text. Raises `DataError` when no row can be used."""
    examples: list[Example] = []
    characters = 0
    for example in source.examples:
        characters += character_count(example)
        if examples and characters > most:
            break
        examples.append(example)
    last = examples[-1].row if len(examples) < len(source.examples) else math.inf
    rejected = [item for item in source.rejected if item.row <= last]
    good, encoded = list[Example](), list[EncodedExample]()
    items = encode_examples(examples, tokenizer, data.max_length, data.enable_thinking)
    for example, item in zip(examples, items, strict=True):
        if isinstance(item, DataError):
            rejected.append(RejectedRow(example.row, str(item)))
        else:
            pieces = [item, *item.more]
            good += [example] * len(pieces)
            encoded += pieces
    rejected.sort(key=lambda item: item.row)
    if not encoded:
        raise no_usable_rows(source.source, rejected, setting)
    return EncodedFile(source, good, encoded, rejected, source.complete and last == math.inf)


def indices_of(files: Sequence[EncodedFile]) -> list[list[int]]:
    """For each file the indices of its examples among those of all files."""
    parts, start = list[list[int]](), 0
    for file in files:
        parts.append(list(range(start, start + len(file.encoded))))
        start += len(file.encoded)
    return parts


def build_preview(
    files: list[EncodedFile],
    held_files: list[EncodedFile],
    held_out: set[int],
    trained: list[int],
    tokenizer: Any,
    data: DataConfig,
    rows: int,
) -> Preview:
    """The preview of the encoded files.

    Args:
        files, held_files: the training files, and the held-out one if there is one.
        held_out: indices into the examples of all of them.
        trained: indices of what is trained on in an epoch, some perhaps several times.
        tokenizer: the model's.
        data: the settings of the data.
        rows: how many examples are shown.
    """
    everything = [*files, *held_files]
    encoded = [item for file in everything for item in file.encoded]
    origins = [(example.row, file.label) for file in everything for example in file.examples]
    rejected = [item for file in files for item in file.rejected] + [
        RejectedRow(item.row, f"in the held-out file: {item.reason}") for file in held_files for item in file.rejected
    ]
    trained_on = [encoded[at] for at in trained]
    labeller = TokenLabeller(tokenizer)
    by_turns = [at for turn in zip_longest(*indices_of(files)) for at in turn if at is not None]
    order = [*by_turns, *range(len(by_turns), len(encoded))]
    return Preview(
        source=data.label,
        shape=joint_shape([file.source.shape for file in files]),
        used=len(trained_on),
        held_out=len(held_out),
        rejected=len(rejected),
        truncated=sum(item.truncated for item in encoded),
        complete=all(file.complete for file in everything),
        max_length=data.max_length,
        tokens=sum(len(item.input_ids) for item in trained_on),
        learnt_tokens=sum(label != IGNORE_INDEX for item in trained_on for label in item.labels),
        rejections=rejected[:MAX_REJECTIONS],
        lengths=histogram([untruncated_length(item) for item in encoded], 3 * data.max_length),
        rows=[
            PreviewRow(
                origins[at][0], labeller.tokens(encoded[at]), encoded[at].dropped, encoded[at].cut, at in held_out,
                origins[at][1],
            )
            for at in rows_to_show(encoded, order, rows)
        ],
        notices=joint_notices(files, [find_notices(file, tokenizer) for file in files]),
        read=len(encoded) + len(rejected),
    )  # fmt: skip


def joint_notices(files: Sequence[EncodedFile], notices: Sequence[list[str]]) -> list[str]:
    """The notices of several files, which name their file unless they hold for all."""
    common = [text for text in notices[0] if all(text in other for other in notices)]
    return common + [
        f"{file.label}: {text}" for file, own in zip(files, notices, strict=True) for text in own if text not in common
    ]


class TokenLabeller:
    """Labels the tokens of encoded examples with their texts; joined, the texts are the text of the row."""

    def __init__(self, tokenizer: Any) -> None:
        from mole.chat.tokens import TokenTexts, special_ids

        self.tokenizer = tokenizer
        self.special = special_ids(tokenizer)
        self.texts = TokenTexts

    def tokens(self, encoded: EncodedExample) -> list[PreviewToken]:
        """The tokens of an example; a character made of several tokens is the text of the last of them."""
        texts = [text for _, text in self.texts(self.tokenizer).push(encoded.input_ids)]
        # truncation in the middle of a character leaves bytes without a text: show them as the tokenizer decodes them
        whole = self.tokenizer.decode(encoded.input_ids, clean_up_tokenization_spaces=False)
        texts[-1] += whole[len("".join(texts)) :]
        return [
            PreviewToken(token, text, label != IGNORE_INDEX, token in self.special)
            for token, text, label in zip(encoded.input_ids, texts, encoded.labels, strict=True)
        ]


def untruncated_length(encoded: EncodedExample) -> int:
    """The example's length in tokens before truncation."""
    return len(encoded.input_ids) + encoded.dropped + encoded.cut


def rows_to_show(encoded: Sequence[EncodedExample], order: Sequence[int], rows: int) -> list[int]:
    """Indices of the examples to show: the first in `order`, the last replaced by a truncated one if none is."""
    shown = list(order[:rows])
    if shown and not any(encoded[at].truncated for at in shown):
        shown[-1] = next((at for at in order if encoded[at].truncated), shown[-1])
    return shown


def histogram(lengths: Sequence[int], most: int) -> Histogram:
    """Count lengths in at most `MAX_BINS` + 1 bins of a round width; all lengths above `most` are in the last bin."""
    longest = min(max(lengths), most)
    power = 10 ** math.floor(math.log10(max(longest / MAX_BINS, 1)))
    width = next(step * power for step in (1, 2, 5, 10) if step * power * MAX_BINS >= longest)
    counts = [0] * (longest // width + 1)
    for length in lengths:
        counts[min(length, most) // width] += 1
    return Histogram(width, counts, max(lengths), max(lengths) > most)


def find_notices(file: EncodedFile, tokenizer: Any) -> list[str]:
    """Likely mistakes in valid data, in sentences."""
    found = [*file.source.notices]
    count = len(file.examples)
    if pieces := [item.more for item in file.encoded if item.more]:
        of = "One text is" if len(pieces) == 1 else f"{len(pieces)} texts are"
        found.append(f"{of} longer than data.max_length and cut into {sum(map(len, pieces)) + len(pieces)} examples.")
    if file.source.shape != "text":
        if tokenizer.chat_template is None:
            found.append(
                "The tokenizer has no chat template: messages get the headings “### User:” and “### Assistant:”."
            )
        if count > 2 and len({example.target for example in file.examples}) == 1:
            found.append(f"All {count} rows have the same answer; is the right column mapped?")
        if count > 2 and len({example.prompt[-1]["content"] for example in file.examples}) == 1:
            found.append(f"All {count} rows have the same question; is the right column mapped?")
        from mole.chat.tokens import answer_ends

        found += system_notices(file.examples, tokenizer)
        if ending := answer_ends(tokenizer).text:
            found.append(
                f"The chat template ends answers with the text {brief(ending)}, which is no special token. Chat stops "
                "where it is written."
            )
    lost = [item.lost_thoughts for item in file.encoded if item.lost_thoughts]
    if lost:
        found.append(
            f"The chat template leaves out {sum(lost)} {'thought' if sum(lost) == 1 else 'thoughts'} of answers in "
            f"{len(lost)} {'row' if len(lost) == 1 else 'rows'}, as most do in all but the last: these are not learnt."
        )
    cut = sum(item.cut > 0 for item in file.encoded)
    if cut:
        found.append(f"{cut} {'row loses' if cut == 1 else 'rows lose'} the end of the answer; raise data.max_length.")
    return found
