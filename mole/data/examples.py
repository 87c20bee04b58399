"""Converting rows of five shapes into `Example`s; rows that cannot be used are rejected with number and reason."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from string import ascii_uppercase
from typing import Any

from mole.core.errors import DataError, brief
from mole.core.text import one_line
from mole.data.readers import read_records

Message = dict[str, str]

QUESTION_COLUMNS = ("question", "prompt", "instruction")
ANSWER_COLUMNS = ("answer", "answerKey")
SHAPES: dict[str, tuple[tuple[str, ...], ...]] = {
    "multiple choice": (QUESTION_COLUMNS, ("choices",), ANSWER_COLUMNS),
    "messages": (("messages",),),
    "prompt/completion": (("prompt",), ("completion",)),
    "instruction/input/output": (("instruction",), ("output",)),
    "text": (("text",),),
}
"""The shapes in the order in which they are tried; a row needs one column of each group."""
OPTIONAL_FIELDS = ("input",)
FIELDS = sorted({name for groups in SHAPES.values() for group in groups for name in group} | {*OPTIONAL_FIELDS})
ROLES = ("system", "user", "assistant")
ANSWER_FORMAT = re.compile(r"Answer format:[ \t]*(\S[^\n]*)")
MAX_LABELS = 100
LONGEST_NAME = 60
"""Characters of a column's name in an error."""


@dataclass(frozen=True, slots=True)
class Example:
    """One row: a conversation that ends with the assistant's answer, or plain `text`.

    Attributes:
        messages: the conversation, `{"role", "content"}` each; empty for a text row.
        text: the text of a text row, otherwise None.
        choices: in multiple choice, the strings to score as the assistant's answer.
        answer: in multiple choice, the correct one of `choices`, which is also the last message.
        row: number of the row in its file, from 1 (in JSONL, its line).
    """

    messages: tuple[Message, ...] = ()
    text: str | None = None
    choices: tuple[str, ...] | None = None
    answer: str | None = None
    row: int = 0

    @property
    def prompt(self) -> list[Message]:
        """The conversation before the last answer; empty for a text row."""
        return list(self.messages[:-1])

    @property
    def target(self) -> str:
        """The text to learn: the content of the last message, or `text`."""
        return self.messages[-1]["content"] if self.messages else self.text or ""

    def with_target(self, answer: str) -> Example:
        """The same conversation with another last answer, e.g. one of `choices`."""
        return replace(self, messages=(*self.messages[:-1], {"role": "assistant", "content": answer}))


@dataclass(frozen=True)
class RejectedRow:
    """A row that cannot be used: its number from 1 (in JSONL, its line) and the reason."""

    row: int
    reason: str

    def __str__(self) -> str:
        return f"row {self.row}: {self.reason}"


@dataclass
class ExampleSet:
    """The usable examples of a file or hub data set, in order, and the rejected rows.

    Attributes:
        shape: the shape of the rows, a key of `SHAPES`.
        source: the path or hub id.
        fingerprint: sha256 of the content that was read.
        complete: whether these are all rows of the source.
        notices: what was guessed about the source, in sentences.
    """

    examples: list[Example]
    rejected: list[RejectedRow]
    shape: str
    source: str
    fingerprint: str = field(repr=False)
    complete: bool = True
    notices: list[str] = field(default_factory=list)


def read_examples(
    path: str,
    columns: dict[str, str] | None = None,
    limit: int | None = None,
    *,
    field: str = "data.path",
    peek: bool = False,
) -> ExampleSet:
    """Read a JSON, JSONL, CSV or Parquet file, or a hub data set `owner/name[:config[:split]]`.

    Args:
        path: the file, or the hub id when there is no such file.
        columns: `{field: column}` where the source's column names differ.
        limit: read only the first rows.
        field: the setting that errors name.
        peek: read no more of a file than `limit` rows need.

    Raises `DataError` for a missing file, malformed content (with its line), no known shape (with the columns found),
    a mapped column that is missing, or no usable row (with the first reasons).
    """
    records = read_records(path, limit, field, peek=peek)
    found = records.columns
    mapping = check_mapping(columns or {}, found, path)
    shape = shape_of({*found, *mapping}, {*mapping}) if found else "none"
    if shape is None:
        known = "; ".join(" + ".join("/".join(group) for group in groups) for groups in SHAPES.values())
        raise DataError(
            f"{path}: its columns ({join_names(found)}) fit no known shape; the shapes are: {known}. "
            "Map your columns with data.columns, e.g. data.columns.prompt=question.",
            field="data.columns",
        )
    examples, rejected = [], []
    records.rows.reverse()
    while records.rows:  # pop each record, so that millions of them are not kept beside the examples
        number, value = records.rows.pop()
        try:
            examples.append(to_example(rename_columns(value, mapping), shape, number))
        except DataError as error:
            rejected.append(RejectedRow(number, str(error)))
    if any(example.choices for example in examples):
        shape = "multiple choice"
    if not examples:
        raise no_usable_rows(path, rejected, field)
    return ExampleSet(examples, rejected, shape, path, records.fingerprint, records.complete, records.notices)


def no_usable_rows(path: str, rejected: list[RejectedRow], field: str) -> DataError:
    """The error for data without a usable row: the number of rejected rows, and the first reasons."""
    reasons = "; ".join(map(str, rejected[:3]))
    text = f"{path}: no usable row, {len(rejected)} rejected: {reasons}."
    return DataError(text, field=field, rejected=rejected)


def check_mapping(columns: Mapping[str, str], found: list[str], path: str) -> dict[str, str]:
    """`columns` as a dict. Raises `DataError` for an unknown field, or a column that is not in the file."""
    for name, column in columns.items():
        setting = f"data.columns.{name}"
        if name not in FIELDS:
            raise DataError(
                f"{setting} is not a field of an example; the fields are: {', '.join(FIELDS)}.", field=setting
            )
        if column not in found:
            there = join_names(found)
            raise DataError(f"{setting} is {column!r}, but {path} has no such column; it has: {there}.", field=setting)
    return dict(columns)


