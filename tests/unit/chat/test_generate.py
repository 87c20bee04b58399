"""Chat: what is generated, streamed and recorded."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._dynamo.utils import counters
from transformers import CompileConfig

from mole.chat.generate import Step, cut_at, generate, held_back, stream
from mole.chat.settings import ChatSettings
from mole.chat.tokens import TokenTexts, answer_ends, prompt_ids
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


def transformers_reply(loaded: Loaded, tokens: int, **settings: Any) -> list[int]:
    """What transformers' own `generate` answers to HELLO, without the end token; greedy unless set."""
    prompt = prompt_ids(HELLO, loaded.tokenizer)
    stop = answer_ends(loaded.tokenizer, loaded.model).ids
    with torch.no_grad():
        output = loaded.model.generate(
            input_ids=torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=tokens,
            eos_token_id=list(stop),
            **{"do_sample": False, **settings},
        )
    return [token for token in output[0, len(prompt) :].tolist() if token not in stop]


def ours(loaded: Loaded, settings: ChatSettings, record: bool = False) -> list[int]:
    """The reply's token ids."""
    steps = list(stream(loaded, HELLO, settings, record))
    return [token for step in steps for token, _ in step.tokens][steps[0].prompt_tokens :]


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_greedy_is_transformers_greedy(arch: str, use_cache: bool, tiny_model: Any, tiny_tokenizer: Any) -> None:
    loaded = Loaded(tiny_model(arch), tiny_tokenizer, "base:tiny", "tiny")
    assert ours(loaded, ChatSettings(24), record=False) == transformers_reply(loaded, 24, use_cache=use_cache)


@pytest.mark.parametrize("use_cache", [True, False])
def test_greedy_with_an_adapter_is_the_same_with_and_without_cache_and_recorder(
    routed: Loaded, use_cache: bool
) -> None:
    recorded = ours(routed, ChatSettings(24), record=True)
    assert recorded == ours(routed, ChatSettings(24), record=False)
    assert recorded == transformers_reply(routed, 24, use_cache=use_cache)


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 3.0}, {"top_k": 5}, {"top_p": 0.3}, {"min_p": 0.9}, {"repetition_penalty": 30.0},
        {"temperature": 0.7, "top_k": 40, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.2},
    ],
)  # fmt: skip
def test_a_seed_draws_what_torch_draws_with_it_and_the_settings_do_what_they_do_in_transformers(
    settings: dict[str, float], base: Loaded
) -> None:
    settings = {"temperature": 1.0, **settings}
    torch.manual_seed(11)
    theirs = transformers_reply(base, 24, do_sample=True, **{"top_k": 0, **settings})
    assert ours(base, ChatSettings(24, seed=11, **settings)) == theirs  # type: ignore[arg-type]
    assert ours(base, ChatSettings(24, seed=11, temperature=1.0)) != theirs


def test_a_repetition_penalty_without_sampling_is_transformers_too(base: Loaded) -> None:
    penalised = ours(base, ChatSettings(24, repetition_penalty=1.5))
    assert penalised == transformers_reply(base, 24, repetition_penalty=1.5)
    assert penalised != ours(base, ChatSettings(24))


def test_what_a_models_own_generation_config_samples_has_no_part_in_a_reply(
    base: Loaded, capfd: pytest.CaptureFixture[str]
) -> None:
    plain = ours(base, ChatSettings(12))
    base.model.generation_config.update(
        do_sample=True, temperature=0.6, top_k=20, top_p=0.8, repetition_penalty=1.3, num_beams=3, use_cache=False,
        max_length=40, num_return_sequences=3,
    )  # fmt: skip
    assert ours(base, ChatSettings(12), record=True) == plain
    assert capfd.readouterr() == ("", ""), "transformers says nothing on the side"


@pytest.mark.parametrize("compiled", [False, True])
def test_a_static_cache_as_a_model_may_ask_for_changes_neither_reply_nor_routing(
    routed: Loaded, compiled: bool
) -> None:
    """On a GPU transformers compiles the forward pass of such a model: one graph must do for all tokens."""
    plain = list(stream(routed, HELLO, ChatSettings(12)))
    config = routed.model.generation_config
    config.cache_implementation = "static"
    if compiled:
        config.compile_config = CompileConfig(backend="eager", mode=None)
        config.compile_config._compile_all_devices = True
    torch._dynamo.reset()
    counters.clear()
    try:
        other = list(stream(routed, HELLO, ChatSettings(12)))
    finally:
        config.cache_implementation = config.compile_config = None
        torch._dynamo.reset()
    assert counters["stats"]["unique_graphs"] == int(compiled) and not counters["graph_break"]
    assert [step.tokens for step in other] == [step.tokens for step in plain]
    assert plain[-1].trace is not None and other[-1].trace is not None
    torch.testing.assert_close(other[-1].trace.weights, plain[-1].trace.weights, rtol=0, atol=1e-5)


