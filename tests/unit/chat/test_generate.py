"""Chat: what is generated, streamed and recorded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mole.chat.generate import ChatSettings, TokenTexts, generate, prompt_ids, stop_ids, stream
from mole.config import ModelConfig
from mole.core.errors import ConfigError, InputError
from mole.models.loading import Loaded
from mole.runs.targets import load_target

ARCHITECTURES = ["llama", "qwen3", "gemma3", "gpt2", "phi"]
HELLO = [{"role": "user", "content": "Which of these words is the longest?"}]
CPU = ModelConfig(device="cpu", dtype="float32")


@pytest.fixture
def base(tiny_model: Any, tiny_tokenizer: Any) -> Loaded:
    """A random base model."""
    return Loaded(tiny_model("llama"), tiny_tokenizer, "base:tiny", "tiny")


@pytest.fixture(scope="module")
def routed(tiny_adapter: Path) -> Loaded:
    """A random base model with a random dynmole adapter."""
    return load_target(str(tiny_adapter), CPU)


def transformers_greedy(loaded: Loaded, tokens: int, use_cache: bool) -> list[int]:
    """What transformers' own `generate` answers to HELLO, without the end token."""
    prompt = prompt_ids(HELLO, loaded.tokenizer)
    stop = stop_ids(loaded.model, loaded.tokenizer)
    with torch.no_grad():
        output = loaded.model.generate(
            input_ids=torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            do_sample=False,
            max_new_tokens=tokens,
            eos_token_id=list(stop),
            use_cache=use_cache,
        )
    return [token for token in output[0, len(prompt) :].tolist() if token not in stop]


def ours(loaded: Loaded, settings: ChatSettings, record: bool) -> list[int]:
    """The reply's token ids."""
    steps = list(stream(loaded, HELLO, settings, record))
    return [token for step in steps for token, _ in step.tokens][steps[0].prompt_tokens :]


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_greedy_is_transformers_greedy(arch: str, use_cache: bool, tiny_model: Any, tiny_tokenizer: Any) -> None:
    loaded = Loaded(tiny_model(arch), tiny_tokenizer, "base:tiny", "tiny")
    assert ours(loaded, ChatSettings(24), record=False) == transformers_greedy(loaded, 24, use_cache)


@pytest.mark.parametrize("use_cache", [True, False])
def test_greedy_with_an_adapter_is_the_same_with_and_without_cache_and_recorder(
    routed: Loaded, use_cache: bool
) -> None:
    recorded = ours(routed, ChatSettings(24), record=True)
    assert recorded == ours(routed, ChatSettings(24), record=False)
    assert recorded == transformers_greedy(routed, 24, use_cache)


def test_routing_covers_exactly_the_tokens_it_comes_with(routed: Loaded) -> None:
    steps = list(stream(routed, HELLO, ChatSettings(6)))
    for step in steps:
        assert step.routing is not None
        assert step.routing.weights.shape == (len(step.tokens), 2, 3)
        assert step.routing.entropy.shape == step.routing.active.shape == (len(step.tokens), 2)
    assert len(steps[0].tokens) == steps[0].prompt_tokens == len(prompt_ids(HELLO, routed.tokenizer))
    assert [len(step.tokens) for step in steps[1:]] == [1] * 6 + [0]
    assert [step.finished for step in steps] == [False] * 7 + [True]


def test_a_token_has_the_routing_it_has_when_all_is_read_at_once(routed: Loaded) -> None:
    steps = list(stream(routed, HELLO, ChatSettings(8)))
    trace, ids = steps[-1].trace, [token for step in steps for token, _ in step.tokens]
    assert trace is not None and len(trace) == len(ids) == steps[-1].prompt_tokens + 8
    from mole import record_routing

    with record_routing(routed.model) as whole, torch.no_grad():
        routed.model(input_ids=torch.tensor([ids]))
    torch.testing.assert_close(trace.weights, whole.weights, rtol=0, atol=1e-5)


def test_a_base_model_has_no_routing_but_answers(base: Loaded) -> None:
    steps = list(stream(base, HELLO, ChatSettings(4)))
    trace, tokens = steps[-1].trace, [text for step in steps for _, text in step.tokens]
    assert trace is not None and trace.router == "none" and trace.layers == 0
    assert steps[-1].text == "".join(tokens[steps[-1].prompt_tokens :])
    assert all(step.trace is None for step in stream(base, HELLO, ChatSettings(4), record=False))


def test_the_reply_ends_at_the_end_token_which_is_not_shown(base: Loaded) -> None:
    first = ours(base, ChatSettings(5), record=False)
    base.model.generation_config.eos_token_id = [first[2], base.tokenizer.eos_token_id]
    assert ours(base, ChatSettings(5), record=False) == first[: first.index(first[2])]


