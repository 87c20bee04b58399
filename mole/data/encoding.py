"""Encoding examples: chat template, token ids, and labels that are -100 where no loss is taken. No torch.

Prompt and answer are tokenized separately and concatenated, so that generation sees exactly the token ids of training:
those of `render_prompt`.
"""

from __future__ import annotations

import itertools
import re
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from mole.core.errors import DataError
from mole.core.text import one_line
from mole.data.examples import Example, Message

IGNORE_INDEX = -100
"""Label of tokens without loss, as in `torch.nn.functional.cross_entropy`."""
FEW_ANSWERS, MOST_ANSWERS = 32, 500
"""Answers of a conversation up to which each is found by rendering all messages before it, and the most for which this
is done when they cannot be found together."""

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
"""Chat template for base models without one: `### User:` and `### Assistant:` headings, and the tokenizer's
end-of-text token after each answer."""


def chat_template(tokenizer: Any) -> str:
    """The tokenizer's chat template, or `DEFAULT_CHAT_TEMPLATE` if it has none."""
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default") or next(iter(template.values()), None)
    return template or DEFAULT_CHAT_TEMPLATE


def render_prompt(messages: Sequence[Message], tokenizer: Any, enable_thinking: bool = False) -> str:
    """The text before the assistant's next answer; tokenize it with `add_special_tokens=False`.

    Thinking is disabled in templates that support it, unless asked for: the training data has none. Raises `DataError`
    when the template rejects the messages.
    """
    return render_chat(messages, tokenizer, add_generation_prompt=True, enable_thinking=enable_thinking)


def render_chat(
    messages: Sequence[Message], tokenizer: Any, *, add_generation_prompt: bool, enable_thinking: bool = False
) -> str:
    """The conversation rendered by the chat template. Raises `DataError` when the template rejects it."""
    try:
        return tokenizer.apply_chat_template(
            list(messages),
            chat_template=chat_template(tokenizer),
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            enable_thinking=enable_thinking,
        )
    except Exception as error:  # a template is a (sandboxed) program and can raise anything
        raise DataError(f"the chat template rejects the messages: {one_line(error)}") from None


class EncodedExample(NamedTuple):
    """One example as tokens.

    Attributes:
        input_ids: token ids of prompt and answer.
        labels: the token id where there is loss, `IGNORE_INDEX` elsewhere; as long as `input_ids`.
        dropped: tokens removed at the start of the prompt.
        cut: tokens removed at the end of the answer.
    """

    input_ids: list[int]
    labels: list[int]
    dropped: int = 0
    cut: int = 0

    @property
    def truncated(self) -> bool:
        """Whether tokens were removed."""
        return bool(self.dropped or self.cut)


class RenderedExample(NamedTuple):
    """An example as text in two parts that are tokenized separately.

    Attributes:
        prompt: everything before the last answer.
        answer: the last answer and the text that ends its turn.
        answer_spans: character ranges (start, end) of earlier answers in `prompt`.
    """

    prompt: str
    answer: str
    answer_spans: list[tuple[int, int]]


def encode_example(example: Example, tokenizer: Any, max_length: int) -> EncodedExample:
    """Encode an example as at most `max_length` token ids and labels.

    Loss is taken on every answer of the assistant and its end-of-turn token; on all tokens of a text row. A prompt
    that is too long is truncated at its start; the answer is truncated at its end only if it leaves no room for one
    token of the prompt. Raises `DataError` when the template rejects the example or no token has loss.
    """
    (result,) = encode_examples([example], tokenizer, max_length)
    if isinstance(result, DataError):
        raise result
    return result


def encode_examples(
    examples: Iterable[Example], tokenizer: Any, max_length: int
) -> Iterator[EncodedExample | DataError]:
    """`encode_example` for many examples in one tokenizer call, which is faster; errors take the place of examples."""
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
    """Token ids of each text, without special tokens."""
    return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []


def render_example(example: Example, tokenizer: Any) -> RenderedExample:
    """The example's text, split before the last answer. Raises `DataError` when the template rejects or omits it."""
    eos = tokenizer.eos_token or ""
    if example.text is not None:
        adds_bos = tokenizer.bos_token is not None and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]
        return RenderedExample("", (tokenizer.bos_token if adds_bos else "") + example.text + eos, [])
    prompt = render_prompt(example.prompt, tokenizer)
    whole = render_chat(example.messages, tokenizer, add_generation_prompt=False)
    target = example.target
    # Some templates render the prompt differently once the answer is there (e.g. they drop thoughts). Then the plain
    # answer follows the prompt as generation will see it.
    answer = whole[len(prompt) :].rstrip() if whole.startswith(prompt) else target
    bare = target.strip()  # templates may trim the answer
    check_template_kept("question", example.prompt[-1]["content"] if example.prompt else "", prompt)
    check_template_kept("answer", bare, answer)
    # What follows the answer ends the turn; earlier answers get the same ending. Without one, the end-of-text token.
    start = answer.find(bare) if answer.lstrip().startswith(bare) else answer.rfind(bare)
    ending = answer[start + len(bare) :] if start >= 0 else ""
    if start >= 0 and not ending:
        answer, ending = answer + eos, eos
    return RenderedExample(prompt, answer, earlier_answer_spans(example.prompt, prompt, ending, tokenizer))


