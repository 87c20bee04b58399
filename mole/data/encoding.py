"""From a data file to batches: the chat template, tokens and labels, the held-out split, padding.

What generation sees is what training saw: the token ids of `render_prompt` are the beginning of every example, and the
answer is tokenised on its own behind them.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from typing import TYPE_CHECKING, Any, NamedTuple

from mole.config import DataConfig
from mole.core.errors import DataError
from mole.core.text import one_line
from mole.data.examples import Example, Message, Rejected, Rows, none_left, read_examples

if TYPE_CHECKING:
    import torch

__all__ = [
    "PLAIN_TEMPLATE", "Collator", "Datasets", "Encoded", "Example", "Message", "Rejected", "Report", "Rows",
    "build_datasets", "chat_template", "encode", "encode_all", "read_examples", "render_prompt",
]  # fmt: skip

IGNORED = -100
"""The label of tokens that carry no loss."""

PLAIN_TEMPLATE = """\
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
    return template or PLAIN_TEMPLATE


def render_prompt(messages: Sequence[Message], tokenizer: Any) -> str:
    """The text before the assistant's next answer; tokenise it with `add_special_tokens=False`.

    Templates of thinking models are asked for an answer without thoughts, as the training data holds none. Raises
    `DataError` when the template refuses the messages.
    """
    return render(messages, tokenizer, add_generation_prompt=True)


def render(messages: Sequence[Message], tokenizer: Any, *, add_generation_prompt: bool) -> str:
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


class Encoded(NamedTuple):
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


class Rendered(NamedTuple):
    """An example as text in two parts, tokenised apart."""

    prompt: str
    answer: str
    learnt: list[tuple[int, int]]
    """Character ranges of earlier answers in the prompt."""


def encode(example: Example, tokenizer: Any, max_length: int) -> Encoded:
    """The example as at most `max_length` token ids and labels.

    Loss is on every answer of the assistant and the token that ends it, in a text row on everything. Too long a prompt
    loses its oldest tokens; only an answer that leaves no room for one token of prompt is cut, at its end.
    Raises `DataError` when the template refuses it or nothing is left to learn.
    """
    (result,) = encode_all([example], tokenizer, max_length)
    if isinstance(result, DataError):
        raise result
    return result


def encode_all(examples: Iterable[Example], tokenizer: Any, max_length: int) -> Iterator[Encoded | DataError]:
    """`encode` for many at once, which is far faster; in place of an example that cannot be used, its error."""
    rendered: list[Rendered | DataError] = []
    for example in examples:
        try:
            rendered.append(render_example(example, tokenizer))
        except DataError as error:
            rendered.append(error)
    good = [item for item in rendered if not isinstance(item, DataError)]
    prompts = tokenise([item.prompt for item in good], tokenizer)
    answers = tokenise([item.answer for item in good], tokenizer)
    encoded = (
        assemble(prompt, learnt_tokens(item, prompt, tokenizer), answer, max_length)
        for item, prompt, answer in zip(good, prompts, answers, strict=True)
    )
    return (item if isinstance(item, DataError) else next(encoded) for item in rendered)


def tokenise(texts: list[str], tokenizer: Any) -> list[list[int]]:
    """Token ids of each text, nothing added."""
    return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []


def render_example(example: Example, tokenizer: Any) -> Rendered:
    """The example's text, the last answer apart. Raises `DataError` when the template refuses it or leaves it out."""
    eos = tokenizer.eos_token or ""
    if example.text is not None:
        adds_bos = tokenizer.bos_token is not None and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]
        return Rendered("", (tokenizer.bos_token if adds_bos else "") + example.text + eos, [])
    prompt = render_prompt(example.prompt, tokenizer)
    whole = render(example.messages, tokenizer, add_generation_prompt=False)
    target = example.target
    # A template that rewrites the prompt once the answer is there gets the plain answer behind the prompt it was given.
    answer = whole[len(prompt) :].rstrip() if whole.startswith(prompt) else target
    bare = target.strip()
    check_rendered("question", example.prompt[-1]["content"] if example.prompt else "", prompt)
    check_rendered("answer", bare, answer)
    start = answer.find(bare) if answer.lstrip().startswith(bare) else answer.rfind(bare)
    ending = answer[start + len(bare) :] if start >= 0 else ""
    if start >= 0 and not ending:
        answer, ending = answer + eos, eos
    return Rendered(prompt, answer, earlier_answers(example.prompt, prompt, ending, tokenizer))


