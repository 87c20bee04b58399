"""How good a model is on a data file: choice accuracy, exact match, perplexity."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import DynamicCache

from mole.chat import ChatSettings, context_length, generate, prompt_ids, special_ids, stop_ids
from mole.data import Collator, Encoded, Example, encode_all, read_examples
from mole.errors import DataError
from mole.logits import only_positions
from mole.models import Loaded

BATCH_TOKENS = {"cpu": 2048}
BATCH_TOKENS_GPU = 16384
MARGIN = 16
"""Tokens an answer may be longer than the reference's and still be the same text."""


@dataclass(frozen=True)
class Scored:
    """What the model makes of an answer it is given: of every learnt token its natural logarithm of probability, and
    the token it would have chosen instead (greedily); `start` is where the last answer begins among them."""

    tokens: list[int]
    log_probs: list[float]
    chosen: list[int]
    start: int

    @property
    def answer(self) -> tuple[list[int], list[int]]:
        """Tokens and greedy choices of the last answer, with the token that ends it."""
        return self.tokens[self.start :], self.chosen[self.start :]


def evaluate(
    loaded: Loaded,
    path: str,
    limit: int | None = None,
    progress: bool = False,
    columns: dict[str, str] | None = None,
) -> dict[str, Any]:
    """Measure a model on a data file or hub data set.

    - `accuracy`, rows with choices: how often the right choice has the highest total log-likelihood of all choices as
      the assistant's answer, not divided by its length, the end-of-turn token not counted.
    - `exact_match`, other conversations: how often the greedily generated answer is the reference, both stripped.
    - `perplexity`: exp of the mean negative log-likelihood of the tokens training learns from, in the right answers:
      the assistant's answers with their end-of-turn tokens; in a text row all tokens.

    Args:
        loaded: model, tokenizer and adapter.
        path: the data.
        limit: only so many rows, the first.
        progress: draw a bar on stderr.
        columns: names of the columns where they differ, as `data.columns`.

    Returns `{"rows", "metrics", "target", "data"}`. Raises `DataError` when there is nothing to evaluate.
    """
    examples = read_examples(path, columns, limit).examples
    variants = [
        (place, example.with_target(choice) if choice is not None else example)
        for place, example in enumerate(examples)
        for choice in (example.choices or (None,))
    ]
    scores = score(loaded, [example for _, example in variants], progress)
    by_example: list[list[Scored | None]] = [[] for _ in examples]
    for (place, _), scored in zip(variants, scores, strict=True):
        by_example[place].append(scored)
    hits: dict[str, list[bool]] = {"accuracy": [], "exact_match": []}
    right: list[Scored] = []
    special, stop = special_ids(loaded.tokenizer), stop_ids(loaded.model, loaded.tokenizer)
    for example, found in zip(examples, by_example, strict=True):
        if any(scored is None for scored in found):
            continue  # the chat template refuses it, or it has no answer: nothing to measure
        whole = [scored for scored in found if scored is not None]
        if example.choices:
            totals = [choice_score(scored, special) for scored in whole]
            place = example.choices.index(example.answer or "")
            hits["accuracy"].append(totals.index(max(totals)) == place)
            right.append(whole[place])
        else:
            right += whole
            if example.text is None:
                hits["exact_match"].append(matches(loaded, example, whole[0], stop))
    if not right:
        raise DataError(f"{path}: no row has an answer to evaluate.")
    log_probs = [value for scored in right for value in scored.log_probs]
    metrics = {name: sum(values) / len(values) for name, values in hits.items() if values}
    metrics["perplexity"] = math.exp(min(-sum(log_probs) / len(log_probs), 700.0))
    return {"rows": len(right), "metrics": metrics, "target": loaded.name, "data": path}


def choice_score(scored: Scored, special: set[int]) -> float:
    """Total log-likelihood of the answer's text: without the special tokens that end it."""
    end = len(scored.tokens)
    while end > scored.start + 1 and scored.tokens[end - 1] in special:
        end -= 1
    return sum(scored.log_probs[scored.start : end])


def matches(loaded: Loaded, example: Example, scored: Scored, stop: set[int]) -> bool:
    """Whether greedy generation gives the reference answer, both stripped.

    Up to the first token where the model would choose another, generation follows the reference, which the scores
    have told already. Most rows are decided there: only if the text so far can still become the reference is the
    rest generated.
    """
    tokens, chosen = scored.answer
    agreed = next((i for i, (a, b) in enumerate(zip(tokens, chosen, strict=True)) if a != b), len(tokens))
    if agreed == len(tokens):
        return True
    wanted = example.target.strip()

    def text(ids: Sequence[int]) -> str:
        decoded: str = loaded.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return decoded.strip()

    def possible(ids: Sequence[int]) -> bool:
        return wanted.startswith(text(ids).rstrip("\ufffd"))

    if chosen[agreed] in stop:
        return text(tokens[:agreed]) == wanted
    answer = [*tokens[:agreed], chosen[agreed]]
    if not possible(answer):
        return False
    prompt = prompt_ids(example.prompt, loaded.tokenizer)
    room = context_length(loaded.model) - len(prompt) - len(answer)
    settings = ChatSettings(max_new_tokens=len(tokens) + MARGIN)
    for count, read in enumerate(generate(loaded.model, prompt + answer, settings, stop, room)):
        answer += read if count else []
        if not possible(answer):
            return False
    return text(answer) == wanted


