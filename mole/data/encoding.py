"""From a data file to batches: the chat template, tokens and labels, the held-out split, padding.

What generation sees is what training saw: the token ids of `render_prompt` are the beginning of every example, and the
answer is tokenised on its own behind them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from mole.core.errors import DataError
from mole.core.text import one_line
from mole.data.examples import Example, Message

IGNORE_INDEX = -100
"""The label of tokens that carry no loss."""

DEFAULT_CHAT_TEMPLATE = """\
{{- bos_token if bos_token is defined and bos_token else '' -}}
{%- for message in messages -%}
    {%- if message['role'] == 'system' -%}
        {{- message['content'] + '\\n\\n' -}}
    {%- elif message['role'] == 'user' -%}
        {{- '### User:\\n' + message['content'] + '\\n\\n' -}}
    {%- else -%}
        {{- '### Assistant:\\n' + message['content'] + (eos_token if eos_token is defined else '') + '\\n\\n' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '### Assistant:\\n' -}}{%- endif -%}
"""
"""The chat template of a base model that has none: `### User:` and `### Assistant:` above the messages, the
tokenizer's end-of-text token after each answer."""


def chat_template(tokenizer: Any) -> str:
    """The tokenizer's own chat template, or `PLAIN_TEMPLATE` when it has none."""
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default") or next(iter(template.values()), None)
    return template or DEFAULT_CHAT_TEMPLATE


def render_prompt(messages: Sequence[Message], tokenizer: Any) -> str:
    """The text before the assistant's next answer; tokenise it with `add_special_tokens=False`.

    Templates of thinking models are asked for an answer without thoughts, as the training data holds none. Raises
    `DataError` when the template refuses the messages.
    """
    return render_chat(messages, tokenizer, add_generation_prompt=True)


def render_chat(messages: Sequence[Message], tokenizer: Any, *, add_generation_prompt: bool) -> str:
    """The conversation in the template's text. Raises `DataError` when the template refuses it."""
    try:
        return tokenizer.apply_chat_template(
            list(messages),
            chat_template=chat_template(tokenizer),
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            enable_thinking=False,
        )
    except Exception as error:  # a template is a program, if one in a sandbox, and may fail in any way
        raise DataError(f"the chat template refuses the messages: {one_line(error)}") from None


class EncodedExample(NamedTuple):
    """One example as tokens; `labels` are the ids where there is something to learn, -100 elsewhere."""

    input_ids: list[int]
    labels: list[int]
    dropped: int = 0
    """Tokens of the prompt that were cut off at its beginning."""
    cut: int = 0
    """Tokens of the answer that were cut off at its end."""

    @property
    def truncated(self) -> bool:
        return bool(self.dropped or self.cut)


class RenderedExample(NamedTuple):
    """An example as text in two parts, tokenised apart."""

    prompt: str
    answer: str
    learnt: list[tuple[int, int]]
    """Character ranges of earlier answers in the prompt."""


def encode_example(example: Example, tokenizer: Any, max_length: int) -> EncodedExample:
    """The example as at most `max_length` token ids and labels.

    Loss is on every answer of the assistant and the token that ends it, in a text row on everything. Too long a prompt
    loses its oldest tokens; only an answer that leaves no room for one token of prompt is cut, at its end.
    Raises `DataError` when the template refuses it or nothing is left to learn.
    """
    (result,) = encode_examples([example], tokenizer, max_length)
    if isinstance(result, DataError):
        raise result
    return result


def encode_examples(
    examples: Iterable[Example], tokenizer: Any, max_length: int
) -> Iterator[EncodedExample | DataError]:
    """`encode` for many at once, which is far faster; in place of an example that cannot be used, its error."""
    rendered: list[RenderedExample | DataError] = []
    for example in examples:
        try:
            rendered.append(render_example(example, tokenizer))
        except DataError as error:
            rendered.append(error)
    good = [item for item in rendered if not isinstance(item, DataError)]
    prompts = tokenize([item.prompt for item in good], tokenizer)
    answers = tokenize([item.answer for item in good], tokenizer)
    encoded = (
        join_and_truncate(prompt, earlier_answer_mask(item, prompt, tokenizer), answer, max_length)
        for item, prompt, answer in zip(good, prompts, answers, strict=True)
    )
    return (item if isinstance(item, DataError) else next(encoded) for item in rendered)


