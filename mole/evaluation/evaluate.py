"""How good a model is on a data file: choice accuracy, exact match, perplexity."""

from __future__ import annotations

import copy
import inspect
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import DynamicCache

from mole.chat.generate import ChatSettings, context_length, generate, prompt_ids, special_ids, stop_ids
from mole.core.errors import DataError
from mole.data import Collator, EncodedExample, Example, encode_examples, read_examples
from mole.models.loading import Loaded
from mole.models.logits import only_positions

BATCH_TOKENS = {"cpu": 2048}
BATCH_TOKENS_GPU = 16384
MARGIN = 16
"""Tokens an answer may be longer than the reference's and still be the same text."""
NOTHING = "no row has an answer to evaluate."


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
    """Measure a model on a data file or hub data set, as `measure` does.

    Args:
        loaded: model, tokenizer and adapter.
        path: the data.
        limit: only so many rows, the first.
        progress: draw a bar on stderr.
        columns: names of the columns where they differ, as `data.columns`.

    Returns `{"rows", "metrics", "target", "data"}`. Raises `DataError` when there is nothing to evaluate.
    """
    examples = read_examples(path, columns, limit).examples
    with tqdm(total=len(examples), desc="Evaluating", unit="row", disable=not progress) as bar:
        rows, metrics = measure(loaded, examples, lambda done, total: bar.update(done - bar.n))
    if not rows:
        raise DataError(f"{path}: {NOTHING}")
    return {"rows": rows, "metrics": metrics, "target": loaded.name, "data": path}


def measure(
    loaded: Loaded, examples: Sequence[Example], on_progress: Callable[[int, int], object] | None = None
) -> tuple[int, dict[str, float]]:
    """How good a model is on examples: the number of rows that could be measured, and the metrics.

    - `accuracy`, rows with choices: how often the right choice has the highest total log-likelihood of all choices as
      the assistant's answer, not divided by its length, the end-of-turn token not counted.
    - `exact_match`, other conversations: how often the greedily generated answer is the reference, both stripped.
    - `perplexity`: exp of the mean negative log-likelihood of the tokens training learns from, in the right answers:
      the assistant's answers with their end-of-turn tokens; in a text row all tokens.

    `on_progress` is called with the rows done and all rows; what it raises ends the evaluation. A row that the chat
    template refuses, or without an answer, is left out; with no other row the result is `(0, {})`.
    """
    families = [
        [example.with_target(choice) if choice is not None else example for choice in example.choices or (None,)]
        for example in examples
    ]
    results: list[Result | None] = [None] * len(examples)
    special, stop = special_ids(loaded.tokenizer), stop_ids(loaded.model, loaded.tokenizer)
    for done, (place, found) in enumerate(scores(loaded, families), start=1):
        results[place] = judge(loaded, examples[place], found, special, stop)
        if on_progress:
            on_progress(done, len(examples))
    return summary([result for result in results if result is not None])


@dataclass(frozen=True)
class Result:
    """One row: its kind of hit (None for text), whether it was one, and the log-probabilities of its right answer."""

    kind: str | None
    hit: bool
    log_probs: list[float]


def judge(
    loaded: Loaded, example: Example, found: Sequence[Scored | None], special: set[int], stop: set[int]
) -> Result | None:
    """What the scores of a row's answers (one, or one a choice) mean; None when one of them could not be given."""
    whole = [scored for scored in found if scored is not None]
    if len(whole) < len(found):
        return None  # the chat template refuses it, or it has no answer: nothing to measure
    if example.choices:
        totals = [choice_score(scored, special) for scored in whole]
        right = example.choices.index(example.answer or "")
        return Result("accuracy", totals.index(max(totals)) == right, whole[right].log_probs)
    if example.text is not None:
        return Result(None, False, whole[0].log_probs)
    return Result("exact_match", matches(loaded, example, whole[0], stop), whole[0].log_probs)


def summary(results: Sequence[Result]) -> tuple[int, dict[str, float]]:
    """Rows and metrics of all results."""
    if not results:
        return 0, {}
    metrics = {}
    for kind in ("accuracy", "exact_match"):
        hits = [result.hit for result in results if result.kind == kind]
        if hits:
            metrics[kind] = sum(hits) / len(hits)
    log_probs = [value for result in results for value in result.log_probs]
    metrics["perplexity"] = math.exp(min(-sum(log_probs) / len(log_probs), 700.0))
    return len(results), metrics


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


def score(loaded: Loaded, examples: Sequence[Example]) -> list[Scored | None]:
    """What the model makes of examples with their answers, in their order."""
    found = dict(scores(loaded, [[example] for example in examples]))
    return [found[place][0] for place in range(len(examples))]


Found = tuple[int, Sequence[Scored | None]]


def scores(loaded: Loaded, families: Sequence[Sequence[Example]]) -> Iterator[Found]:
    """Let the model read families of examples, one prompt with several answers, in batches of like length.

    Yields each family's place and its scores as soon as they are there; None for an example it cannot be given. What
    a family's prompts have in common is read once for all of it; what all single examples begin with, a system prompt
    above all, once for all of them.
    """
    limit = context_length(loaded.model)
    flat = iter(encode_examples((example for family in families for example in family), loaded.tokenizer, limit))
    encoded = [[next(flat) for _ in family] for family in families]
    whole: dict[int, list[EncodedExample]] = {}
    for place, rows in enumerate(encoded):
        good = [row for row in rows if not isinstance(row, DataError)]
        if len(good) == len(rows):
            whole[place] = good
        else:
            yield place, [None] * len(rows)
    yield from single_scores(loaded, {place: rows for place, rows in whole.items() if len(rows) == 1})
    yield from family_scores(loaded, {place: rows for place, rows in whole.items() if len(rows) > 1})


