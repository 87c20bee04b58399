"""Metrics of a model on a data file: accuracy on multiple choice, exact match, perplexity."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from mole.chat.generate import generate
from mole.chat.settings import ChatSettings
from mole.chat.tokens import AnswerEnds, answer_ends
from mole.core.errors import DataError
from mole.data import Example, read_examples
from mole.data.chat_templates import ChatTemplate
from mole.data.encoding import encode_text
from mole.data.rendering import render_example
from mole.evaluation.scoring import AnswerScore, score_families
from mole.models.context import context_length
from mole.models.loading import Loaded

EXTRA_TOKENS = 16
"""Tokens that a generated answer may have more than the reference and still be the same text."""
NO_ANSWERS = "no row has an answer to evaluate."


def evaluate_file(
    loaded: Loaded,
    path: str,
    limit: int | None = None,
    progress: bool = False,
    columns: dict[str, str] | None = None,
) -> dict[str, Any]:
    """Evaluate a model on a data file or hub data set, see `evaluate_examples`.

    Args:
        loaded: model, tokenizer and adapter.
        path: the data.
        limit: evaluate only the first rows.
        progress: show a progress bar on stderr.
        columns: names of the columns where they differ, as `data.columns`.

    Returns `{"rows", "metrics", "target", "data"}`. Raises `DataError` when no row can be evaluated.
    """
    examples = read_examples(path, columns, limit).examples
    with tqdm(total=len(examples), desc="Evaluating", unit="row", disable=not progress) as bar:
        rows, metrics = evaluate_examples(loaded, examples, lambda done, total: bar.update(done - bar.n))
    if not rows:
        raise DataError(f"{path}: {NO_ANSWERS}")
    return {"rows": rows, "metrics": metrics, "target": loaded.name, "data": path}


def evaluate_examples(
    loaded: Loaded, examples: Sequence[Example], report: Callable[[int, int], object] | None = None
) -> tuple[int, dict[str, float]]:
    """Evaluate a model on examples → the number of evaluated rows, and the metrics.

    - `accuracy`, rows with choices: share of rows whose right choice has the highest total log-likelihood as the
      assistant's answer, not divided by its length, without its end token.
    - `exact_match`, other conversations: share of rows whose greedily generated answer equals the reference, both
      stripped.
    - `perplexity`: exp of the mean negative log-likelihood of the tokens that training learns, in the right answers:
      the assistant's answers with their end tokens; all tokens of a text row.

    `report(done, total)` is called after each row; what it raises ends the evaluation. Rows without an answer, or that
    the chat template rejects, are skipped; if no other row exists the result is `(0, {})`.
    """
    families = [
        [example.with_target(choice) if choice is not None else example for choice in example.choices or (None,)]
        for example in examples
    ]
    results: list[RowResult | None] = [None] * len(examples)
    ends = answer_ends(loaded.tokenizer, loaded.model)
    for done, (index, scores) in enumerate(score_families(loaded, families), start=1):
        results[index] = row_result(loaded, examples[index], scores, ends)
        if report:
            report(done, len(examples))
    return aggregate([result for result in results if result is not None])


@dataclass(frozen=True)
class RowResult:
    """One evaluated row.

    Attributes:
        metric: `accuracy` or `exact_match`; None for text.
        hit: whether it counts as right.
        log_probs: log-probabilities of the right answer's tokens.
    """

    metric: str | None
    hit: bool
    log_probs: list[float]


def row_result(
    loaded: Loaded, example: Example, scores: Sequence[AnswerScore | None], ends: AnswerEnds
) -> RowResult | None:
    """The result of a row from the scores of its answers, one per choice; None when one of them has no score."""
    known = [score for score in scores if score is not None]
    if len(known) < len(scores):
        return None
    if example.choices:
        totals = [text_log_likelihood(score, ends.special) for score in known]
        right = example.choices.index(example.answer or "")
        return RowResult("accuracy", totals.index(max(totals)) == right, known[right].log_probs)
    if example.text is not None:
        return RowResult(None, False, known[0].log_probs)
    return RowResult("exact_match", generates_reference(loaded, example, known[0], ends), known[0].log_probs)


def aggregate(results: Sequence[RowResult]) -> tuple[int, dict[str, float]]:
    """The number of rows, and the metrics over all of them."""
    if not results:
        return 0, {}
    metrics = {}
    for metric in ("accuracy", "exact_match"):
        hits = [result.hit for result in results if result.metric == metric]
        if hits:
            metrics[metric] = sum(hits) / len(hits)
    log_probs = [value for result in results for value in result.log_probs]
    metrics["perplexity"] = math.exp(min(-sum(log_probs) / len(log_probs), 700.0))
    return len(results), metrics


def text_log_likelihood(score: AnswerScore, special: set[int]) -> float:
    """Total log-likelihood of the last answer without the special tokens at its end."""
    end = len(score.tokens)
    while end > score.start + 1 and score.tokens[end - 1] in special:
        end -= 1
    return sum(score.log_probs[score.start : end])


def generates_reference(loaded: Loaded, example: Example, score: AnswerScore, ends: AnswerEnds) -> bool:
    """Whether greedy generation gives the reference answer, both stripped.

    Up to the first token where the model's prediction differs, generation equals the reference, which the scores
    already tell. Most rows are decided there: the rest is generated only if the text so far can still become the
    reference.
    """
    tokens, greedy = score.answer
    agreed = next((i for i, (a, b) in enumerate(zip(tokens, greedy, strict=True)) if a != b), len(tokens))
    if agreed == len(tokens):
        return True

    def text(ids: Sequence[int]) -> str:
        decoded: str = loaded.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return (decoded.partition(ends.text)[0] if ends.text else decoded).strip()

    calls = "tool_calls" in example.messages[-1]  # written as the chat template writes them
    reference = text(tokens) if calls else example.target.strip()

    def can_match(ids: Sequence[int]) -> bool:
        return reference.startswith(text(ids).rstrip("\ufffd"))  # the last character may still be incomplete

    if greedy[agreed] in ends.ids:
        return text(tokens[:agreed]) == reference
    answer = [*tokens[:agreed], greedy[agreed]]
    if not can_match(answer):
        return False
    prompt = render_example(example, ChatTemplate(loaded.tokenizer)).prompt
    given = encode_text(prompt, loaded.tokenizer) + answer
    context_left = context_length(loaded.model.config) - len(given)
    if context_left < 1:
        return False
    settings = ChatSettings(max_new_tokens=len(tokens) + EXTRA_TOKENS)

    def go_on(read: list[int]) -> bool:
        answer.extend(read if read is not given else [])
        return can_match(answer)

    generate(loaded.model, given, settings, ends.ids, context_left, go_on)
    return text(answer) == reference