def check_rendered(part: str, text: str, rendered: str) -> None:
    """See that a message is in the template's text, by its last word: templates may trim it, and take thoughts away.

    Raises `DataError`: a model trained on such rows would learn from blanks.
    """
    words = text.split()
    if words and words[-1] not in rendered:
        raise DataError(f"the chat template leaves out the {part}")


def earlier_answers(messages: list[Message], prompt: str, ending: str, tokenizer: Any) -> list[tuple[int, int]]:
    """Where in the prompt's text the answers before the last are, each with the end-of-turn text behind it."""
    ranges = []
    for turn, message in enumerate(messages):
        if message["role"] == "assistant":
            content = message["content"].strip()
            before = render_prompt(messages[:turn], tokenizer) if turn else ""
            start = prompt.find(content, common_length(prompt, before))
            if start >= 0:
                end = start + len(content)
                ranges.append((start, end + len(ending) * prompt.startswith(ending, end)))
    return ranges


def common_length(one: str, other: str) -> int:
    """How many characters two texts share at their beginning."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


def learnt_tokens(item: Rendered, prompt: list[int], tokenizer: Any) -> list[bool]:
    """For each token of the prompt whether it belongs to an earlier answer."""
    if not item.learnt or not tokenizer.is_fast:  # only fast tokenizers tell where a token's text is
        return [False] * len(prompt)
    offsets = tokenizer(item.prompt, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return [
        any(start < end_of_range and end > start_of_range for start_of_range, end_of_range in item.learnt)
        for start, end in offsets["offset_mapping"]
    ]


def assemble(prompt: list[int], learnt: list[bool], answer: list[int], max_length: int) -> Encoded | DataError:
    """Prompt and answer in one, cut to `max_length`; a `DataError` when no token is left to learn."""
    kept = min(len(prompt), max(max_length - len(answer), 1))
    ids = (prompt[len(prompt) - kept :] + answer)[:max_length]
    labels = [token if wanted else IGNORED for token, wanted in zip(prompt, learnt, strict=True)]
    labels = (labels[len(prompt) - kept :] + answer)[:max_length]
    # The first token is never predicted, having nothing before it.
    if all(label == IGNORED for label in labels[1:]):
        return DataError("nothing is left to learn from: the answer has no tokens")
    return Encoded(ids, labels, len(prompt) - kept, kept + len(answer) - len(ids))


@dataclass
class Report:
    """What became of the data: counts of rows and tokens, and the first reasons for rejecting rows."""

    rows: int
    eval_rows: int
    rejected: int
    truncated: int
    shape: str
    fingerprint: str
    tokens: int
    answer_tokens: int
    rejections: list[str] = field(default_factory=list)
    """The first ten, as `row 7: completion is null`; those of a held-out file say so."""

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON values."""
        return asdict(self)


@dataclass
class Datasets:
    """Rows of `{"input_ids": [int], "labels": [int]}` to learn from and those held out (possibly none)."""

    train: list[dict[str, list[int]]]
    eval: list[dict[str, list[int]]]
    report: Report


def build_datasets(config: DataConfig, tokenizer: Any, seed: int) -> Datasets:
    """Read, encode and split the data of a run; a pure function of the files, the tokenizer and `seed`.

    Held out is the file `config.eval_path`, else `config.eval_fraction` of the rows, at random but never all of them.
    Raises `DataError` as `read_examples` does, and when no row can be encoded.
    """
    source = read_examples(config.path, config.columns)
    train, rejected, cut = encode_rows(source, tokenizer, config.max_length, "data.path")
    reasons, fingerprint = list(map(str, rejected)), source.fingerprint
    if config.eval_path:
        heldout = read_examples(config.eval_path, config.columns, setting="data.eval_path")
        evaluation, eval_rejected, eval_cut = encode_rows(heldout, tokenizer, config.max_length, "data.eval_path")
        reasons += [f"held-out {item}" for item in eval_rejected]
        cut += eval_cut
        fingerprint = sha256(f"{fingerprint} {heldout.fingerprint}".encode()).hexdigest()
    else:
        train, evaluation = split(train, config.eval_fraction, seed)
    report = Report(
        rows=len(train),
        eval_rows=len(evaluation),
        rejected=len(reasons),
        truncated=cut,
        shape=source.shape,
        fingerprint=fingerprint,
        tokens=sum(len(row["input_ids"]) for row in train),
        answer_tokens=sum(label != IGNORED for row in train for label in row["labels"]),
        rejections=reasons[:10],
    )
    return Datasets(train, evaluation, report)


