"""Converting rows of five shapes into `Example`s; rows that cannot be used are rejected with number and reason."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from string import ascii_uppercase
from typing import Any

from mole.core.errors import DataError, brief
from mole.data.messages import Message, parse_history, parse_messages
from mole.data.readers import read_records
from mole.data.shapes import (
    ANSWER_COLUMNS,
    LABEL,
    MEDIA_COLUMNS,
    QUESTION_COLUMNS,
    check_mapping,
    ignored_columns,
    no_shape,
    resolve_columns,
    shortened,
)
from mole.data.tools import parse_tools
from mole.data.values import json_type, parse_nested, text_value

ANSWER_FORMAT = re.compile(r"Answer format:[ \t]*(\S[^\n]*)")
MAX_LABELS = 100
BAD_ANSWER = "its label is false: a bad answer is not learnt"


@dataclass(frozen=True, slots=True)
class Example:
    """One row: a conversation that ends with the assistant's answer, or plain `text`.

    Attributes:
        messages: the conversation, `{"role", "content"}` each; empty for a text row.
        text: the text of a text row, otherwise None.
        choices: in multiple choice, the strings to score as the assistant's answer.
        answer: in multiple choice, the correct one of `choices`, which is also the last message.
        tools: those that the assistant may call, `{"type", "function": {"name", …}}`.
        row: number of the row in its file, from 1 (in JSONL, its line).
    """

    messages: tuple[Message, ...] = ()
    text: str | None = None
    choices: tuple[str, ...] | None = None
    answer: str | None = None
    row: int = 0
    tools: tuple[dict[str, Any], ...] = ()

    @property
    def prompt(self) -> list[Message]:
        """The conversation before the last answer; empty for a text row."""
        return list(self.messages[:-1])

    @property
    def target(self) -> str:
        """The text to learn: the content of the last message and what it calls, as JSON; or `text`."""
        if not self.messages:
            return self.text or ""
        calls = self.messages[-1].get("tool_calls")
        return self.messages[-1]["content"] + (json.dumps(calls, ensure_ascii=False) if calls else "")

    def with_target(self, answer: str) -> Example:
        """The same conversation with another last answer, e.g. one of `choices`."""
        return replace(self, messages=(*self.messages[:-1], {"role": "assistant", "content": answer}))


@dataclass(frozen=True)
class RejectedRow:
    """A row that cannot be used: its number from 1 (in JSONL, its line), the reason, and of several files its own."""

    row: int
    reason: str
    source: str = ""

    def __str__(self) -> str:
        return f"{f'{self.source} ' if self.source else ''}row {self.row}: {self.reason}"


@dataclass
class ExampleSet:
    """The usable examples of a file or hub data set, in order, and the rejected rows.

    Attributes:
        shape: the shape of the rows, a key of `SHAPES`.
        source: the path or hub id.
        fingerprint: sha256 of the content that was read.
        complete: whether these are all rows of the source.
        notices: what was guessed about the source, in sentences.
        ignored_columns: the columns that are not used.
    """

    examples: list[Example]
    rejected: list[RejectedRow]
    shape: str
    source: str
    fingerprint: str = field(repr=False)
    complete: bool = True
    notices: list[str] = field(default_factory=list)
    ignored_columns: list[str] = field(default_factory=list)


def read_examples(
    path: str,
    columns: dict[str, str] | None = None,
    limit: int | None = None,
    *,
    field: str = "data.path",
    peek: bool = False,
    name: str | None = None,
    split: str | None = None,
) -> ExampleSet:
    """Read a JSON, JSONL, CSV or Parquet file, or a hub data set `owner/name[:config[:split]]`.

    Args:
        path: the file, or the hub id when there is no such file.
        columns: `{field: column}` where the source's column names differ.
        limit: read only the first rows.
        field: the setting that errors name.
        peek: read no more of a file than `limit` rows need.
        name, split: configuration and split of a hub data set, if the id does not name them.

    Raises `DataError` for a missing file, malformed content (with its line), no known shape (with the columns found),
    a mapped column that is missing, or no usable row (with the first reasons).
    """
    records = read_records(path, limit, field, peek=peek, name=name, split=split)
    found = records.columns
    shape, mapping = resolve_columns(found, check_mapping(columns or {}, found, path))
    shape = shape if found else "none"
    if shape is None:
        raise no_shape(path, found, records.rows)
    refuse = refusals(found, mapping, shape)
    examples, rejected = [], []
    records.rows.reverse()
    while records.rows:  # pop each record, so that millions of them are not kept beside the examples
        number, value = records.rows.pop()
        try:
            refuse(value)
            examples.append(to_example(rename_columns(value, mapping), shape, number))
        except DataError as error:
            rejected.append(RejectedRow(number, str(error)))
    if not examples:
        raise no_usable_rows(path, rejected, field)
    labelled = any(example.choices for example in examples)
    ignored = ignored_columns(found, mapping, shape, labelled)
    if any(item.reason == BAD_ANSWER for item in rejected):
        ignored.remove(LABEL)
    return ExampleSet(
        examples,
        rejected,
        "multiple choice" if labelled else shape,
        path,
        records.fingerprint,
        records.complete,
        records.notices,
        ignored,
    )


def no_usable_rows(path: str, rejected: list[RejectedRow], field: str) -> DataError:
    """The error for data without a usable row: the number of rejected rows, and the first reasons."""
    reasons = "; ".join(map(str, rejected[:3]))
    text = f"{path}: no usable row, {len(rejected)} rejected: {reasons}."
    return DataError(text, field=field, rejected=rejected)


def rename_columns(value: Any, mapping: Mapping[str, str]) -> Any:
    """A record with the mapped columns renamed to their fields; values that are not records stay as they are."""
    if not isinstance(value, dict) or not mapping:
        return value
    taken = {*mapping.values()}
    rest = {key: entry for key, entry in value.items() if key not in taken}
    return rest | {name: value[column] for name, column in mapping.items() if column in value}


def parse_choices(choices: Any, answer: Any) -> tuple[tuple[str, ...], str]:
    """The choices and the correct one, from a list of texts or `{"text": […], "label": […]}`.

    The answer may be a label (`A`, `B`, … by default), a text, or an index from 0. Raises `DataError`.
    """
    texts, labels = choices, None
    if isinstance(choices, dict):
        texts, labels = choices.get("text"), choices.get("label")
    if not isinstance(texts, list) or len(texts) < 2:
        raise DataError("choices is neither a list of at least two texts nor an object with text and label")
    texts = [text_value({"": text}, "", f"choice {number}") for number, text in enumerate(texts, start=1)]
    if labels is not None and (not isinstance(labels, list) or len(labels) != len(texts)):
        raise DataError("choices has a different number of labels and texts")
    names = [str(label) for label in labels] if labels else list(ascii_uppercase[: len(texts)])
    given = answer.strip() if isinstance(answer, str) else answer
    wanted = str(given)
    # The file's own labels go before texts, texts before the default labels A, B, …: a text may be "A" or "1".
    if labels and wanted in names:
        return tuple(texts), texts[names.index(wanted)]
    if given in texts:
        return tuple(texts), wanted
    if wanted in names:
        return tuple(texts), texts[names.index(wanted)]
    if not isinstance(given, bool) and wanted.isdecimal() and len(wanted) < 10 and int(wanted) < len(texts):
        return tuple(texts), texts[int(wanted)]
    raise DataError(f"the answer {brief(answer)} is not one of the choices, neither by label, text nor index from 0")


def parse_answer_format(labels: str, output: str, answer: Any) -> tuple[tuple[str, ...], str]:
    """The choices and the correct one of a row with an "Answer format: a/b/c" line.

    The choices are the output with the answer replaced by each label. Raises `DataError`.
    """
    names = [name.strip() for name in labels.split("/") if name.strip()]
    given = str(answer).strip()
    if not 2 <= len(names) <= MAX_LABELS or given not in names:
        raise DataError(f"the answer {brief(answer)} is not in its Answer format, {labels}")
    # The last occurrence of the answer as a whole word: earlier ones may be in an explanation.
    places = list(re.finditer(rf"(?<!\w){re.escape(given)}(?!\w)", output))
    if not places:
        raise DataError(f"the output does not contain its answer, {brief(given)}")
    before, after = output[: places[-1].start()], output[places[-1].end() :]
    return tuple(f"{before}{name}{after}" for name in names), output


def first_value(value: Mapping[str, Any], names: Iterable[str]) -> Any:
    """The value of the first of the named columns that is not null. Raises `DataError` when all are."""
    for name in names:
        if value.get(name) is not None:
            return value[name]
    raise DataError(f"{next(iter(names))} is missing or null")


def to_example(value: Any, shape: str, row: int) -> Example:
    """The example in one record of the given shape. Raises `DataError` whose message is the reason only."""
    if isinstance(value, DataError):
        raise value
    if not isinstance(value, dict):
        raise DataError(f"is {json_type(value)}, not an object with columns")
    if shape == "text":
        return Example(text=text_value(value, "text"), row=row)
    if shape == "messages":
        messages = parse_messages(parse_nested(value, "messages"), system=system_text(value))
        return Example(messages, row=row, tools=parse_tools(value.get("tools")))
    if shape == "multiple choice":
        choices, answer = parse_choices(parse_nested(value, "choices"), first_value(value, ANSWER_COLUMNS))
        return chat_example(value, question_text(value, QUESTION_COLUMNS), answer, row, choices)
    asking, answering = ("prompt",), "completion"
    if shape != "prompt/completion":
        asking, answering = ("instruction",), "output"
    elif is_conversation(value.get("prompt")) or is_conversation(value.get("completion")):
        return Example(parse_prompt_and_completion(value), row=row, tools=parse_tools(value.get("tools")))
    prompt = question_text(value, asking)
    labels = ANSWER_FORMAT.findall(prompt)
    if labels and any(value.get(name) is not None for name in ANSWER_COLUMNS):
        choices, answer = parse_answer_format(
            labels[-1].strip(), text_value(value, answering), first_value(value, ANSWER_COLUMNS)
        )
        return chat_example(value, prompt, answer, row, choices)
    return chat_example(value, prompt, text_value(value, answering, numbers=True), row)


def chat_example(
    value: Mapping[str, Any], prompt: str, answer: str, row: int, choices: tuple[str, ...] | None = None
) -> Example:
    """An example of one question and its answer, after the row's system message and history if there are any."""
    messages: tuple[Message, ...] = ({"role": "user", "content": prompt}, {"role": "assistant", "content": answer})
    if value.get("history"):
        messages = (*parse_history(parse_nested(value, "history")), *messages)
    if system := system_text(value):
        messages = ({"role": "system", "content": system}, *messages)
    tools = parse_tools(value.get("tools"))
    return Example(messages, choices=choices, answer=answer if choices else None, row=row, tools=tools)


