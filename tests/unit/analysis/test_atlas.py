"""An atlas of tiny models: what is planted in a router is found again, exactly; recording changes nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapting import adapt

from mole import record_routing
from mole.analysis.atlas import build_atlas, read_corpus
from mole.analysis.atlas.corpus import Corpus
from mole.analysis.atlas.muting import experts_of_layers, measure_muting, row_losses, sample_size
from mole.analysis.atlas.recorder import BatchRecorder
from mole.analysis.atlas.segments import PARTS, TokenRow, encode_rows, length_batches
from mole.analysis.atlas.survey import chunks_of, survey, take_census
from mole.core.errors import ConfigError, DataError, ModelError
from mole.data import Example
from mole.evaluation.evaluate import evaluate_examples
from mole.mixture.routing_log import find_log
from mole.mixture.steering import Steering, steer
from mole.mixture.trace import active_routers
from mole.models.loading import Loaded

EXPERTS = 4
SKILLS = ("sort", "tone", "units", "json")


def loaded_of(model: Any, tokenizer: Any, router: str = "topk") -> Loaded:
    return Loaded(model, tokenizer, "planted", "tiny", router)


def corpus_of(texts: list[str], **columns: list[str]) -> Corpus:
    examples = [Example(text=text, row=number) for number, text in enumerate(texts, start=1)]
    return Corpus(examples, columns, "rows.jsonl", "0" * 64)


@pytest.fixture
def planted(tiny_model: Callable[..., Any], tiny_tokenizer: Any) -> Loaded:
    """A router of layer 0 that gives each token to the expert `id % 4`, whatever stands before it."""
    model = adapt(
        tiny_model(), "topk", num_experts=EXPERTS, top_k=1, target_modules=["q_proj"], layers_to_transform=[0]
    )
    base = model.get_base_model()
    with torch.no_grad():
        embeddings = base.get_input_embeddings().weight
        embeddings.mul_(0.01)
        embeddings[torch.arange(len(embeddings)), torch.arange(len(embeddings)) % EXPERTS] = 1.0
        for name, weight in model.named_parameters():
            if "gate" in name:
                weight.zero_()
                weight[range(EXPERTS), range(EXPERTS)] = 10.0
    return loaded_of(model, tiny_tokenizer)


def variable(atlas: dict[str, Any], name: str) -> dict[str, Any]:
    return next(one for one in atlas["variables"] if one["name"] == name)


def test_a_router_that_goes_by_the_token_is_recovered_exactly(planted: Loaded) -> None:
    texts = ["The quick brown fox jumps over the lazy dog.", "0 1 2 3 4 5 6 7", "user assistant system", "Paris?"] * 6
    atlas = build_atlas(planted, corpus_of(texts), samples=False)
    ids = [token for text in texts for token in planted.tokenizer(text + "<|im_end|>")["input_ids"]]
    (projection,) = atlas["projections"]
    used = Counter(token % EXPERTS for token in ids)
    assert atlas["tokens"] == len(ids)
    assert projection["usage"] == [round(used[expert] / len(ids), 4) for expert in range(EXPERTS)]
    assert projection["coactivation"] == [[float(i == j) for j in range(EXPERTS)] for i in range(EXPERTS)]
    tokens = variable(atlas, "token")["specialisation"]
    assert tokens["share"] == [1.0] and tokens["clear"] == [True]
    counts = Counter(ids)
    for expert in range(EXPERTS):
        own = [token for token, n in counts.most_common() if token % EXPERTS == expert and n >= 5][:10]
        found = projection["vocabulary"][expert]
        assert [one["count"] for one in found] == [counts[token] for token in own]
        assert all(one["lift"] == pytest.approx(len(ids) / used[expert], abs=0.006) for one in found)
        allowed = {planted.tokenizer.decode([token]) for token in counts if token % EXPERTS == expert}
        assert {one["token"] for one in found} <= allowed
        for context in projection["contexts"][expert]:
            assert context["weight"] == 1 and context["token"] in allowed
            whole = texts[context["row"] - 1] + "<|im_end|>"
            assert context["before"] + context["token"] + context["after"] in whole


def test_a_router_that_goes_by_the_skill_is_recovered_exactly(planted: Loaded) -> None:
    """Rows of a skill have only tokens of one expert, so the skill tells the expert, and the other way round."""
    tokenizer = planted.tokenizer
    alone = [(token, tokenizer.decode([token])) for token in range(3, 256)]
    alone = [(token, text) for token, text in alone if text.isalnum() and tokenizer(text)["input_ids"] == [token]]
    texts, skills = [], []
    for expert, skill in enumerate(SKILLS):
        texts += [text for token, text in alone if token % EXPERTS == expert][:10]
        skills += [skill] * (len(texts) - len(skills))
    atlas = build_atlas(planted, corpus_of(texts, skill=skills), samples=False)
    found = variable(atlas, "skill")
    assert sorted(found["values"]) == sorted(SKILLS) and found["specialisation"]["clear"] == [True]
    end = tokenizer.eos_token_id % EXPERTS  # each row ends with the same token: half of all tokens
    for place, name in enumerate(found["values"]):
        expected = [0.0] * (EXPERTS + 1)
        expected[SKILLS.index(name)] += 0.5
        expected[end] += 0.5
        assert found["matrix"][0][place] == expected


def test_noise_in_a_column_is_not_clear_in_any_projection(tiny_model: Callable[..., Any], tiny_tokenizer: Any) -> None:
    model = adapt(tiny_model(), "dynmole", num_experts=EXPERTS)
    generator = torch.Generator().manual_seed(0)
    words = [f"word{number}" for number in range(14)]
    texts = [" ".join(words[i] for i in torch.randint(0, 14, (12,), generator=generator)) for _ in range(80)]
    noise = [str(value) for value in torch.randint(0, 3, (80,), generator=generator).tolist()]
    atlas = build_atlas(loaded_of(model, tiny_tokenizer, "dynmole"), corpus_of(texts, noise=noise), samples=False)
    found = variable(atlas, "noise")["specialisation"]
    assert len(found["clear"]) == 14 and not any(found["clear"]) and all(bits > 0 for bits in found["bits"])
    assert all(variable(atlas, "token")["specialisation"]["clear"])


# ---------------------------------------------------------------------------------------------------------
# Recording


@pytest.mark.parametrize("router", ["topk", "dynmole", "adamole"])
@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_a_batch_is_routed_as_its_rows_are_one_by_one(
    tiny_model: Callable[..., Any], tiny_tokenizer: Any, arch: str, router: str
) -> None:
    loaded = loaded_of(adapt(tiny_model(arch), router), tiny_tokenizer, router)
    rows = [[5, 9, 300, 12, 44, 8, 21], [7, 7, 30], [200, 5, 61, 90, 4]]
    recorder = BatchRecorder(loaded)
    with recorder.recording():
        together = recorder.route(rows)
    with torch.no_grad(), record_routing(loaded.model) as trace:
        for row in rows:
            loaded.model(input_ids=torch.tensor([row]))
    assert [one.name for one in recorder.projections] == trace.modules
    torch.testing.assert_close(together.weights, trace.weights, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(together.entropy, trace.entropy, rtol=1e-4, atol=1e-5)


def test_evaluation_figures_are_the_same_while_an_atlas_records(
    tiny_model: Callable[..., Any], tiny_tokenizer: Any
) -> None:
    loaded = loaded_of(adapt(tiny_model(), "dynmole"), tiny_tokenizer, "dynmole")
    rows = [({"role": "user", "content": f"Sort {n}"}, {"role": "assistant", "content": f"{n} 1"}) for n in range(6)]
    examples = [Example(messages, row=1) for messages in rows]
    before = evaluate_examples(loaded, examples)
    with BatchRecorder(loaded).recording():
        during = evaluate_examples(loaded, examples)
    build_atlas(loaded, Corpus(examples))
    assert before == during == evaluate_examples(loaded, examples)


@pytest.mark.parametrize("part", ["Reading", "Routing", "Muting"])
def test_what_a_report_raises_ends_the_work_and_leaves_the_model_as_it_was(planted: Loaded, part: str) -> None:
    def interrupt(what: str, done: int, total: int) -> None:
        if what == part:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_atlas(planted, corpus_of(["yes no", "true false", "pear"]), report=interrupt)
    log = find_log(planted.model)
    assert log is not None and log.recordings == []
    assert all(router.allowed is None for _, router in active_routers(planted.model))


def test_the_same_seed_gives_the_same_atlas(planted: Loaded) -> None:
    corpus = corpus_of(["yes no true false", "apple pear fig", "0 1 2 3"], skill=["a", "b", "a"])
    assert build_atlas(planted, corpus, seed=3) == build_atlas(planted, corpus, seed=3)


# ---------------------------------------------------------------------------------------------------------
# Rows


def test_the_parts_of_a_row_are_its_contents_its_answer_and_what_the_template_writes(tiny_tokenizer: Any) -> None:
    messages = [("system", "Be brief."), ("user", "Sort: pear, apple."), ("assistant", "apple, pear")]
    example = Example(tuple({"role": role, "content": content} for role, content in messages))
    (row,) = encode_rows([example], [0], tiny_tokenizer, 512)
    assert isinstance(row, TokenRow)
    parts: dict[str, str] = dict.fromkeys(PARTS, "")
    for token, part in zip(row.ids, row.parts, strict=True):
        parts[PARTS[part]] += tiny_tokenizer.decode([token])
    assert parts["prompt"] == "Be brief.Sort: pear, apple." and parts["text"] == ""
    assert parts["answer"].strip() == "apple, pear"
    assert parts["template"].startswith("<|im_start|>system\n<|im_end|>\n<|im_start|>user")


def test_a_row_that_is_too_long_is_cut_as_in_training_and_keeps_its_parts(tiny_tokenizer: Any) -> None:
    example = Example(({"role": "user", "content": "fox " * 60}, {"role": "assistant", "content": "yes"}))
    (row,) = encode_rows([example], [0], tiny_tokenizer, 40)
    assert isinstance(row, TokenRow) and row.encoded.truncated and len(row.parts) == len(row.ids) == 40
    counts = Counter(PARTS[part] for part in row.parts)
    assert counts["prompt"] > 5 and counts["answer"] >= 1 and counts["template"] >= 5


def test_no_chunk_is_left_with_one_row() -> None:
    chunks = chunks_of(range(257), 256)
    assert [len(chunk) for chunk in chunks] == [128, 129]


# ---------------------------------------------------------------------------------------------------------
# Muting


def test_muting_an_expert_is_as_if_its_layer_did_not_have_it(
    tiny_model: Callable[..., Any], tiny_tokenizer: Any
) -> None:
    loaded = loaded_of(adapt(tiny_model(), "topk", num_experts=3), tiny_tokenizer)
    texts = ["The quick brown fox", "0 1 2 3 4 5", "what is the capital", "yes no true false of"]
    rows = [
        row for row in encode_rows(corpus_of(texts).examples, range(4), tiny_tokenizer, 64) if isinstance(row, TokenRow)
    ]
    rows.sort(key=lambda row: len(row.ids))
    recorder = BatchRecorder(loaded)
    with recorder.recording():
        recorder.route([rows[0].ids])
    batches = list(length_batches([len(row.ids) for row in rows], 30))
    loss, muted = measure_muting(loaded, recorder.projections, rows, batches, lambda done, total: None)
    assert [(one.layer, one.expert) for one in muted] == [(layer, expert) for layer in (0, 1) for expert in (0, 1, 2)]
    usual = torch.cat([row_losses(loaded, [row]) for row in rows])
    assert loss == pytest.approx(float(usual.mean()), rel=1e-5)
    inside = {one.name for one in recorder.projections if one.layer == 1}
    with steer(loaded.model, Steering(pinned=frozenset({0, 2})), inside):
        more = torch.cat([row_losses(loaded, [row]) for row in rows]) - usual
    assert muted[4].increase == pytest.approx(float(more.mean()), abs=1e-5) and muted[4].error > 0
    assert any(abs(one.increase) > 1e-3 for one in muted)
    assert all(one.clear == (abs(one.increase) > 6 * one.error) for one in muted)
    assert torch.equal(torch.cat([row_losses(loaded, [row]) for row in rows]), usual)  # the model is as before


def test_the_sample_is_small_enough_to_be_read_once_for_each_expert() -> None:
    assert sample_size([100] * 64, 240) == 4 and sample_size([100] * 64, 8) == 64
    assert experts_of_layers([]) == []


# ---------------------------------------------------------------------------------------------------------
# Bad input: one line each


def rows_file(folder: Path, rows: list[dict[str, Any]]) -> str:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_a_column_that_is_not_there_is_named_with_those_that_are(tmp_path: Path) -> None:
    path = rows_file(tmp_path, [{"text": "a", "skill": "x"}] * 2)
    with pytest.raises(DataError, match=r"has no column 'skil' \(--by\); its columns: text, skill\.$"):
        read_corpus(path, by=["skil"])
    with pytest.raises(ConfigError, match="at most 8 columns"):
        read_corpus(path, by=list("abcdefghi"))


def test_a_corpus_of_one_row_or_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has one usable row; an atlas needs at least 2 rows"):
        read_corpus(rows_file(tmp_path, [{"text": "a"}]))
    with pytest.raises(DataError, match="is empty"):
        read_corpus(rows_file(tmp_path, []))


def test_rows_of_which_the_model_can_be_given_one_are_refused(planted: Loaded) -> None:
    examples = [Example(({"role": "user", "content": "a"}, {"role": "assistant", "content": ""})), Example(text="a")]
    with pytest.raises(DataError, match="one row that the model can be given"):
        build_atlas(planted, Corpus([examples[1], Example(text="")], source="rows.jsonl"))


@pytest.mark.parametrize("router", ["none", "lora"])
def test_a_target_without_a_router_is_refused(tiny_model: Callable[..., Any], tiny_tokenizer: Any, router: str) -> None:
    model = tiny_model() if router == "none" else adapt(tiny_model(), "lora", num_experts=1)
    with pytest.raises(ModelError, match="planted has no routed adapter") as error:
        build_atlas(loaded_of(model, tiny_tokenizer, router), corpus_of(["a", "b"]))
    assert "\n" not in str(error.value)


def test_values_of_a_column_are_short_texts_and_missing_ones_are_said(tmp_path: Path) -> None:
    rows = [
        {"text": "a", "tag": "x\ny"},
        {"text": "b"},
        {"text": "c", "tag": {"k": [1]}},
        {"text": "d", "tag": "z" * 99},
    ]
    found = read_corpus(rows_file(tmp_path, rows), by=["tag"]).columns["tag"]
    assert found[:3] == ["x y", "(none)", '{"k": [1]}'] and len(found[3]) == 60


# ---------------------------------------------------------------------------------------------------------
# Memory


def bytes_of(value: Any, seen: set[int]) -> int:
    """The bytes of all tensors that an object reaches through attributes, dictionaries and lists, each once."""
    if id(value) in seen:
        return 0
    seen.add(id(value))
    if isinstance(value, torch.Tensor):
        return value.untyped_storage().nbytes()
    if isinstance(value, dict):
        return sum(bytes_of(item, seen) for item in value.values())
    if isinstance(value, (list, tuple)):
        return sum(bytes_of(item, seen) for item in value)
    return sum(bytes_of(item, seen) for item in getattr(value, "__dict__", {}).values())


def test_what_is_kept_does_not_grow_with_the_number_of_rows(planted: Loaded) -> None:
    texts = ["The quick brown fox", "yes no true false", "0 1 2 3 4 5 6 7"]
    kept = []
    for rows in (30, 300):
        corpus = corpus_of(texts * (rows // 3))
        found = survey(corpus, planted, take_census(corpus, planted, 64, 0), 64)
        kept.append(bytes_of(found, set()))
        assert found.activity.tokens > 5 * rows
    assert kept[0] == kept[1] > 10_000


MEASURE = """
import resource, sys, torch
sys.path[:0] = [{tests!r}]
from transformers import AutoModelForCausalLM, AutoTokenizer
from adapting import adapt
from mole.analysis.atlas import build_atlas
from mole.analysis.atlas.corpus import Corpus
from mole.data import Example
from mole.models.loading import Loaded

model = adapt(AutoModelForCausalLM.from_pretrained({base!r}), "topk", num_experts=8, top_k=2)
loaded = Loaded(model, AutoTokenizer.from_pretrained({base!r}), "tiny", "tiny", "topk")
words = "pear apple fig quick brown fox lazy dog user system yes no true false".split()
def atlas(rows):
    examples = [Example(text=" ".join(words[(row * k) % 14] for k in range(1, 9)), row=row) for row in range(rows)]
    build_atlas(loaded, Corpus(examples, {{"skill": [str(row % 5) for row in range(rows)]}}), samples=False)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
few, many = atlas({few}), atlas({many})
print(few, many)
sys.exit(many - few > 64)
"""


@pytest.mark.soak
def test_ten_thousand_rows_take_little_more_memory_than_a_thousand(tiny_folder: Path) -> None:
    """At most 64 MB more, the rows' own text among them."""
    code = MEASURE.format(tests=str(Path(__file__).parents[2]), base=str(tiny_folder), few=1_000, many=10_000)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
