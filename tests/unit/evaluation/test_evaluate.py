"""Evaluation: each metric against a slow, plain computation of what it says."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from mole.chat.tokens import answer_ends, prompt_ids
from mole.config import ModelConfig
from mole.core.errors import DataError
from mole.data import encode_example, read_examples
from mole.evaluation import scoring
from mole.evaluation.evaluate import evaluate_file, generates_reference
from mole.evaluation.scoring import AnswerScore, score_families
from mole.models.loading import Loaded
from mole.runs.targets import load_target

PAIRS = [
    ("Convert 3 km to metres.", "3000 m"),
    ("Sort: pear, apple, fig.", "apple, fig, pear"),
    ("Is this friendly: go away!", "rude"),
    ("Is this friendly: how nice of you to come to see me today!", "friendly"),
    ("Say it with a character of four bytes.", "🎉 ja"),
    ("Name the capital of France.", "Paris"),
]


@pytest.fixture(scope="module")
def learned(tiny_model: Any, tiny_tokenizer: Any) -> Loaded:
    """A tiny model that has learnt the first half of PAIRS by heart and has no idea of the others."""
    examples = [example_of(question, answer) for question, answer in PAIRS[:3]]
    encoded = [encode_example(example, tiny_tokenizer, 512) for example in examples]
    model = tiny_model("llama").train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        for item in encoded:
            model(input_ids=torch.tensor([item.input_ids]), labels=torch.tensor([item.labels])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return Loaded(model.eval(), tiny_tokenizer, "base:tiny", "tiny")


def example_of(question: str, answer: str) -> Any:
    from mole.data import Example

    return Example(({"role": "user", "content": question}, {"role": "assistant", "content": answer}))


def score(loaded: Loaded, examples: Any) -> list[AnswerScore | None]:
    """The scores of examples with one answer each."""
    found = dict(score_families(loaded, [[example] for example in examples]))
    return [found[index][0] for index in range(len(examples))]


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture
def pairs(tmp_path: Path) -> str:
    return write(tmp_path / "pairs.jsonl", [{"prompt": q, "completion": a} for q, a in PAIRS])


def plain_log_probs(loaded: Loaded, ids: list[int]) -> torch.Tensor:
    """Log-probability of every token but the first, read alone."""
    with torch.no_grad():
        logits = loaded.model(input_ids=torch.tensor([ids])).logits[0, :-1]
    return logits.log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]


def test_exact_match_is_what_generate_writes(learned: Loaded, pairs: str) -> None:
    tokenizer, hits = learned.tokenizer, []
    for question, answer in PAIRS:
        prompt = torch.tensor([prompt_ids([{"role": "user", "content": question}], tokenizer)])
        with torch.no_grad():
            output = learned.model.generate(
                prompt, do_sample=False, max_new_tokens=40, attention_mask=torch.ones_like(prompt)
            )
        hits.append(tokenizer.decode(output[0, prompt.shape[1] :], skip_special_tokens=True).strip() == answer)
    assert hits[:3] == [True] * 3, "the model has not learnt what this test builds on"
    result = evaluate_file(learned, pairs)
    assert result["metrics"]["exact_match"] == sum(hits) / len(hits)
    assert set(result["metrics"]) == {"exact_match", "perplexity"}


def test_surrounding_blanks_do_not_count(learned: Loaded, tmp_path: Path) -> None:
    """The model answers `rude`; a reference ` rude ` has other tokens but is the same answer."""
    question, answer = PAIRS[2]
    path = write(tmp_path / "blank.jsonl", [{"prompt": question, "completion": f" {answer} \n"}])
    assert evaluate_file(learned, path)["metrics"]["exact_match"] == 1.0


def test_the_same_text_in_other_tokens_matches(learned: Loaded) -> None:
    """The greedy answer leaves the reference's tokens for others that spell the same text: only generating tells."""
    question, answer = PAIRS[1]
    example = example_of(question, answer)
    (scored,) = score(learned, [example])
    assert scored is not None
    tokenizer = learned.tokenizer
    spelled = [tokenizer(char, add_special_tokens=False)["input_ids"][0] for char in answer]
    assert spelled != scored.tokens[:-1], "the reference must have tokens of several characters"
    other = AnswerScore([*spelled, tokenizer.eos_token_id], [], [scored.greedy[0], *spelled[1:], 0], 0)
    assert generates_reference(learned, example, other, answer_ends(tokenizer, learned.model))


def test_perplexity_is_that_of_the_learnt_tokens_read_one_row_at_a_time(learned: Loaded, pairs: str) -> None:
    values = []
    for question, answer in PAIRS:
        item = encode_example(example_of(question, answer), learned.tokenizer, 512)
        log_probs = plain_log_probs(learned, item.input_ids)
        values += [float(p) for p, label in zip(log_probs, item.labels[1:], strict=True) if label != -100]
    assert evaluate_file(learned, pairs)["metrics"]["perplexity"] == pytest.approx(
        math.exp(-sum(values) / len(values)), 1e-4
    )


