"""Log-likelihoods of given answers: each prompt is read once for all its answers, in batches of similar length."""

from __future__ import annotations

import copy
import inspect
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from mole.core.errors import DataError
from mole.data import IGNORE_INDEX, Collator, EncodedExample, Example, encode_examples
from mole.models.context import context_length
from mole.models.loading import Loaded
from mole.models.logits import base_model, only_positions

OF_TOKENS = (DynamicLayer, DynamicSlidingWindowLayer)
"""Layers of a cache whose rows can be chosen and shared."""
BATCH_TOKENS = {"cpu": 2048}
BATCH_TOKENS_GPU = 16384
"""Tokens of a batch, padding included, by kind of device."""


@dataclass(frozen=True)
class AnswerScore:
    """What the model predicts while it reads an example.

    Attributes:
        tokens: the labelled tokens.
        log_probs: the natural logarithm of each one's probability.
        greedy: the most likely token at each one's place.
        start: where the last answer begins among them.
    """

    tokens: list[int]
    log_probs: list[float]
    greedy: list[int]
    start: int

    @property
    def answer(self) -> tuple[list[int], list[int]]:
        """Tokens and greedy predictions of the last answer, including its end token."""
        return self.tokens[self.start :], self.greedy[self.start :]


FamilyScores = tuple[int, Sequence[AnswerScore | None]]
"""Index of a family and its scores."""


def score_families(loaded: Loaded, families: Sequence[Sequence[Example]]) -> Iterator[FamilyScores]:
    """Score families of examples; a family is one prompt with one or several answers.

    Yields the index and the scores of each family when they are known, None for an example that cannot be encoded. The
    common prefix of a family is read once. The common prefix of all single examples, such as a system prompt, is read
    once for all of them.
    """
    limit = context_length(loaded.model.config)
    flat = iter(encode_examples((example for family in families for example in family), loaded.tokenizer, limit))
    encoded = [[next(flat) for _ in family] for family in families]
    complete: dict[int, list[EncodedExample]] = {}
    for index, rows in enumerate(encoded):
        good = [row for row in rows if not isinstance(row, DataError)]
        if len(good) == len(rows):
            complete[index] = good
        else:
            yield index, [None] * len(rows)
    yield from score_singles(loaded, {index: rows for index, rows in complete.items() if len(rows) == 1})
    yield from score_choices(loaded, {index: rows for index, rows in complete.items() if len(rows) > 1})


def score_singles(loaded: Loaded, rows: dict[int, list[EncodedExample]]) -> Iterator[FamilyScores]:
    """Score families of one example."""
    prefix = SharedPrefixes(loaded.model, [common_prefix([row for (row,) in rows.values()])] if rows else [])
    for batch in batches_by_length(rows, batch_tokens(loaded)):
        found = score_batch(loaded, [rows[index][0] for index in batch], prefix, [0] * len(batch))
        yield from ((index, [score]) for index, score in zip(batch, found, strict=True))


def score_choices(loaded: Loaded, rows: dict[int, list[EncodedExample]]) -> Iterator[FamilyScores]:
    """Score families of several examples."""
    for batch in batches_by_length(rows, batch_tokens(loaded)):
        prefixes = SharedPrefixes(loaded.model, [common_prefix(rows[index]) for index in batch])
        owners = [number for number, index in enumerate(batch) for _ in rows[index]]
        found = iter(score_batch(loaded, [row for index in batch for row in rows[index]], prefixes, owners))
        yield from ((index, [next(found) for _ in rows[index]]) for index in batch)


def batch_tokens(loaded: Loaded) -> int:
    """Tokens of a batch on the model's device."""
    return BATCH_TOKENS.get(loaded.model.device.type, BATCH_TOKENS_GPU)


class SharedPrefixes:
    """Prefixes of rows, read once, with their keys and values.

    They are padded on the left, so that the rest of every row follows directly, as attention windows and caches
    expect. Nothing is shared with models that have another kind of cache or take no positions: rows are read whole.
    """

    @torch.no_grad()
    def __init__(self, model: Any, prefixes: Sequence[list[int]]) -> None:
        self.lengths = [len(ids) for ids in prefixes]
        self.cache: Any = None
        self.mask = torch.zeros(len(prefixes), 0, dtype=torch.long)
        if min(self.lengths, default=0) and accepts_positions(model):
            longest = max(self.lengths)
            ids = torch.tensor([[0] * (longest - len(prefix)) + prefix for prefix in prefixes])
            mask = torch.tensor([[0] * (longest - length) + [1] * length for length in self.lengths])
            inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
            # only the cache is needed: compute the logits of one position, the fewest possible
            with only_positions(base_model(model).get_output_embeddings(), torch.tensor([0], device=model.device)):
                output = model(**{name: part.to(model.device) for name, part in inputs.items()}, use_cache=True)
            if shareable(cache := output.get("past_key_values")):
                self.cache, self.mask = cache, mask
        if self.cache is None:
            self.lengths = [0] * len(prefixes)

    def cache_for(self, owners: Sequence[int]) -> Any:
        """A cache with one row per element of `owners`, which are indices of prefixes; None without a cache."""
        if self.cache is None:
            return None
        cache = copy.copy(self.cache)
        cache.layers = [copy.copy(layer) for layer in cache.layers]  # selecting rows replaces a layer's tensors
        cache.batch_select_indices(torch.tensor(owners, device=cache.layers[0].keys.device))
        return cache