def test_a_window_shorter_than_the_conversation_is_kept_to(tiny_model: Any, tiny_tokenizer: Any) -> None:
    model, long = tiny_model("gemma3"), [{"role": "user", "content": HELLO[0]["content"] * 5}]
    prompt = prompt_ids(long, tiny_tokenizer)
    assert len(prompt) > model.config.sliding_window
    *_, last = stream(Loaded(model, tiny_tokenizer, "base:tiny", "tiny"), long, ChatSettings(12), record=False)
    whole = torch.tensor([prompt])
    for _ in range(12):  # without any cache
        with torch.no_grad():
            whole = torch.cat([whole, model(whole).logits[:, -1].argmax(-1, keepdim=True)], 1)
    assert last.text == tiny_tokenizer.decode(whole[0, len(prompt) :], skip_special_tokens=True)


def test_a_stop_string_ends_the_reply_before_it_and_every_token_read_has_its_routing(routed: Loaded) -> None:
    whole = list(stream(routed, HELLO, ChatSettings(24)))
    text = whole[-1].text
    stop = text[len(text) // 2 : len(text) // 2 + 3]  # in the middle of the reply, and of its tokens
    steps = list(stream(routed, HELLO, ChatSettings(24, stop_strings=["never said", stop])))
    assert steps[-1].text == text[: text.index(stop)] and steps[-1].finished
    assert len(steps) < len(whole)
    shown = [step.text for step in steps]
    assert all(later.startswith(earlier) for earlier, later in pairwise(shown))
    trace = steps[-1].trace
    assert trace is not None and len(trace) == sum(len(step.tokens) for step in steps)


def test_what_may_become_a_stop_string_is_held_back_until_it_is_known(base: Loaded) -> None:
    steps = list(stream(base, HELLO, ChatSettings(8)))
    last = steps[-2].text  # of the reply's last token
    unfinished = [f"{last[-2:]} and on"]
    held = list(stream(base, HELLO, ChatSettings(8, stop_strings=unfinished)))
    assert held[-2].text == last[:-2]
    assert held[-1].text == steps[-1].text


@given(st.text("ab", max_size=12), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_stop_strings_cut_where_the_first_of_them_begins(text: str, stops: list[str]) -> None:
    begun = [place for place in range(len(text)) if any(text[place:].startswith(stop) for stop in stops)]
    assert cut_at(text, stops) == ((text[: begun[0]], True) if begun else (text, False))
    held = held_back(text, stops)
    could = [
        size for size in range(len(text) + 1) if any(text[len(text) - size :] == stop[:size] != stop for stop in stops)
    ]
    assert held == max(could, default=0)


def test_thinking_is_asked_of_the_template_and_a_thought_it_begins_is_part_of_the_reply(
    base: Loaded, tiny_tokenizer: Any
) -> None:
    import copy

    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = (
        "{% for message in messages %}{{ message.content }}{% endfor %}{% if add_generation_prompt %}"
        "{% if enable_thinking %}<think>\n{% else %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
    )
    loaded = Loaded(base.model, tokenizer, "base:tiny", "tiny")

    def first_and_last(settings: ChatSettings) -> tuple[Step, Step]:
        first, *_, last = stream(loaded, HELLO, settings)
        return first, last

    first, last = first_and_last(ChatSettings(4, enable_thinking=True))
    assert "".join(text for _, text in first.tokens).endswith("longest?<think>\n")
    assert first.text == "<think>\n" and last.text.startswith("<think>\n")
    first, last = first_and_last(ChatSettings(4))
    assert "".join(text for _, text in first.tokens).endswith("</think>\n\n") and first.text == ""
    with pytest.raises(
        ConfigError, match="enable_thinking is True; it must be false with this model: its chat template"
    ):
        next(stream(base, HELLO, ChatSettings(4, enable_thinking=True)))


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
    assert answer_ends(tokenizer, model).ids == {
        tokenizer.eos_token_id,
        tiny_tokenizer.convert_tokens_to_ids("<|im_end|>"),
    }


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


@pytest.mark.parametrize(
    "setting, value",
    [
        ("max_new_tokens", 0), ("temperature", -0.1), ("top_p", 1.5), ("top_p", 0), ("top_k", -1), ("top_k", 1.5),
        ("min_p", 1.1), ("repetition_penalty", 0), ("stop_strings", [""]), ("stop_strings", ["a"] * 17), ("seed", -1),
        ("stop_strings", [1]), ("enable_thinking", "perhaps"),
    ],
)  # fmt: skip
def test_a_setting_out_of_range_is_named(setting: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"^{setting} is .*; it must be "):
        ChatSettings(**{setting: value})


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


def note(reads: list[list[int]], read: list[int]) -> bool:
    """A `go_on` that keeps what was read."""
    reads.append(read)
    return True


def test_generate_does_not_read_the_last_token_unless_asked(base: Loaded) -> None:
    calls = []
    base.model.register_forward_hook(lambda *_: calls.append(1))
    for read_last, passes in ((False, 3), (True, 4)):
        calls.clear()
        reads: list[list[int]] = []
        generate(base.model, [5, 6, 7], ChatSettings(3), set(), 100, partial(note, reads), read_last)
        assert len(calls) == passes and [len(read) for read in reads] == [3, 1, 1, 1]


@pytest.mark.model
def test_the_embedded_model_answers_sensibly(embedded: Any) -> None:
    loaded = Loaded(embedded.model, embedded.tokenizer, "base:smollm2-135m", "smollm2-135m")
    *_, last = stream(loaded, [{"role": "user", "content": "What is the capital of France?"}], ChatSettings(16))
    assert last.text == "The capital of France is Paris."