def system_text(value: Mapping[str, Any]) -> str:
    """The row's system message; empty if it has none. Raises `DataError`."""
    system = value.get("system")
    return "" if system is None or (isinstance(system, str) and not system.strip()) else text_value(value, "system")


def is_conversation(entry: Any) -> bool:
    """Whether a value is a list of messages."""
    return isinstance(entry, list) and bool(entry) and isinstance(entry[0], dict)


def parse_prompt_and_completion(value: Mapping[str, Any]) -> tuple[Message, ...]:
    """The messages of a row whose prompt or completion is a list of them; what is learnt is in the completion."""
    sides: list[list[Any]] = []
    for name, role in (("prompt", "user"), ("completion", "assistant")):
        entry = value.get(name)
        alone = [] if is_conversation(entry) else [{"role": role, "content": text_value(value, name, numbers=True)}]
        sides.append(alone or list(entry or []))
    prompt, completion = sides
    if value.get("history"):
        prompt = [*parse_history(parse_nested(value, "history")), *prompt]
    if value.get("input") not in (None, ""):
        prompt = with_input(prompt, text_value(value, "input", numbers=True))
    asked = [{**message, "weight": 0} if isinstance(message, dict) else message for message in prompt]
    return parse_messages([*asked, *completion], "completion", system_text(value))