def tokenize(texts: list[str], tokenizer: Any) -> list[list[int]]:
    """Token ids of each text, nothing added."""
    return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []


def render_example(example: Example, tokenizer: Any) -> RenderedExample:
    """The example's text, the last answer apart. Raises `DataError` when the template refuses it or leaves it out."""
    eos = tokenizer.eos_token or ""
    if example.text is not None:
        adds_bos = tokenizer.bos_token is not None and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]
        return RenderedExample("", (tokenizer.bos_token if adds_bos else "") + example.text + eos, [])
    prompt = render_prompt(example.prompt, tokenizer)
    whole = render_chat(example.messages, tokenizer, add_generation_prompt=False)
    target = example.target
    # A template that rewrites the prompt once the answer is there gets the plain answer behind the prompt it was given.
    answer = whole[len(prompt) :].rstrip() if whole.startswith(prompt) else target
    bare = target.strip()
    check_template_kept("question", example.prompt[-1]["content"] if example.prompt else "", prompt)
    check_template_kept("answer", bare, answer)
    start = answer.find(bare) if answer.lstrip().startswith(bare) else answer.rfind(bare)
    ending = answer[start + len(bare) :] if start >= 0 else ""
    if start >= 0 and not ending:
        answer, ending = answer + eos, eos
    return RenderedExample(prompt, answer, earlier_answer_spans(example.prompt, prompt, ending, tokenizer))


def check_template_kept(part: str, text: str, rendered: str) -> None:
    """See that a message is in the template's text, by its last word: templates may trim it, and take thoughts away.

    Raises `DataError`: a model trained on such rows would learn from blanks.
    """
    words = text.split()
    if words and words[-1] not in rendered:
        raise DataError(f"the chat template leaves out the {part}")


def earlier_answer_spans(messages: list[Message], prompt: str, ending: str, tokenizer: Any) -> list[tuple[int, int]]:
    """Where in the prompt's text the answers before the last are, each with the end-of-turn text behind it."""
    ranges = []
    for turn, message in enumerate(messages):
        if message["role"] == "assistant":
            content = message["content"].strip()
            before = render_prompt(messages[:turn], tokenizer) if turn else ""
            start = prompt.find(content, common_prefix_length(prompt, before))
            if start >= 0:
                end = start + len(content)
                ranges.append((start, end + len(ending) * prompt.startswith(ending, end)))
    return ranges


def common_prefix_length(one: str, other: str) -> int:
    """How many characters two texts share at their beginning."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


def earlier_answer_mask(item: RenderedExample, prompt: list[int], tokenizer: Any) -> list[bool]:
    """For each token of the prompt whether it belongs to an earlier answer."""
    if not item.learnt or not tokenizer.is_fast:  # only fast tokenizers tell where a token's text is
        return [False] * len(prompt)
    offsets = tokenizer(item.prompt, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return [
        any(start < end_of_range and end > start_of_range for start_of_range, end_of_range in item.learnt)
        for start, end in offsets["offset_mapping"]
    ]


def join_and_truncate(
    prompt: list[int], learnt: list[bool], answer: list[int], max_length: int
) -> EncodedExample | DataError:
    """Prompt and answer in one, cut to `max_length`; a `DataError` when no token is left to learn."""
    kept = min(len(prompt), max(max_length - len(answer), 1))
    ids = (prompt[len(prompt) - kept :] + answer)[:max_length]
    labels = [token if wanted else IGNORE_INDEX for token, wanted in zip(prompt, learnt, strict=True)]
    labels = (labels[len(prompt) - kept :] + answer)[:max_length]
    # The first token is never predicted, having nothing before it.
    if all(label == IGNORE_INDEX for label in labels[1:]):
        return DataError("nothing is left to learn from: the answer has no tokens")
    return EncodedExample(ids, labels, len(prompt) - kept, kept + len(answer) - len(ids))