def score(loaded: Loaded, examples: Sequence[Example], progress: bool = False) -> list[Scored | None]:
    """Let the model read examples with their answers, in batches of like length; None for one it cannot be given."""
    encoded = list(encode_all(examples, loaded.tokenizer, context_length(loaded.model)))
    rows = {place: item for place, item in enumerate(encoded) if not isinstance(item, DataError)}
    results: list[Scored | None] = [None] * len(examples)
    tokens = BATCH_TOKENS.get(loaded.model.device.type, BATCH_TOKENS_GPU)
    with tqdm(total=len(rows), desc="Evaluating", unit="row", disable=not progress) as bar, torch.no_grad():
        prefix = Prefix(loaded.model, list(rows.values()))
        for places in batches(rows, tokens):
            for place, scored in zip(places, score_batch(loaded, [rows[i] for i in places], prefix), strict=True):
                results[place] = scored
            bar.update(len(places))
    return results


class Prefix:
    """The beginning all rows share, a system prompt above all: read once, its keys and values kept for every batch."""

    def __init__(self, model: Any, rows: Sequence[Encoded]) -> None:
        self.cache: Any = None
        self.length = min((len(common_prefix(rows[0], row)) for row in rows), default=0)
        if self.length:
            ids = torch.tensor([rows[0].input_ids[: self.length]], device=model.device)
            self.cache = model(input_ids=ids, use_cache=True).past_key_values
        if not isinstance(self.cache, DynamicCache):  # models with a state of another kind read all of every row
            self.cache, self.length = None, 0

    def of(self, count: int) -> Any:
        """A copy of the cache for a batch of `count` rows; None when there is no shared beginning."""
        cache = copy.deepcopy(self.cache)
        if cache is not None:
            cache.batch_repeat_interleave(count)
        return cache


def common_prefix(one: Encoded, other: Encoded) -> list[int]:
    """The ids both rows begin with, ending before the token that predicts the first one learnt of either."""
    learnt = [next(i for i, label in enumerate(row.labels) if i and label != -100) for row in (one, other)]
    pairs = zip(one.input_ids, other.input_ids, range(min(learnt) - 1), strict=False)
    return [a for a, _, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)]


def score_batch(loaded: Loaded, rows: Sequence[Encoded], prefix: Prefix) -> list[Scored]:
    """One forward pass over rows, right-padded, with logits only where a learnt token is predicted."""
    device = loaded.model.device
    collate = Collator(loaded.tokenizer.pad_token_id)
    batch = collate([{"input_ids": row.input_ids, "labels": row.labels} for row in rows])
    labels = F.pad(batch["labels"][:, 1:], (0, 1), value=-100)[:, prefix.length :]
    positions = (labels != -100).flatten().nonzero()[:, 0].to(device)
    with only_positions(base_model(loaded.model).get_output_embeddings(), positions):
        output = loaded.model(
            input_ids=batch["input_ids"][:, prefix.length :].to(device),
            attention_mask=batch["attention_mask"].to(device),
            past_key_values=prefix.of(len(rows)),
        )
    logits = output.logits[0].float()
    log_probs = -F.cross_entropy(logits, labels.flatten().to(device)[positions], reduction="none")
    counts = (labels != -100).sum(-1).tolist()
    return [
        Scored([label for label in row.labels[1:] if label != -100], some.tolist(), best.tolist(), last_answer(row))
        for row, some, best in zip(
            rows, log_probs.cpu().split(counts), logits.argmax(-1).cpu().split(counts), strict=True
        )
    ]


def last_answer(row: Encoded) -> int:
    """Where the last answer begins among the learnt tokens."""
    learnt = [label != -100 for label in row.labels[1:]]
    tail = next((i for i, flag in enumerate(reversed(learnt)) if not flag), len(learnt))
    return sum(learnt) - tail


def batches(rows: dict[int, Encoded], tokens: int) -> Iterator[list[int]]:
    """Keys of rows in groups of like length, the longest first, of about `tokens` tokens with padding."""
    group: list[int] = []
    longest = 0
    for place in sorted(rows, key=lambda place: -len(rows[place].input_ids)):
        longest = longest or len(rows[place].input_ids)
        if group and longest * (len(group) + 1) > tokens:
            yield group
            group, longest = [], len(rows[place].input_ids)
        group.append(place)
    if group:
        yield group


def base_model(model: Any) -> Any:
    """The model under a PEFT wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
