"""Streams replies token by token, with the routing of every token."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

from mole.config import coerce
from mole.core.errors import ConfigError, InputError
from mole.data import Example, Message, encode_example, render_prompt
from mole.mixture.steering import AS_TRAINED, Steering, steer
from mole.mixture.trace import RoutingDelta, Trace, record_routing
from mole.models.loading import STATES, Loaded
from mole.models.logits import base_model

ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}
"""Kinds of layers that keep keys and values of tokens, and nothing else."""
GREEDY = 1e-4
"""Temperatures below this are greedy: the most likely token is certain, and dividing by them would overflow."""


@dataclass(frozen=True)
class ChatSettings:
    """How the next token is chosen.

    Attributes:
        max_new_tokens: maximum length of the reply, in tokens.
        temperature: 0 takes the most likely token (greedy); larger values sample from a flatter distribution.
        top_p: nucleus sampling: sample from the smallest set of tokens with at least this total probability.
        seed: seed of the sampling.

    Raises `ConfigError` for a value out of range.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, kind in (("max_new_tokens", int), ("temperature", float), ("top_p", float), ("seed", int)):
            object.__setattr__(self, name, coerce(kind, getattr(self, name), name))
        if self.max_new_tokens < 1:
            raise ConfigError("max_new_tokens", self.max_new_tokens, "a whole number of at least 1")
        if self.temperature < 0:
            raise ConfigError("temperature", self.temperature, "a number of at least 0")
        if self.seed < 0:
            raise ConfigError("seed", self.seed, "a whole number of at least 0")
        if not 0 < self.top_p <= 1:
            raise ConfigError("top_p", self.top_p, "a number greater than 0 and at most 1")


@dataclass(frozen=True)
class Step:
    """What one forward pass added: the first step is the whole prompt, each later one a token, the last one the end.

    Attributes:
        text: the reply so far, complete characters only.
        tokens: (id, text) of the tokens the model has just read; joined, the texts of all steps are all text read.
        routing: the routing of these tokens only; None if not recorded, without layers if the model has no router.
        trace: the routing of all tokens so far; None if not recorded.
        prompt_tokens: length of the prompt.
        finished: whether this is the last step.
    """

    text: str
    tokens: list[tuple[int, str]]
    routing: RoutingDelta | None
    trace: Trace | None
    prompt_tokens: int
    finished: bool = False