def with_input(prompt: list[Any], extra: str) -> list[Any]:
    """Messages whose question is followed by the row's `input`."""
    *before, last = prompt
    if isinstance(last, dict) and last.get("role") == "user" and isinstance(last.get("content"), str):
        return [*before, {**last, "content": f"{last['content']}\n\n{extra}"}]
    return [*prompt, {"role": "user", "content": extra}]


def question_text(value: Mapping[str, Any], names: Sequence[str]) -> str:
    """The first of the named columns that is set, followed by `input`. Raises `DataError` when both are empty."""
    name = next((name for name in names if value.get(name) is not None), names[0])
    extra = text_value(value, "input", numbers=True) if value.get("input") not in (None, "") else ""
    if extra and value.get(name) in (None, ""):
        return extra
    asked = text_value(value, name, numbers=True)
    return f"{asked}\n\n{extra}" if extra else asked


def refusals(found: Sequence[str], mapping: Mapping[str, str], shape: str) -> Callable[[Any], None]:
    """What raises `DataError` for a record that must not be learnt: it has media, or its answer is a bad one."""
    used = {*mapping.values()}
    media = [name for name in found if name.lower() in MEDIA_COLUMNS and name not in used]
    labelled = LABEL in found and LABEL not in used and shape != "text"

    def refuse(value: Any) -> None:
        if not isinstance(value, dict):
            return
        for name in media:
            if value.get(name) not in (None, "", [], {}, [None]):
                raise DataError(f"has {shortened(name, 60)}; only text is learnt")
        if labelled and str(value.get(LABEL)).lower() == "false":
            raise DataError(BAD_ANSWER)

    return refuse
