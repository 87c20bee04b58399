"""Streams replies token by token, with the routing of every token."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import BoolTensor, FloatTensor, LongTensor, Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from mole.chat.settings import DEFAULTS, ChatSettings
from mole.chat.tokens import TokenTexts, answer_ends, prompt_text
from mole.core.errors import InputError
from mole.core.thoughts import THINK, opened_thought
from mole.core.threads import iterate
from mole.data import Message
from mole.data.encoding import encode_text
from mole.mixture.steering import AS_TRAINED, Steering, steer
from mole.mixture.trace import RoutingDelta, Trace, record_routing
from mole.models.context import context_length
from mole.models.loading import Loaded


@dataclass(frozen=True)
class Step:
    """What one forward pass added: the first step is the whole prompt, each later one a token, the last one the end.

    Attributes:
        text: the reply so far, complete characters only; what may be the beginning of a stop string is held back.
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
    settings: ChatSettings = DEFAULTS,
    record: bool = True,
    should_stop: Callable[[], bool] | None = None,
    steering: Steering = AS_TRAINED,
    encoding: AbstractContextManager[Any] | None = None,
) -> Iterator[Step]:
    """Generate the reply to a conversation, one `Step` per token.

    A token is yielded after the model has read it, so that its routing is known. The model runs in a thread of its own,
    and only while the next step is waited for. Run one stream at a time on a model: two would switch each other's
    steering.

    Args:
        loaded: model, tokenizer and adapter.
        messages: the conversation, each with `role` and `content`, the user's message last.
        settings: how tokens are chosen, and where the reply ends.
        record: whether to record the routing.
        should_stop: called after every token, in the model's thread; returning true ends the reply.
        steering: routing overrides for this reply; the model is restored when it ends.
        encoding: entered while the chat template and the tokenizer work, which may be anyone's.

    Raises `InputError` when the conversation fills the model's context, or settings or steering do not fit the model.
    """
    tokenizer, model = loaded.tokenizer, loaded.model
    with encoding or contextlib.nullcontext():
        rendered = prompt_text(messages, tokenizer, settings.enable_thinking)
        prompt, ends = encode_text(rendered, tokenizer), answer_ends(tokenizer, model)
    limit = context_length(model.config)
    context_left = limit - len(prompt)
    if context_left < 1:
        raise InputError(
            f"The conversation has {len(prompt)} tokens, and {loaded.base} takes {limit} with its answer: "
            "start a new conversation, or shorten it."
        )

    def give_steps(give: Callable[[Step], None]) -> None:
        with steer(model, steering), record_routing(model) if record else contextlib.nullcontext() as trace:
            stop_strings = [*settings.stop_strings, *filter(None, [ends.text])]
            reply = Reply(tokenizer, len(prompt), stop_strings, f"{THINK}\n" if opened_thought(rendered) else "", trace)

            def go_on(read: list[int]) -> bool:
                give(reply.step(read))
                return not reply.stopped and not (should_stop is not None and should_stop())

            generate(model, prompt, settings, ends.ids, context_left, go_on, read_last=record)
            give(reply.step([], finished=True))

    yield from iterate(give_steps, "generate")