def test_the_end_of_turn_the_template_writes_ends_the_reply_too(tiny_model: Any, tiny_tokenizer: Any) -> None:
    import copy

    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.eos_token = "<|endoftext|>"  # as in base models whose template ends turns with another token
    model = tiny_model("llama")
    model.generation_config.eos_token_id = None
    assert stop_ids(model, tokenizer) == {tokenizer.eos_token_id, tiny_tokenizer.convert_tokens_to_ids("<|im_end|>")}


def test_sampling_is_a_function_of_its_seed_and_leaves_the_global_generator_alone(base: Loaded) -> None:
    def draw(seed: int, **settings: float) -> list[int]:
        return ours(base, ChatSettings(12, seed=seed, **{"temperature": 2.0, **settings}), record=False)

    torch.manual_seed(0)
    before = torch.get_rng_state()
    one = draw(1)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(5)
    assert draw(1) == one != draw(2)


def test_a_small_top_p_leaves_only_the_greedy_token(base: Loaded) -> None:
    sampled = ours(base, ChatSettings(12, temperature=1.0, top_p=1e-6, seed=3), record=False)
    assert sampled == ours(base, ChatSettings(12), record=False)


def test_should_stop_ends_the_stream_with_what_there_is(base: Loaded) -> None:
    asked = iter([False, False, True])
    steps = list(stream(base, HELLO, ChatSettings(50), should_stop=lambda: next(asked)))
    assert [len(step.tokens) for step in steps[1:]] == [1, 1, 0]
    assert steps[-1].finished and steps[-1].text == steps[-2].text


def test_an_abandoned_stream_stops_recording(routed: Loaded) -> None:
    going = stream(routed, HELLO, ChatSettings(50))
    trace = next(going).trace
    going.close()
    assert trace is not None
    before = len(trace)
    ours(routed, ChatSettings(2), record=True)
    assert len(trace) == before


def test_a_conversation_longer_than_the_context_is_refused(base: Loaded) -> None:
    long = [{"role": "user", "content": "word " * 600}]
    with pytest.raises(InputError, match=r"tokens, and tiny takes 512 .* shorten it"):
        next(stream(base, long))


def test_the_reply_keeps_within_the_context(base: Loaded) -> None:
    base.model.config.max_position_embeddings = len(prompt_ids(HELLO, base.tokenizer)) + 3
    assert len(ours(base, ChatSettings(50), record=False)) <= 3


@pytest.mark.parametrize("setting, value", [("max_new_tokens", 0), ("temperature", -0.1), ("top_p", 1.5), ("top_p", 0)])
def test_a_setting_out_of_range_is_named(setting: str, value: float) -> None:
    with pytest.raises(ConfigError, match=setting):
        ChatSettings(**{setting: value})  # type: ignore[arg-type]


@given(st.text(max_size=40))
def test_token_texts_put_together_are_the_text(tiny_tokenizer: Any, text: str) -> None:
    ids = tiny_tokenizer(text, add_special_tokens=False)["input_ids"]
    pieces = TokenTexts(tiny_tokenizer).push(ids)
    assert "".join(piece for _, piece in pieces) == text.rstrip("\ufffd")
    assert [token for token, _ in pieces] == ids


def test_a_character_of_several_tokens_is_never_shown_in_part(tiny_model: Any, tiny_tokenizer: Any) -> None:
    """A model made to write 🎉 byte by byte: every text on the way holds whole characters only."""
    party = tiny_tokenizer("ab🎉é", add_special_tokens=False)["input_ids"]
    prompt = prompt_ids(HELLO, tiny_tokenizer)
    model = tiny_model("llama")

    def write(module: Any, args: Any, kwargs: Any, output: Any) -> Any:
        step = output.past_key_values.get_seq_length() - len(prompt)
        output.logits[:] = 0.0
        output.logits[..., (*party, tiny_tokenizer.eos_token_id)[step]] = 1.0
        return output

    model.register_forward_hook(write, with_kwargs=True)
    loaded = Loaded(model, tiny_tokenizer, "base:tiny", "tiny")
    shown = [step.text for step in stream(loaded, HELLO)]
    assert shown[-1] == "ab🎉é"
    assert all("ab🎉é".startswith(text) for text in shown)


def test_generate_does_not_read_the_last_token_unless_asked(base: Loaded) -> None:
    calls = []
    base.model.register_forward_hook(lambda *_: calls.append(1))
    for read_last, passes in ((False, 3), (True, 4)):
        calls.clear()
        list(generate(base.model, [5, 6, 7], ChatSettings(3), set(), context_left=100, read_last=read_last))
        assert len(calls) == passes


@pytest.mark.model
def test_the_embedded_model_answers_sensibly(embedded: Any) -> None:
    loaded = Loaded(embedded.model, embedded.tokenizer, "base:smollm2-135m", "smollm2-135m")
    *_, last = stream(loaded, [{"role": "user", "content": "What is the capital of France?"}], ChatSettings(16))
    assert last.text == "The capital of France is Paris."