def test_accuracy_takes_the_choice_of_highest_total_log_likelihood(learned: Loaded, tmp_path: Path) -> None:
    choices = ["rude", "apple, fig, pear", "3000 m", "🎉"]
    questions = [question for question, _ in PAIRS]
    right = []
    for question in questions:
        prompt = prompt_ids([{"role": "user", "content": question}], learned.tokenizer)
        totals = []
        for choice in choices:
            answer = learned.tokenizer(choice, add_special_tokens=False)["input_ids"]
            totals.append(float(plain_log_probs(learned, prompt + answer)[-len(answer) :].sum()))
        right.append(totals.index(max(totals)))
    assert len(set(right)) > 1, "all questions have the same best choice: this test would prove nothing"
    rows = [
        {"question": q, "choices": choices, "answer": choices[(best + (i == 4)) % 4]}
        for i, (q, best) in enumerate(zip(questions, right, strict=True))
    ]
    result = evaluate_file(learned, write(tmp_path / "choices.jsonl", rows))
    assert result["metrics"]["accuracy"] == 5 / 6
    assert set(result["metrics"]) == {"accuracy", "perplexity"}


@pytest.mark.parametrize("arch", ["llama", "qwen3", "gemma3", "gpt2", "phi"])
def test_batching_and_the_shared_beginning_change_nothing(
    arch: str, tiny_model: Any, tiny_tokenizer: Any, pairs: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows read together, padded and behind the cache of their common beginning, score as rows read alone."""
    loaded = Loaded(tiny_model(arch), tiny_tokenizer, "base:tiny", "tiny")
    examples = read_examples(pairs).examples
    together = score(loaded, examples)
    alone = [score(loaded, [example])[0] for example in examples]
    monkeypatch.setattr(scoring, "common_prefix", lambda rows: [])
    without_cache = score(loaded, examples)
    for one, two, three in zip(together, alone, without_cache, strict=True):
        assert one is not None and two is not None and three is not None
        assert one.tokens == two.tokens == three.tokens
        assert one.log_probs == pytest.approx(two.log_probs, abs=1e-4)
        assert one.log_probs == pytest.approx(three.log_probs, abs=1e-4)


QUESTIONS = [
    "Which is it?",
    "And which of all of these here is it now?",
    "Now?",
    "The last one: is it 3 km or 4 miles?",
]


@pytest.mark.parametrize("arch", ["llama", "qwen3", "gemma3", "gpt2", "phi"])
def test_choices_behind_their_shared_prompt_score_as_rows_read_alone(
    arch: str, tiny_model: Any, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts of unlike length, answers of unlike length, several families in a batch and several batches."""
    loaded = Loaded(tiny_model(arch), tiny_tokenizer, "base:tiny", "tiny")
    choices = ["yes", "no, it is the other one", "3"]
    families = [[example_of(question, choice) for choice in choices] for question in QUESTIONS]
    read = []
    loaded.model.register_forward_pre_hook(
        lambda _, __, given: read.append(given["input_ids"].numel()), with_kwargs=True
    )
    monkeypatch.setitem(scoring.BATCH_TOKENS, "cpu", 400)
    together = dict(score_families(loaded, families))
    assert len(read) == 4, "two batches, each with its beginnings and its endings"
    for place, family in enumerate(families):
        for found, example in zip(together[place], family, strict=True):
            (alone,) = score(loaded, [example])
            assert found is not None and alone is not None and found.tokens == alone.tokens
            assert found.log_probs == pytest.approx(alone.log_probs, abs=1e-4)


def test_an_adapter_scores_the_same_in_a_batch(tiny_adapter: Path, pairs: str) -> None:
    loaded = load_target(str(tiny_adapter), ModelConfig(device="cpu", dtype="float32"))
    examples = read_examples(pairs).examples
    for one, two in zip(score(loaded, examples), [score(loaded, [e])[0] for e in examples], strict=True):
        assert one is not None and two is not None
        assert one.log_probs == pytest.approx(two.log_probs, abs=1e-3)


def test_limit_takes_the_first_rows(learned: Loaded, pairs: str) -> None:
    result = evaluate_file(learned, pairs, limit=3)
    assert result["rows"] == 3 and result["metrics"]["exact_match"] == 1.0
    assert (result["target"], result["data"]) == ("base:tiny", pairs)


def test_text_rows_have_a_perplexity_only(learned: Loaded, tmp_path: Path) -> None:
    path = write(tmp_path / "text.jsonl", [{"text": "the quick brown fox"}, {"text": "lazy dogs"}])
    assert set(evaluate_file(learned, path)["metrics"]) == {"perplexity"}


def test_only_the_last_answer_of_a_conversation_must_match(learned: Loaded, tmp_path: Path) -> None:
    turns = [{"role": role, "content": text} for role, text in (("user", "x"), ("assistant", "never said by it"))]
    question, answer = PAIRS[2]
    messages = [*turns, {"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    example = read_examples(write(tmp_path / "turns.jsonl", [{"messages": messages}])).examples[0]
    (scored,) = score(learned, [example])
    assert scored is not None and scored.start > 0
    assert learned.tokenizer.decode(scored.answer[0], skip_special_tokens=True) == answer


def test_progress_is_drawn_on_stderr_when_asked(
    learned: Loaded, pairs: str, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate_file(learned, pairs)
    assert capsys.readouterr().err == ""
    evaluate_file(learned, pairs, progress=True)
    shown = capsys.readouterr()
    assert "6/6" in shown.err and shown.out == ""


def test_a_missing_file_is_an_error_of_the_data(learned: Loaded) -> None:
    with pytest.raises(DataError, match=r"nowhere\.jsonl"):
        evaluate_file(learned, "nowhere.jsonl")