def shareable(cache: Any) -> bool:
    """Whether a cache holds the keys and values of tokens alone, and no state that the next tokens change in place."""
    return type(cache) is DynamicCache and all(type(layer) in OF_TOKENS for layer in cache.layers)


def accepts_positions(model: Any) -> bool:
    """Whether a model's forward takes `position_ids`."""
    return "position_ids" in inspect.signature(base_model(model).forward).parameters


def common_prefix(rows: Sequence[EncodedExample]) -> list[int]:
    """The ids with which all rows begin, at most up to the token before the one that predicts the first label."""
    first_label = min(next(i for i, label in enumerate(row.labels) if i and label != IGNORE_INDEX) for row in rows)
    columns = zip(*(row.input_ids[: first_label - 1] for row in rows), strict=False)
    return [column[0] for column in itertools.takewhile(lambda column: len(set(column)) == 1, columns)]


@torch.no_grad()
def score_batch(
    loaded: Loaded, rows: Sequence[EncodedExample], prefixes: SharedPrefixes, owners: Sequence[int]
) -> list[AnswerScore]:
    """Score rows in one forward pass over what follows their prefixes, right-padded; row i has prefix `owners[i]`."""
    device = loaded.model.device
    starts = [prefixes.lengths[owner] for owner in owners]
    rests = [
        {"input_ids": row.input_ids[start:], "labels": row.labels[start:]}
        for row, start in zip(rows, starts, strict=True)
    ]
    batch = Collator(loaded.tokenizer.pad_token_id)(rests)
    # logits at position i predict token i + 1: shift the labels to the left
    labels = F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORE_INDEX)
    positions = (labels != IGNORE_INDEX).flatten().nonzero()[:, 0].to(device)
    inputs = {"input_ids": batch["input_ids"]}
    inputs["attention_mask"] = torch.cat([prefixes.mask[owners], batch["attention_mask"]], -1)
    if prefixes.cache is not None:
        inputs["position_ids"] = torch.tensor(starts)[:, None] + torch.arange(labels.shape[1])
    with only_positions(base_model(loaded.model).get_output_embeddings(), positions):
        output = loaded.model(
            **{name: part.to(device) for name, part in inputs.items()}, past_key_values=prefixes.cache_for(owners)
        )
    logits = output.logits[0].float()  # (labelled tokens of all rows, vocabulary)
    log_probs = -F.cross_entropy(logits, labels.flatten().to(device)[positions], reduction="none")
    counts = (labels != IGNORE_INDEX).sum(-1).tolist()
    return [
        AnswerScore([label for label in row.labels[1:] if label != IGNORE_INDEX], own.tolist(), greedy.tolist(), start)
        for row, own, greedy, start in zip(
            rows,
            log_probs.cpu().split(counts),
            logits.argmax(-1).cpu().split(counts),
            map(last_answer_start, rows),
            strict=True,
        )
    ]


def last_answer_start(row: EncodedExample) -> int:
    """Index of the last answer's first token among the labelled tokens."""
    labelled = [label != IGNORE_INDEX for label in row.labels[1:]]
    tail = next((i for i, flag in enumerate(reversed(labelled)) if not flag), len(labelled))
    return sum(labelled) - tail


def batches_by_length(families: dict[int, list[EncodedExample]], tokens: int) -> Iterator[list[int]]:
    """Keys of families in batches of similar length, longest first, of about `tokens` tokens with padding."""
    longest_of = {index: max(len(row.input_ids) for row in rows) for index, rows in families.items()}
    batch: list[int] = []
    longest = count = 0
    for index in sorted(families, key=lambda index: -longest_of[index]):
        more = len(families[index])
        if batch and longest * (count + more) > tokens:
            yield batch
            batch, longest, count = [], 0, 0
        longest, count = longest or longest_of[index], count + more
        batch.append(index)
    if batch:
        yield batch
