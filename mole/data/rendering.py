"""Rendering examples by chat templates, and finding what is learnt in the text. No torch.

A template is a program: it may trim, move or leave out what a message has. So nothing is searched in the rendered text.
Where a message's content stands is found by rendering the conversation with another content in its place.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from mole.core.errors import DataError
from mole.core.thoughts import END_THINK, THINK, begins_with_thought, opened_thought
from mole.data.chat_templates import DEFAULT_CHAT_TEMPLATE, MARK, ChatTemplate
from mole.data.examples import Example
from mole.data.messages import Message

Span = tuple[int, int]
"""A range of characters: start, end."""
FEW_ANSWERS, MOST_ANSWERS = 32, 500
"""Answers of a conversation up to which each is found by a rendering of its own, and the most for which this is done
when they cannot be found together."""


class RenderedExample(NamedTuple):
    """An example as text in two parts that are tokenized separately.

    Attributes:
        prompt: everything before the last answer.
        answer: the last answer and the text that ends its turn.
        answer_spans: character ranges (start, end) of earlier answers in `prompt`.
        example: what is rendered.
        template: with the choices for this example; None for text.
        lost_thoughts: thoughts in answers to learn that the template leaves out.
    """

    prompt: str
    answer: str
    answer_spans: list[Span]
    example: Example
    template: ChatTemplate | None = None
    lost_thoughts: int = 0


def render_example(example: Example, template: ChatTemplate, enable_thinking: bool | None = None) -> RenderedExample:
    """The example's text, split before the last answer.

    Args:
        example: a conversation, or text.
        template: renders a conversation.
        enable_thinking: whether a template with this choice lets the model think; None for the conversations whose
            last answer begins with a thought.

    Raises `DataError` when the template rejects the conversation or leaves out a part of it.
    """
    if example.text is not None:
        return RenderedExample("", with_ends(example.text, template.tokenizer), [], example)
    messages = template.prepare(example.messages)
    asked = messages[-2]["content"] if len(messages) > 1 and messages[-2]["role"] != "tool" else ""
    target = messages[-1]["content"]
    thinking = begins_with_thought(target) if enable_thinking is None else enable_thinking
    template = template.with_choices(thinking, template.as_plain(list(example.tools)))
    if template.marks_generation:
        prompt, answer, spans = render_marked(messages, template)
    else:
        asking = template.render(messages[:-1])
        last = split_last_answer(messages, asking, template)
        usual = last
        if "tool_calls" in messages[-1]:  # what begins and ends a call need not be what begins and ends other answers
            answered = [*messages[:-1], {"role": "assistant", "content": "a"}]
            usual = split_last_answer(answered, asking, template)
        spans = earlier_answer_spans(messages[:-1], asking, usual, template)
        prompt, answer = last.prompt, last.begin + last.content + last.end
    check_template_kept("question", asked, prompt)
    check_template_kept("answer", target, answer)
    check_tools_kept(messages, template)
    thoughts = sum(begins_with_thought(message["content"]) for message in messages if is_learnt(message))
    if thoughts:  # the last one may have begun in the prompt
        thoughts -= sum(END_THINK in prompt[start:end] for start, end in spans) + (END_THINK in answer)
    return RenderedExample(prompt, answer, spans, example, template, max(thoughts, 0))


def is_learnt(message: Message) -> bool:
    """Whether a message is an answer to learn."""
    return message["role"] == "assistant" and message.get("weight") != 0


def answer_ending(tokenizer: Any) -> str:
    """The text that ends an answer, as the chat template writes it; empty if it renders no answers."""
    question, answer = {"role": "user", "content": "a"}, {"role": "assistant", "content": MARK}
    try:
        return render_example(Example((question, answer)), ChatTemplate(tokenizer)).answer.partition(MARK)[2]
    except DataError:
        return ""


def with_ends(text: str, tokenizer: Any) -> str:
    """A text row with the token that begins a text, if the model has one, and the one that ends it, if absent."""
    begin, end = tokenizer.bos_token or "", tokenizer.eos_token or ""
    adds_bos = bool(begin) and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]
    begun = text.lstrip().startswith(begin)
    ended = text.rstrip().endswith(tuple(tokenizer.all_special_tokens))
    return ("" if begun or not adds_bos else begin) + text + ("" if ended else end)


def check_template_kept(part: str, text: str, rendered: str) -> None:
    """Raise `DataError` when a message is missing from the rendered text: a model would learn from blanks.

    Only its last word is looked for, because templates may trim the text and remove thoughts at its start.
    """
    words = text.split()
    if words and words[-1] not in rendered:
        raise DataError(f"the chat template omits the {part}")


def check_tools_kept(messages: Sequence[Message], template: ChatTemplate) -> None:
    """Raise `DataError` when tools, calls or what tools returned are missing from the rendered text.

    Other names, arguments and results must make other texts, those of calls where the template marks what is generated.
    """
    if not template.tools and all(message["role"] != "tool" and "tool_calls" not in message for message in messages):
        return
    parts: list[str] = []

    def mark(part: str) -> str:
        parts.append(part)
        return f"{MARK}{len(parts) - 1}{MARK}"

    marked = [mark_tools(message, mark) for message in messages]
    calls = len(parts)
    marked = [
        {**message, "content": mark("what tools return")} if message["role"] == "tool" else message
        for message in marked
    ]
    tools = [{**tool, "function": {**tool["function"], "name": mark("the tools")}} for tool in template.tools]
    if template.source == DEFAULT_CHAT_TEMPLATE:
        raise DataError("the model has no chat template, and the plain one has no tools")
    changed = template.with_choices(template.thinking, tools)
    whole = generated = changed.render(marked, ask=False)
    if template.marks_generation:
        whole, spans = changed.render_marked(marked)
        generated = "".join(whole[start:end] for start, end in spans)
    for number, part in enumerate(parts):
        if f"{MARK}{number}{MARK}" not in (generated if number < calls else whole):
            raise DataError(f"the chat template leaves out {part}")


def mark_tools(message: Message, mark: Callable[[str], str]) -> Message:
    """A message with marks in the place of the names and arguments of its calls."""
    calls = []
    for call in message.get("tool_calls", ()):
        name, given = mark("tool calls"), call["function"]["arguments"]
        if isinstance(given, str):
            given = mark("the arguments of tool calls")
        elif given:
            given = dict.fromkeys(given, mark("the arguments of tool calls"))
        calls.append({**call, "function": {"name": name, "arguments": given}})
    return {**message, "tool_calls": calls} if calls else message


# ---------------------------------------------------------------------------------------------------------
# The last answer


class LastAnswer(NamedTuple):
    """A conversation, divided at its last answer.

    Attributes:
        prompt: what generation sees; without its end if that begins a thought, and the answer has none.
        begin: what the template writes before the content, after the prompt.
        content: as the template writes it.
        end: what ends the answer.
    """

    prompt: str
    begin: str
    content: str
    end: str


def split_last_answer(messages: Sequence[Message], prompt: str, template: ChatTemplate) -> LastAnswer:
    """Divide a conversation at its last answer.

    Args:
        messages: the conversation.
        prompt: all messages but the last, rendered for generation.
        template: renders the conversation.
    """
    whole = template.render(messages, ask=False)
    given, eos = messages[-1]["content"], template.tokenizer.eos_token or ""
    answer = whole[len(prompt) :] if whole.startswith(prompt) else None
    calls = "tool_calls" in messages[-1]
    for content in (given, given.strip()):  # most templates copy or trim it; the rest need more renderings
        if answer is not None and not calls and answer.startswith(content):
            return LastAnswer(prompt, "", content, answer[len(content) :].rstrip() or eos)
    start, end = content_span(messages, len(messages) - 1, whole, template, ask=False)
    written, ending = whole[start:end], whole[end:].rstrip() or eos
    if answer is not None:
        start = max(start, len(prompt))
        return LastAnswer(prompt, whole[len(prompt) : start], written, ending)
    begun_thought = opened_thought(prompt)
    if begun_thought and begins_with_thought(given):  # the template leaves out the thought that the prompt has begun
        return LastAnswer(prompt, "", given.strip().removeprefix(THINK).lstrip("\n"), ending)
    # The template renders the prompt differently once the answer is there, e.g. it moves the system message. Generation
    # sees the prompt. What follows the question in both is the same, and what comes after that begins the answer.
    _, asked_end = content_span(messages[:-1], len(messages) - 2, prompt, template)
    _, question_end = content_span(messages, len(messages) - 2, whole, template, ask=False)
    between, same = whole[question_end:start], prompt[asked_end:].removesuffix(begun_thought)
    begin = between[len(same) :] if between.startswith(same) else ""
    return LastAnswer(prompt.removesuffix(begun_thought), begin, written, ending)


def render_marked(messages: Sequence[Message], template: ChatTemplate) -> tuple[str, str, list[Span]]:
    """A conversation whose template marks what the model generates: that is learnt, and nothing else."""
    whole, spans = template.render_marked(messages)
    if not spans:
        raise DataError("the chat template marks nothing of it as generated")
    answers = [message for message in messages if message["role"] == "assistant"]
    weights = [message.get("weight") for message in answers]
    if 0 in weights and len(spans) != len(answers):
        raise DataError("has answers of weight 0, but the chat template marks more or less than answers as generated")
    *earlier, (start, end) = spans
    learnt = [span for span, weight in zip(earlier, weights, strict=False) if weight != 0] if 0 in weights else earlier
    return whole[:start], whole[start:end], learnt


# ---------------------------------------------------------------------------------------------------------
# Where contents stand


def content_span(
    messages: Sequence[Message], index: int, rendered: str, template: ChatTemplate, *, ask: bool = True
) -> Span:
    """The character range of a message's content in the rendered conversation: where another content makes it differ.

    The template may have changed the content, e.g. trimmed it or left out its thoughts; the range is of what is there.
    Of a message that calls tools it is all that the template writes in the place of a content.
    """
    changed = {**messages[index], "content": MARK}
    calls = changed.pop("tool_calls", None)
    try:
        other = template.render([*messages[:index], changed, *messages[index + 1 :]], ask=ask)
    except DataError:  # a strict template takes no tool's result after an answer
        if not calls:
            raise
        return strict_call_span(messages, index, rendered, template, ask=ask)
    start = common_prefix_length(rendered, other)
    after = common_prefix_length(rendered[start:][::-1], other[start:][::-1])
    return start, len(rendered) - after


def strict_call_span(
    messages: Sequence[Message], index: int, rendered: str, template: ChatTemplate, *, ask: bool
) -> Span:
    """`content_span` of a call in a template that refuses another answer in its place, but not one without what
    follows up to the next question. How long it is, the conversation up to the call tells. Raises `DataError`."""
    rest = next((turn for turn in range(index, len(messages)) if messages[turn]["role"] == "user"), len(messages))
    answer = {"role": "assistant", "content": MARK}
    start = common_prefix_length(rendered, template.render([*messages[:index], answer, *messages[rest:]], ask=ask))
    before, after = template.render(messages[:index]), template.render(messages[: index + 1], ask=False)
    written = after[len(before) :].removesuffix(
        template.render([*messages[:index], answer], ask=False).rpartition(MARK)[2]
    )
    if not after.startswith(before) or not rendered.startswith(written, start):
        raise DataError("the chat template writes tool calls in other ways in later turns")
    return start, start + len(written)


def earlier_answer_spans(
    messages: Sequence[Message], prompt: str, last: LastAnswer, template: ChatTemplate
) -> list[Span]:
    """Character ranges in the prompt of the answers before the last, with what begins and ends the last one.

    Raises `DataError` for a conversation that is too long for a template that changes earlier answers.
    """
    answers = [turn for turn, message in enumerate(messages) if message["role"] == "assistant"]
    spans = content_spans(messages, answers, prompt, template)
    learnt = [span for span, turn in zip(spans, answers, strict=True) if is_learnt(messages[turn])]
    return [whole_span(prompt, start, end, last) for start, end in learnt if prompt[start:end].strip()]


def removable_spans(rendered: RenderedExample) -> list[Span]:
    """Character ranges of what may be left out of a prompt that is too long: all contents, oldest first, but those of
    system messages. Nothing for text, or for a conversation in which they cannot be found."""
    if rendered.template is None:
        return []
    before = rendered.template.prepare(rendered.example.messages)[:-1]
    turns = [turn for turn, message in enumerate(before) if message["role"] != "system"]
    try:
        whole = rendered.template.render(before)
        return content_spans(before, turns, whole, rendered.template) if whole.startswith(rendered.prompt) else []
    except DataError:
        return []


def content_spans(messages: Sequence[Message], turns: list[int], rendered: str, template: ChatTemplate) -> list[Span]:
    """`content_span` of several messages of a conversation that is rendered for generation.

    Raises `DataError` for too many, with a template that changes them.
    """
    spans = marked_spans(messages, turns, rendered, template) if len(turns) > FEW_ANSWERS else None
    if spans is None:
        if len(turns) > MOST_ANSWERS:
            raise DataError(f"has {len(messages)} messages, but the chat template changes answers: split it")
        spans = [content_span(messages, turn, rendered, template) for turn in turns]
    return spans


def whole_span(prompt: str, start: int, end: int, last: LastAnswer) -> Span:
    """The range of an answer with what begins and ends the last one, and without blanks around it where that is not."""
    if last.begin and prompt[:start].endswith(last.begin):
        start -= len(last.begin)
    else:
        start += len(prompt[start:end]) - len(prompt[start:end].lstrip())
    if not prompt.startswith(last.end, end):
        end -= len(prompt[start:end]) - len(prompt[start:end].rstrip())
    return start, end + len(last.end) * prompt.startswith(last.end, end)


def marked_spans(
    messages: Sequence[Message], turns: list[int], rendered: str, template: ChatTemplate
) -> list[Span] | None:
    """`content_spans`, found in one rendering with marks in the place of all these contents.

    The work grows with the length of the conversation, not with its square. None if the template does more with a
    content than to copy or trim it, or one of the messages calls tools.
    """
    chosen = set(turns)
    if any("tool_calls" in messages[turn] for turn in turns):
        return None
    marked = [
        {**message, "content": f"{MARK}{turn}{MARK}"} if turn in chosen else message
        for turn, message in enumerate(messages)
    ]
    try:
        parts = re.split(f"{MARK}([0-9]+){MARK}", template.render(marked))
    except DataError:
        return None
    if parts[1::2] != [str(turn) for turn in turns]:
        return None
    contents = [messages[turn]["content"] for turn in turns]
    for written in (contents, [content.strip() for content in contents]):
        if "".join(part + content for part, content in zip(parts[::2], [*written, ""], strict=True)) == rendered:
            spans, at = [], 0
            for part, content in zip(parts[::2], written, strict=False):
                spans.append((at + len(part), at + len(part) + len(content)))
                at += len(part) + len(content)
            return spans
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