def stream(
    loaded: Loaded,
    messages: Sequence[Message],
    settings: ChatSettings = ChatSettings(),
    record: bool = True,
    should_stop: Callable[[], bool] | None = None,
    steering: Steering = AS_TRAINED,
    encoding: AbstractContextManager[Any] | None = None,
) -> Iterator[Step]:
    """Generate the reply to a conversation, one `Step` per token.

    A token is yielded after the model has read it, so that its routing is known. Run one stream at a time on a model:
    two would record each other's tokens.

    Args:
        loaded: model, tokenizer and adapter.
        messages: the conversation, each with `role` and `content`, the user's message last.
        settings: how tokens are chosen, and how many.
        record: whether to record the routing.
        should_stop: called before every token; returning true ends the reply.
        steering: routing overrides for this reply; the model is restored when it ends.
        encoding: entered while the chat template and the tokenizer work, which may be anyone's.

    Raises `InputError` when the conversation fills the model's context, or the steering does not fit the model.
    """
    tokenizer, model = loaded.tokenizer, loaded.model
    with encoding or contextlib.nullcontext():
        prompt, stop = prompt_ids(messages, tokenizer), stop_ids(model, tokenizer)
    context_left = context_length(model) - len(prompt)
    if context_left < 1:
        raise InputError(
            f"The conversation has {len(prompt)} tokens, and {loaded.base} takes {context_length(model)} with its "
            "answer: start a new conversation, or shorten it."
        )
    texts, reply, text, seen = TokenTexts(tokenizer), list[int](), "", 0
    modules: list[str] | None = None  # those of the prompt's pass: the same in all steps
    with steer(model, steering), record_routing(model) if record else contextlib.nullcontext() as trace:
        for read in generate(model, prompt, settings, stop, context_left, read_last=record):
            if seen:
                reply += read
                text = tokenizer.decode(reply, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            if trace is not None and modules is None:
                modules = trace.modules
            routing = trace.since(seen, modules) if trace is not None else None
            seen += len(read)
            yield Step(text.rstrip("\ufffd"), texts.push(read), routing, trace, len(prompt))
            if should_stop is not None and should_stop():
                break
        routing = trace.since(seen, modules) if trace is not None else None
        yield Step(text, [], routing, trace, len(prompt), finished=True)


def generate(
    model: Any, prompt: list[int], settings: ChatSettings, stop: set[int], context_left: int, read_last: bool = False
) -> Iterator[list[int]]:
    """Continue a prompt; yields the ids that each forward pass has read: the prompt, then one new token at a time.

    Greedy generation equals transformers' `generate` without penalties.

    Args:
        model: a causal language model in eval mode.
        prompt: token ids.
        settings: how tokens are chosen, and how many.
        stop: ids that end the reply; they are not yielded.
        context_left: tokens that still fit the model's context.
        read_last: run the model on the last token too, to record its routing, although no token follows.
    """
    choose = TokenSampler(settings, model.device)
    options: dict[str, Any] = {"logits_to_keep": 1} if supports_logits_to_keep(model) else {}
    length = min(settings.max_new_tokens, context_left)
    read, state = prompt, ReadingState(model)
    output: Any = None
    for count in range(length + 1):
        if count < length or read_last:
            with torch.no_grad():
                ids = torch.tensor([read], device=model.device)
                output = model(input_ids=ids, use_cache=True, **state.arguments(ids), **options)
            state.keep(output)
        yield read
        if count == length:
            return
        token = choose(output.logits[0, -1])
        if token in stop:
            return
        read = [token]


class TokenSampler:
    """Chooses the next token from logits `(vocabulary,)`, with its own random generator."""

    def __init__(self, settings: ChatSettings, device: torch.device) -> None:
        self.greedy = settings.temperature < GREEDY
        self.generator = torch.Generator(device).manual_seed(settings.seed)
        self.warpers = LogitsProcessorList()
        if not self.greedy:
            self.warpers.append(TemperatureLogitsWarper(float(settings.temperature)))
            if settings.top_p < 1:
                self.warpers.append(TopPLogitsWarper(settings.top_p))

    def __call__(self, logits: Tensor) -> int:
        if self.greedy:
            return int(logits.float().argmax())
        scores = self.warpers(torch.LongTensor(), logits.float()[None])
        return int(torch.multinomial(scores.softmax(-1)[0], 1, generator=self.generator))


def prompt_ids(messages: Sequence[Message], tokenizer: Any) -> list[int]:
    """The token ids of a conversation up to the assistant's next answer, encoded as in training."""
    ids: list[int] = tokenizer(render_prompt(messages, tokenizer), add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def stop_ids(model: Any, tokenizer: Any) -> set[int]:
    """The ids that end an answer: the model's and tokenizer's end tokens, and the one training appends to answers."""
    given = model.generation_config.eos_token_id
    stop = {tokenizer.eos_token_id, *(given if isinstance(given, list) else [given])} - {None}
    turn = Example(messages=({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}))
    last = encode_example(turn, tokenizer, 1 << 20).input_ids[-1]
    return stop | ({last} & special_ids(tokenizer))


def special_ids(tokenizer: Any) -> set[int]:
    """The ids of the tokenizer's special tokens."""
    added = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | set(tokenizer.all_special_ids)


def context_length(model: Any) -> int:
    """The model's maximum number of tokens; practically unlimited if its config does not say."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or 1 << 30


class ReadingState:
    """What a model keeps between the tokens of one text: keys and values, or the state of a recurrent model."""

    def __init__(self, model: Any) -> None:
        base = base_model(model)
        accepted = inspect.signature(base.forward).parameters
        stateful = getattr(base, "_is_stateful", False)
        recurrent = stateful or not ATTENTION.issuperset(getattr(base.config, "layer_types", None) or ())
        self._kept: dict[str, Any] = {}
        if stateful and "past_key_values" in accepted:  # RecurrentGemma takes a cache, and does not return it
            self._kept["past_key_values"] = DynamicCache(config=base.config)
        # Bamba and MiniMax count the tokens of each pass from 0, unless told.
        self._position = 0 if recurrent and "position_ids" in accepted else None

    def arguments(self, ids: Tensor) -> dict[str, Any]:
        """The arguments of a pass that reads `ids (1, tokens)` next."""
        if self._position is None:
            return self._kept
        start = self._position
        self._position += ids.shape[1]
        return {"position_ids": torch.arange(start, self._position, device=ids.device)[None], **self._kept}

    def keep(self, output: Any) -> None:
        """Keep what a pass has returned."""
        self._kept = {name: output[name] for name in STATES if name in output} or self._kept


def supports_logits_to_keep(model: Any) -> bool:
    """Whether the model can compute the logits of the last tokens only."""
    return bool(base_model(model)._supports_logits_to_keep())


class TokenTexts:
    """Maps token ids to pieces of text; a character made of several tokens belongs to the last of them."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.ids: list[int] = []
        self.done = 0
        """How many of `ids` have been returned as text; they stay as context, because it decides about spaces."""

    def push(self, ids: Sequence[int]) -> list[tuple[int, str]]:
        """The new tokens with their texts."""
        return [(token, self._next(token)) for token in ids]

    def _next(self, token: int) -> str:
        before = self._decode(self.ids[: self.done])
        self.ids.append(token)
        after = self._decode(self.ids)
        if after.endswith("\ufffd"):
            return ""
        self.ids, self.done = self.ids[self.done :], len(self.ids) - self.done
        return after[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        text: str = self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text
