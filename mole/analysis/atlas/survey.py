"""One pass over a corpus with a loaded target: everything that an atlas counts, in bounded memory."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mole.analysis.atlas.activity import Activity
from mole.analysis.atlas.contexts import StrongestContexts
from mole.analysis.atlas.corpus import MOST_VALUES, OTHER, TOO_FEW, Corpus
from mole.analysis.atlas.counts import SHUFFLED_CELLS, ValueCounts, Variable, most_classes, row_sums
from mole.analysis.atlas.information import shares_of
from mole.analysis.atlas.recorder import BatchRecorder, BatchRouting
from mole.analysis.atlas.segments import (
    MOST_BUCKETS,
    PARTS,
    TokenRow,
    bucket_name,
    bucket_of,
    encode_rows,
    length_batches,
)
from mole.analysis.atlas.shuffles import shuffled_places
from mole.core.errors import DataError
from mole.models.loading import Loaded

CHUNK_ROWS = 256
"""Rows that are encoded at a time, and among which values are shuffled."""
BATCH_TOKENS, BATCH_CELLS = 2048, 4_000_000
"""Tokens of a batch, padding included, at the most; and numbers of its routing: 16 MB."""
TOKEN_CLASSES = 256
"""Tokens that are told apart for the mutual information, at the most; all others are one value."""
LISTED_TOKENS, LISTED_CELLS = 2048, 8_000_000
"""Tokens that may be characteristic of an expert, at the most; and numbers in their table: 64 MB."""
Report = Callable[[str, int, int], object]
"""`report(what, done, total)`, called after each batch; what it raises ends the work."""


def no_report(what: str, done: int, total: int) -> None:
    """Report nothing."""


@dataclass
class TokenCensus:
    """What a first look at the corpus, without the model, finds.

    Attributes:
        counts: of each token id, how often it occurs.
        longest: tokens of the longest row.
        prefix: the token ids with which all rows begin.
        order: the places of the usable examples, in the random order in which they are read.
        rejected: how many examples cannot be encoded.
    """

    counts: Counter[int] = field(default_factory=Counter)
    longest: int = 0
    prefix: list[int] | None = None
    order: list[int] = field(default_factory=list)
    rejected: int = 0


def chunks_of(order: Sequence[int], most: int = CHUNK_ROWS) -> list[Sequence[int]]:
    """The rows in chunks of like sizes, so that none is left with a single row, which would have no partner."""
    number = -(-len(order) // most)
    ends = [len(order) * chunk // number for chunk in range(number + 1)]
    return [order[start:end] for start, end in itertools.pairwise(ends)]


def take_census(corpus: Corpus, loaded: Loaded, max_length: int, seed: int, report: Report = no_report) -> TokenCensus:
    """Encode all rows once and count their tokens; the rows are in a random order from here on.

    Raises `DataError` if fewer than 2 rows can be encoded.
    """
    places = list(range(len(corpus.examples)))
    random.Random(seed).shuffle(places)
    census, error = TokenCensus(), None
    for done, chunk in enumerate(parts := chunks_of(places), start=1):
        usable: dict[int, None] = {}
        for row in encode_rows(corpus.examples, chunk, loaded.tokenizer, max_length):
            if isinstance(row, DataError):
                census.rejected, error = census.rejected + 1, row
                continue
            usable[row.place] = None
            census.counts.update(row.ids)
            census.prefix = row.ids if census.prefix is None else common_prefix(census.prefix, row.ids)
            census.longest = max(census.longest, len(row.ids))
        census.order += usable
        report("Reading", done, len(parts))
    if len(census.order) < 2:
        why = f" ({error})" if error else ""
        few = "no row that" if not census.order else "one row that"
        raise DataError(f"{corpus.source} has {few} the model can be given{why}; {TOO_FEW}.", field="data")
    return census


def common_prefix(one: list[int], other: list[int]) -> list[int]:
    """What both begin with."""
    same = next((place for place, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), None)
    return one[: min(len(one), len(other)) if same is None else same]


class Survey:
    """The sums of an atlas.

    The memory does not grow with the number of rows: at the most `LISTED_CELLS` numbers for the characteristic tokens,
    and `SHUFFLED_CELLS` for each variable.

    Args:
        corpus: the rows.
        census: of these rows.
        recorder: of the target, after its first batch, so that its projections are known.
    """

    def __init__(self, corpus: Corpus, census: TokenCensus, recorder: BatchRecorder) -> None:
        self.projections, self.experts = recorder.projections, recorder.experts
        size = (len(self.projections), self.experts)
        width = size[0] * (self.experts + 1)
        common = [token for token, _ in census.counts.most_common()]
        self.tokens = common[: most_classes(LISTED_CELLS, LISTED_TOKENS, width, 1) - 1]
        self.classes = common[: most_classes(SHUFFLED_CELLS, TOKEN_CLASSES, width) - 1]
        self.listed = ValueCounts(len(self.tokens) + 1, *size, shuffles=0)
        most = most_classes(SHUFFLED_CELLS, MOST_VALUES, width)
        self.variables = variables_of(corpus, self.classes, census.longest, most)
        self.counts = {variable.name: ValueCounts(len(variable.values), *size) for variable in self.variables}
        self.activity = Activity(self.projections, self.experts)
        self.contexts = StrongestContexts(*size, prefix=len(census.prefix or []))
        self._columns = {name: torch.tensor(corpus.classes(name, most)[1]) for name in corpus.columns}
        self._token_class = class_table(self.classes)
        self._token_place = class_table(self.tokens)

    def add(self, batch: Batch, routing: BatchRouting) -> None:
        """Add the routing of a batch."""
        shares = shares_of(routing.weights.double())
        self.activity.add(routing, shares)
        self.contexts.add(routing.weights, [row.ids for row in batch.rows], batch.places)
        ids = torch.tensor(batch.ids)
        self.listed.add(shares, lookup(self._token_place, ids))
        whole = row_sums(shares, batch.row_of_token, len(batch.rows))
        for variable in self.variables:
            values = batch.chunk.values(variable, self._token_class, self._columns)
            here, shuffled = batch.rows_at if variable.of_rows else batch.tokens_at
            self.counts[variable.name].add(
                whole if variable.of_rows else shares, values[here], values[shuffled[:, here]]
            )


def variables_of(corpus: Corpus, tokens: Sequence[int], longest: int, most: int) -> list[Variable]:
    """The variables of a corpus: tokens, positions, parts, and its columns."""
    buckets = min(bucket_of(max(longest - 1, 0)) + 1, MOST_BUCKETS)
    return [
        Variable("token", "token", [*map(str, tokens), OTHER]),
        Variable("position", "position", [bucket_name(bucket) for bucket in range(buckets)]),
        Variable("part", "part", list(PARTS)),
        *(Variable(name, "column", corpus.classes(name, most)[0], True) for name in corpus.columns),
    ]


def class_table(tokens: Sequence[int]) -> Tensor:
    """For each token id its place among some tokens, and their number for others; the last entry is for larger ids."""
    table = torch.full((max(tokens, default=0) + 2,), len(tokens))
    table[torch.tensor(tokens, dtype=torch.long)] = torch.arange(len(tokens))
    return table


def lookup(table: Tensor, ids: Tensor) -> Tensor:
    """The places of token ids, from `class_table`."""
    return table[ids.clamp(max=len(table) - 1)]


class Chunk:
    """Some rows, the shortest first, their tokens one after the other, and the shuffling of their values."""

    def __init__(self, rows: Sequence[TokenRow], generator: torch.Generator) -> None:
        self.rows = sorted(rows, key=lambda row: len(row.ids))
        self.lengths = torch.tensor([len(row.ids) for row in self.rows])
        self.starts = (self.lengths.cumsum(0) - self.lengths).tolist()
        self.token_places, self.row_places = shuffled_places(self.lengths, generator)
        self._ids = torch.tensor([token for row in self.rows for token in row.ids])
        self._parts = torch.tensor([part for row in self.rows for part in row.parts])
        lengths = self.lengths.tolist()
        self._buckets = torch.tensor([bucket_of(position) for length in lengths for position in range(length)])
        self._places = torch.tensor([row.place for row in self.rows])

    def values(self, variable: Variable, classes: Tensor, columns: dict[str, Tensor]) -> Tensor:
        """The value of each token of the chunk, or of each row."""
        if variable.kind == "column":
            return columns[variable.name][self._places]
        if variable.kind == "token":
            return lookup(classes, self._ids)
        return self._parts if variable.kind == "part" else self._buckets

    def batches(self, tokens: int) -> Iterator[Batch]:
        """Successive rows, of about `tokens` tokens with padding."""
        for part in length_batches(self.lengths.tolist(), tokens):
            yield Batch(self, part.start, part.stop)


class Batch:
    """The rows `start` to `end` of a chunk."""

    def __init__(self, chunk: Chunk, start: int, end: int) -> None:
        self.chunk, self.rows = chunk, chunk.rows[start:end]
        self.ids = [token for row in self.rows for token in row.ids]
        self.places = [row.place for row in self.rows]
        lengths = chunk.lengths[start:end]
        self.row_of_token = torch.arange(len(self.rows)).repeat_interleave(lengths)
        first = chunk.starts[start]
        self.tokens_at = slice(first, first + len(self.ids)), chunk.token_places
        self.rows_at = slice(start, end), chunk.row_places


def survey(
    corpus: Corpus,
    loaded: Loaded,
    census: TokenCensus,
    max_length: int,
    seed: int = 0,
    report: Report = no_report,
) -> Survey:
    """Run a corpus through a target and count the routing of all of its tokens.

    Raises `ModelError` if the target has no router; what `report` raises ends it.
    """
    recorder, found = BatchRecorder(loaded), None
    generator, done = torch.Generator().manual_seed(seed), 0
    with recorder.recording():
        for places in chunks_of(census.order):
            encoded = encode_rows(corpus.examples, places, loaded.tokenizer, max_length)
            chunk = Chunk([row for row in encoded if isinstance(row, TokenRow)], generator)
            for batch in chunk.batches(batch_tokens(recorder)):
                routing = recorder.route([row.ids for row in batch.rows])
                found = found or Survey(corpus, census, recorder)
                found.add(batch, routing)
                done += len(set(batch.places))
                report("Routing", min(done, len(census.order)), len(census.order))
    assert found is not None  # a census has rows
    return found


def batch_tokens(recorder: BatchRecorder) -> int:
    """Tokens of a batch: those whose routing is small enough."""
    return min(BATCH_TOKENS, max(256, BATCH_CELLS // recorder.width))