def check_template_kept(part: str, text: str, rendered: str) -> None:
    """Raise `DataError` when a message is missing from the rendered text: a model would learn from blanks.

    Only its last word is looked for, because templates may trim the text and remove thoughts at its start.
    """
    words = text.split()
    if words and words[-1] not in rendered:
        raise DataError(f"the chat template omits the {part}")


def earlier_answer_spans(messages: list[Message], prompt: str, ending: str, tokenizer: Any) -> list[tuple[int, int]]:
    """Character ranges in the prompt of the answers before the last, each with its end-of-turn text.

    Raises `DataError` for a conversation that is too long for a template that changes earlier answers.
    """
    answers = [turn for turn, message in enumerate(messages) if message["role"] == "assistant"]
    starts = marked_answers(messages, answers, prompt, tokenizer) if len(answers) > FEW_ANSWERS else None
    if starts is None:
        if len(answers) > MOST_ANSWERS:
            raise DataError(f"has {len(messages)} messages, but the chat template changes answers: split it")
        starts = [answer_after(messages[:turn], messages[turn]["content"], prompt, tokenizer) for turn in answers]
    ranges = []
    for turn, start in zip(answers, starts, strict=True):
        if start >= 0:
            end = start + len(messages[turn]["content"].strip())
            ranges.append((start, end + len(ending) * prompt.startswith(ending, end)))
    return ranges


def answer_after(before: list[Message], content: str, prompt: str, tokenizer: Any) -> int:
    """Where an answer begins in the prompt; it is searched behind the messages before it, which may have its words."""
    rendered = render_prompt(before, tokenizer) if before else ""
    return prompt.find(content.strip(), common_prefix_length(prompt, rendered))


def marked_answers(messages: list[Message], answers: list[int], prompt: str, tokenizer: Any) -> list[int] | None:
    """Where each answer begins in the prompt, found in one rendering with marks in the place of the answers.

    The work grows with the length of the conversation, not with its square. None if the template does more with an
    answer than to copy or trim it.
    """
    marked = [
        {**message, "content": f"\ue000{turn}\ue001"} if message["role"] == "assistant" else message
        for turn, message in enumerate(messages)
    ]
    try:
        parts = re.split("\ue000([0-9]+)\ue001", render_prompt(marked, tokenizer))
    except DataError:
        return None
    if parts[1::2] != [str(turn) for turn in answers]:
        return None
    contents = [messages[turn]["content"] for turn in answers]
    for written in (contents, [content.strip() for content in contents]):
        if "".join(part + content for part, content in zip(parts[::2], [*written, ""], strict=True)) == prompt:
            starts, at = [], 0
            for part, content in zip(parts[::2], written, strict=False):
                starts.append(at + len(part) + len(content) - len(content.lstrip()))
                at += len(part) + len(content)
            return starts
    return None


def common_prefix_length(one: str, other: str) -> int:
    """Length of the common prefix of two texts, in characters."""
    same, different = 0, min(len(one), len(other)) + 1
    if one[: different - 1] == other[: different - 1]:
        return different - 1
    while different - same > 1:
        middle = (same + different) // 2
        same, different = (middle, different) if one[:middle] == other[:middle] else (same, middle)
    return same


def earlier_answer_mask(item: RenderedExample, prompt: list[int], tokenizer: Any) -> list[bool]:
    """For each token of the prompt, whether it belongs to an earlier answer (any overlap of characters)."""
    if not item.answer_spans or not tokenizer.is_fast:  # only fast tokenizers return offsets
        return [False] * len(prompt)
    offsets = tokenizer(item.prompt, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    spans = sorted(item.answer_spans)
    starts = [start for start, _ in spans]
    ends = [0, *itertools.accumulate((end for _, end in spans), max)]  # of the spans so far, the farthest
    return [ends[bisect_left(starts, end)] > start for start, end in offsets["offset_mapping"]]


def join_and_truncate(
    prompt: list[int], learnt: list[bool], answer: list[int], max_length: int
) -> EncodedExample | DataError:
    """Concatenate prompt and answer and truncate to `max_length`; a `DataError` when no token has loss.

    `learnt` marks the prompt tokens of earlier answers, which have loss too.
    """
    # Keep the end of the prompt: what the answer leaves of max_length, but at least one token, since the first token
    # of a sequence is never predicted.
    kept = min(len(prompt), max(max_length - len(answer), 1))
    ids = (prompt[len(prompt) - kept :] + answer)[:max_length]
    labels = [token if wanted else IGNORE_INDEX for token, wanted in zip(prompt, learnt, strict=True)]
    labels = (labels[len(prompt) - kept :] + answer)[:max_length]
    # labels[0] is never used: the model predicts labels[i] from input_ids[:i].
    if all(label == IGNORE_INDEX for label in labels[1:]):
        return DataError("nothing is left to learn from: the answer has no tokens")
    return EncodedExample(ids, labels, len(prompt) - kept, kept + len(answer) - len(ids))