def join_names(names: list[str], most: int = 20) -> str:
    """Column names on one line, at most `most` of them."""
    shown = [shortened(name, LONGEST_NAME) for name in names[:most]]
    return ", ".join(shown + ["…"] * (len(names) > most)) or "none"


def shortened(text: str, most: int) -> str:
    """A text on one line, cut to at most `most` characters."""
    text = " ".join(text[: 4 * most].split())
    return text if len(text) <= most else text[: most - 1] + "…"


def rename_columns(value: Any, mapping: Mapping[str, str]) -> Any:
    """A record with the mapped columns renamed to their fields; values that are not records stay as they are."""
    if not isinstance(value, dict) or not mapping:
        return value
    taken = {*mapping.values()}
    rest = {key: entry for key, entry in value.items() if key not in taken}
    return rest | {name: value[column] for name, column in mapping.items() if column in value}


def shape_of(names: set[str], mapped: set[str]) -> str | None:
    """The first shape whose columns are in `names` and that uses all `mapped` fields; None if there is none."""
    for shape, groups in SHAPES.items():
        used = {name for group in groups for name in group}.union(OPTIONAL_FIELDS, ANSWER_COLUMNS)
        if mapped <= used and all(names.intersection(group) for group in groups):
            return shape
    return None


def to_example(value: Any, shape: str, row: int) -> Example:
    """The example in one record of the given shape. Raises `DataError` whose message is the reason only."""
    if isinstance(value, DataError):
        raise value
    if not isinstance(value, dict):
        raise DataError(f"is {json_type(value)}, not an object with columns")
    if shape == "text":
        return Example(text=text_value(value, "text"), row=row)
    if shape == "messages":
        return Example(messages=parse_messages(parse_nested(value, "messages")), row=row)
    if shape == "multiple choice":
        choices, answer = parse_choices(parse_nested(value, "choices"), first_value(value, ANSWER_COLUMNS))
        return chat_example(question_text(value, QUESTION_COLUMNS), answer, row, choices)
    asking, answering = ("prompt",), "completion"
    if shape != "prompt/completion":
        asking, answering = ("instruction",), "output"
    prompt = question_text(value, asking)
    labels = ANSWER_FORMAT.findall(prompt)
    if labels and any(value.get(name) is not None for name in ANSWER_COLUMNS):
        choices, answer = parse_answer_format(
            labels[-1].strip(), text_value(value, answering), first_value(value, ANSWER_COLUMNS)
        )
        return chat_example(prompt, answer, row, choices)
    return chat_example(prompt, text_value(value, answering), row)


def chat_example(prompt: str, answer: str, row: int, choices: tuple[str, ...] | None = None) -> Example:
    """An example of one question and its answer."""
    messages = ({"role": "user", "content": prompt}, {"role": "assistant", "content": answer})
    return Example(messages=messages, choices=choices, answer=answer if choices else None, row=row)


def question_text(value: Mapping[str, Any], names: Iterable[str]) -> str:
    """The first of the named columns that is set, followed by `input`. Raises `DataError` when both are empty."""
    name = next((name for name in names if value.get(name) is not None), next(iter(names)))
    extra = text_value(value, "input") if value.get("input") not in (None, "") else ""
    if extra and value.get(name) in (None, ""):
        return extra
    return f"{text_value(value, name)}\n\n{extra}" if extra else text_value(value, name)


def parse_messages(messages: Any) -> tuple[Message, ...]:
    """The messages up to the assistant's last one. Raises `DataError` for an invalid message or a missing answer."""
    if not isinstance(messages, list):
        raise DataError(f"messages is {json_type(messages)}, not a list")
    result: list[Message] = []
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict):
            raise DataError(f"message {number} is {json_type(message)}, not an object with role and content")
        role = message.get("role")
        if role not in ROLES:
            raise DataError(f"message {number} has the role {brief(role)}, not one of {', '.join(ROLES)}")
        content = text_value(message, "content", f"message {number}'s content")
        result.append({"role": role, "content": content})
    while result and result[-1]["role"] != "assistant":
        result.pop()
    if not result:
        raise DataError("messages contains no answer of the assistant to learn from")
    if len(result) == 1:
        raise DataError("messages contains nothing before the assistant's answer")
    return tuple(result)


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


def parse_nested(value: Mapping[str, Any], name: str) -> Any:
    """The value of a column with a list or object, which CSV holds as JSON text. Raises `DataError`."""
    entry = value.get(name)
    if isinstance(entry, str):
        try:
            return json.loads(entry)
        except ValueError as error:
            raise DataError(f"{name} is text that is not JSON: {one_line(error)}") from None
    return entry


def text_value(value: Mapping[str, Any], name: str, label: str = "") -> str:
    """The text of a column. Raises `DataError` when it is missing, null, blank or not text."""
    entry, label = value.get(name), label or name
    if entry is None:
        raise DataError(f"{label} is null" if name in value else f"{label} is missing")
    if not isinstance(entry, str):
        raise DataError(f"{label} is {json_type(entry)}, not text")
    if not entry.strip():
        raise DataError(f"{label} is empty")
    try:
        entry.encode()
    except UnicodeEncodeError:
        raise DataError(f"{label} is not valid Unicode (half of a surrogate pair)") from None
    return entry


def json_type(value: Any) -> str:
    """The type of a JSON value in words."""
    kinds = {type(None): "null", bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list"}
    return kinds.get(type(value), "an object" if isinstance(value, dict) else f"a {type(value).__name__}")