class Reply:
    """A reply as it grows: the tokens of each forward pass become a `Step`.

    Args:
        tokenizer: decodes them.
        prompt_tokens: length of the prompt.
        stop_strings: texts that end the reply.
        beginning: text that the prompt has begun the reply with.
        trace: records the routing; None if it is not recorded.
    """

    def __init__(
        self, tokenizer: Any, prompt_tokens: int, stop_strings: Sequence[str], beginning: str, trace: Trace | None
    ) -> None:
        self.stopped = False
        """Whether a stop string has appeared."""
        self._tokenizer, self._prompt_tokens, self._trace = tokenizer, prompt_tokens, trace
        self._stop_strings, self._beginning = stop_strings, beginning
        self._texts, self._ids, self._text = TokenTexts(tokenizer), list[int](), ""
        self._seen = 0
        self._modules: list[str] | None = None  # those of the prompt's pass: the same in all steps

    def step(self, read: list[int], finished: bool = False) -> Step:
        """The step of a pass that has read these ids; the first one is the prompt's."""
        if self._seen and read:
            self._ids += read
            text = self._tokenizer.decode(self._ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            self._text, self.stopped = cut_at(text, self._stop_strings)
        routing = None
        if self._trace is not None:
            self._modules = self._trace.modules if self._modules is None else self._modules
            routing = self._trace.since(self._seen, self._modules)
        self._seen += len(read)
        text = self._text
        if not finished and not self.stopped:
            text = text.rstrip("\ufffd")
            text = text[: len(text) - held_back(text, self._stop_strings)]
        return Step(self._beginning + text, self._texts.push(read), routing, self._trace, self._prompt_tokens, finished)


def cut_at(text: str, stop_strings: Sequence[str]) -> tuple[str, bool]:
    """The text before the first stop string, and whether there is one."""
    # transformers' `StopStringCriteria` looks through the vocabulary first: half a second for 49,000 tokens.
    places = [place for stop in stop_strings if (place := text.find(stop)) >= 0]
    return (text[: min(places)], True) if places else (text, False)


def held_back(text: str, stop_strings: Sequence[str]) -> int:
    """How many characters at the end of a text may be the beginning of a stop string."""
    return max((size for stop in stop_strings for size in range(len(stop)) if text.endswith(stop[:size])), default=0)


# ---------------------------------------------------------------------------------------------------------
# transformers' `generate`


def generate(
    model: Any,
    prompt: list[int],
    settings: ChatSettings,
    stop: set[int],
    context_left: int,
    go_on: Callable[[list[int]], bool],
    read_last: bool = False,
) -> None:
    """Continue a prompt by transformers' `generate`, with the cache or the state that it chooses for the model.

    Args:
        model: a causal language model in eval mode.
        prompt: token ids.
        settings: how tokens are chosen, and how many.
        stop: ids that end the reply.
        context_left: tokens that still fit the model's context, at least 1.
        go_on: called with the ids that each forward pass has read, first the prompt, then one new token at a time, but
            not with one of `stop`; returning false ends the reply.
        read_last: run the model on the last token too, to record its routing, although no token follows.
    """
    length = min(settings.max_new_tokens, context_left)
    ids = torch.tensor([prompt], device=model.device)
    config = GenerationConfig(
        max_new_tokens=length + read_last,  # reading the last token chooses one more, which is dropped
        do_sample=False,  # `Sampling` does
        num_beams=1,
        num_return_sequences=1,
        repetition_penalty=settings.repetition_penalty,
        use_cache=True,
        eos_token_id=sorted(stop) or None,
        pad_token_id=min(stop, default=0),  # of one row nothing is padded
    )
    model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        generation_config=config,
        logits_processor=sampling(settings, model.device),
        stopping_criteria=StoppingCriteriaList([AfterEachToken(prompt, length, stop, go_on, read_last)]),
    )


class AfterEachToken(StoppingCriteria):
    """Calls `go_on` with what the model has read, and decides whether to go on; the arguments are those of `generate`.

    It is called when a token has been chosen, before the model reads it.
    """

    def __init__(
        self, prompt: list[int], length: int, stop: set[int], go_on: Callable[[list[int]], bool], read_last: bool
    ) -> None:
        self.reading, self.length, self.stop, self.go_on, self.read_last = prompt, length, stop, go_on, read_last
        self.count = 0
        """Number of tokens chosen."""

    def __call__(self, input_ids: LongTensor, scores: FloatTensor, **kwargs: Any) -> BoolTensor:
        ended = not self._goes_on(int(input_ids[0, -1]))
        return torch.full((1,), ended, dtype=torch.bool, device=input_ids.device)  # type: ignore[return-value]

    def _goes_on(self, token: int) -> bool:
        if not self.go_on(self.reading):
            return False
        self.count += 1
        if token in self.stop or self.count > self.length:
            return False
        self.reading = [token]
        if self.count == self.length and not self.read_last:
            self.go_on(self.reading)
            return False
        return True


def sampling(settings: ChatSettings, device: torch.device) -> LogitsProcessorList:
    """What changes the logits so that their maximum is the token to take; empty for greedy decoding."""
    if settings.greedy:
        return LogitsProcessorList()
    processors: list[LogitsProcessor] = [TemperatureLogitsWarper(float(settings.temperature))]
    if settings.top_k:
        processors.append(TopKLogitsWarper(settings.top_k))
    if settings.top_p < 1:
        processors.append(TopPLogitsWarper(settings.top_p))
    if settings.min_p:
        processors.append(MinPLogitsWarper(settings.min_p))
    return LogitsProcessorList([*processors, Sampling(settings.seed, device)])


class Sampling(LogitsProcessor):
    """Leaves only a token drawn with a random generator of its own: `generate` would draw with torch's global one."""

    def __init__(self, seed: int, device: torch.device) -> None:
        self.generator = torch.Generator(device).manual_seed(seed)

    def __call__(self, input_ids: LongTensor, scores: FloatTensor) -> FloatTensor:
        drawn: Tensor = torch.multinomial(scores.softmax(-1), 1, generator=self.generator)  # (1, 1)
        return torch.full_like(scores, -torch.inf).scatter_(1, drawn, 0.0)  # type: ignore[return-value]