def encode_rows(
    source: Rows, tokenizer: Any, max_length: int, setting: str
) -> tuple[list[dict[str, list[int]]], list[Rejected], int]:
    """The rows as ids and labels, all that were rejected, and how many were truncated. Raises `DataError` for none."""
    rows, rejected, truncated = [], list(source.rejected), 0
    encoded = encode_all(source.examples, tokenizer, max_length)
    for example, item in zip(source.examples, encoded, strict=True):
        if isinstance(item, DataError):
            rejected.append(Rejected(example.row, str(item)))
        else:
            rows.append({"input_ids": item.input_ids, "labels": item.labels})
            truncated += item.truncated
    rejected.sort(key=lambda item: item.row)
    if not rows:
        raise none_left(source.source, rejected, setting)
    return rows, rejected, truncated


def split(rows: list[Any], fraction: float, seed: int) -> tuple[list[Any], list[Any]]:
    """Rows to learn from and a random `fraction` held out, both in their order: at least one of each if it can be."""
    count = min(max(round(len(rows) * fraction), 1), len(rows) - 1) if fraction else 0
    held = set(random.Random(seed).sample(range(len(rows)), count))
    return [row for i, row in enumerate(rows) if i not in held], [rows[i] for i in sorted(held)]


@dataclass
class Collator:
    """Rows of ids and labels → right-padded tensors `input_ids`, `attention_mask`, `labels` (batch, longest)."""

    pad_token_id: int

    def __call__(self, rows: Sequence[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        import torch

        longest = max(len(row["input_ids"]) for row in rows)

        def padded(values: Iterable[list[int]], filler: int) -> torch.Tensor:
            return torch.tensor([row + [filler] * (longest - len(row)) for row in values])

        return {
            "input_ids": padded((row["input_ids"] for row in rows), self.pad_token_id),
            "attention_mask": padded(([1] * len(row["input_ids"]) for row in rows), 0),
            "labels": padded((row["labels"] for row in rows), IGNORED),
        }


LARGEST_PART = 256


def by_length(batch: dict[str, torch.Tensor], overhead: int) -> list[dict[str, torch.Tensor]]:
    """A right-padded batch `(rows, longest)` in parts of like length, each as wide as its longest row.

    The parts have the same tokens and less padding. They are such that the tokens with padding, and `overhead` tokens'
    worth of work for every part, are fewest.
    """
    lengths = batch["attention_mask"].sum(-1)
    order = lengths.argsort(stable=True)
    ends = partition(lengths[order].tolist(), overhead)
    if len(ends) == 1:
        return [batch]
    parts = zip([0, *ends], ends, strict=False)
    return [
        {name: values[order[start:end], : lengths[order[end - 1]]] for name, values in batch.items()}
        for start, end in parts
    ]


def partition(lengths: Sequence[int], overhead: int) -> list[int]:
    """Where ascending lengths are best cut: the end of every part, the cheapest sum of `rows · longest + overhead`.

    No part has more than `LARGEST_PART` rows, so that finding them takes no time.
    """
    best, begins = [0], [0]
    for end, longest in enumerate(lengths, start=1):
        cost, start = min(
            (best[start] + (end - start) * longest + overhead, start)
            for start in range(max(0, end - LARGEST_PART), end)
        )
        best.append(cost)
        begins.append(start)
    ends = [len(lengths)]
    while begins[ends[0]]:
        ends.insert(0, begins[ends[0]])
    return ends