def single_scores(loaded: Loaded, rows: dict[int, list[EncodedExample]]) -> Iterator[Found]:
    """The scores of families of one."""
    shared = Beginnings(loaded.model, [common_prefix([row for (row,) in rows.values()])] if rows else [])
    for places in batches(rows, batch_tokens(loaded)):
        found = score_batch(loaded, [rows[place][0] for place in places], shared, [0] * len(places))
        yield from ((place, [scored]) for place, scored in zip(places, found, strict=True))


def family_scores(loaded: Loaded, rows: dict[int, list[EncodedExample]]) -> Iterator[Found]:
    """The scores of families of several."""
    for places in batches(rows, batch_tokens(loaded)):
        shared = Beginnings(loaded.model, [common_prefix(rows[place]) for place in places])
        owners = [number for number, place in enumerate(places) for _ in rows[place]]
        found = iter(score_batch(loaded, [row for place in places for row in rows[place]], shared, owners))
        yield from ((place, [next(found) for _ in rows[place]]) for place in places)


def batch_tokens(loaded: Loaded) -> int:
    """How many tokens are read at a time."""
    return BATCH_TOKENS.get(loaded.model.device.type, BATCH_TOKENS_GPU)


class Beginnings:
    """What rows begin with, read once, its keys and values kept.

    Left-padded: what comes next stands right behind it in every row, as attention windows and caches expect. Models
    with a state of another kind, or that count positions themselves, read all of every row.
    """

    @torch.no_grad()
    def __init__(self, model: Any, beginnings: Sequence[list[int]]) -> None:
        self.lengths = [len(ids) for ids in beginnings]
        self.cache: Any = None
        self.mask = torch.zeros(len(beginnings), 0, dtype=torch.long)
        if min(self.lengths, default=0) and takes_positions(model):
            longest = max(self.lengths)
            ids = torch.tensor([[0] * (longest - len(some)) + some for some in beginnings])
            mask = torch.tensor([[0] * (longest - length) + [1] * length for length in self.lengths])
            inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
            with only_positions(base_model(model).get_output_embeddings(), torch.tensor([0], device=model.device)):
                cache = model(**{name: part.to(model.device) for name, part in inputs.items()}, use_cache=True)
            if isinstance(cache.past_key_values, DynamicCache):
                self.cache, self.mask = cache.past_key_values, mask
        if self.cache is None:
            self.lengths = [0] * len(beginnings)

    def of(self, owners: Sequence[int]) -> Any:
        """A cache with a row for each of `owners`, indices of beginnings; None when nothing is kept."""
        if self.cache is None:
            return None
        cache = copy.copy(self.cache)
        cache.layers = [copy.copy(layer) for layer in cache.layers]  # selecting replaces its tensors, and no other's
        cache.batch_select_indices(torch.tensor(owners, device=cache.layers[0].keys.device))
        return cache


def takes_positions(model: Any) -> bool:
    """Whether a model can be told where in the text its tokens stand."""
    return "position_ids" in inspect.signature(base_model(model).forward).parameters


def common_prefix(rows: Sequence[EncodedExample]) -> list[int]:
    """The ids all rows begin with, ending before the token that predicts the first one learnt of any."""
    learnt = min(next(i for i, label in enumerate(row.labels) if i and label != -100) for row in rows)
    columns = zip(*(row.input_ids[: learnt - 1] for row in rows), strict=False)
    return [column[0] for column in itertools.takewhile(lambda column: len(set(column)) == 1, columns)]


@torch.no_grad()
def score_batch(
    loaded: Loaded, rows: Sequence[EncodedExample], shared: Beginnings, owners: Sequence[int]
) -> list[Scored]:
    """One forward pass over what follows the shared beginnings, right-padded, with logits where a learnt token is
    predicted; `owners` says which beginning each row has."""
    device = loaded.model.device
    starts = [shared.lengths[owner] for owner in owners]
    parts = [
        {"input_ids": row.input_ids[start:], "labels": row.labels[start:]}
        for row, start in zip(rows, starts, strict=True)
    ]
    batch = Collator(loaded.tokenizer.pad_token_id)(parts)
    labels = F.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    positions = (labels != -100).flatten().nonzero()[:, 0].to(device)
    inputs = {"input_ids": batch["input_ids"]}
    inputs["attention_mask"] = torch.cat([shared.mask[owners], batch["attention_mask"]], -1)
    if shared.cache is not None:
        inputs["position_ids"] = torch.tensor(starts)[:, None] + torch.arange(labels.shape[1])
    with only_positions(base_model(loaded.model).get_output_embeddings(), positions):
        output = loaded.model(
            **{name: part.to(device) for name, part in inputs.items()}, past_key_values=shared.of(owners)
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


def last_answer(row: EncodedExample) -> int:
    """Where the last answer begins among the learnt tokens."""
    learnt = [label != -100 for label in row.labels[1:]]
    tail = next((i for i, flag in enumerate(reversed(learnt)) if not flag), len(learnt))
    return sum(learnt) - tail


def batches(families: dict[int, list[EncodedExample]], tokens: int) -> Iterator[list[int]]:
    """Keys of families in groups of like length, the longest first, of about `tokens` tokens with padding."""
    longest_of = {place: max(len(row.input_ids) for row in rows) for place, rows in families.items()}
    group: list[int] = []
    longest = count = 0
    for place in sorted(families, key=lambda place: -longest_of[place]):
        more = len(families[place])
        if group and longest * (count + more) > tokens:
            yield group
            group, longest, count = [], 0, 0
        longest, count = longest or longest_of[place], count + more
        group.append(place)
    if group:
        yield group


def base_model(model: Any) -> Any:
    """The model under a PEFT wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
