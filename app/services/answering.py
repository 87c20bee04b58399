"""Replies to a message: one model after another, each streamed into its own column with its routing."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from app import settings
from app.services import device_policy
from app.services.chat_targets import check_target, target_label
from app.services.conversation import Turn, align_turns, history_of, model_messages, turns_of
from app.services.engine import ENGINE, PartialReply
from app.services.steering_options import overrides_text
from mole import runs
from mole.analysis.tables import escaped
from mole.chat.messages import Stage
from mole.core.errors import MoleError
from mole.core.redaction import redacted
from mole.core.thoughts import split_thought
from mole.mixture.steering import AS_TRAINED, Steering

MAX_COLUMNS = 4
"""The chosen target, and at most three to compare it with."""
UPDATE_SECONDS = 0.08
"""Minimum time between two updates of the page: more of them cannot be read, and the browser would fall behind."""
WAIT_SECONDS = 0.5
STAGES = {
    Stage.LOADING: "Loading {target} …",
    Stage.ENCODING: "Encoding the conversation …",
    Stage.GENERATING: "Reading the prompt …",
}
NOTE = "Routing overrides: "
"""How the note above a reply with routing overrides begins."""


@dataclass(frozen=True)
class ReplyRequest:
    """What all columns are asked: the settings of `mole.chat.ChatSettings`, the system prompt, where to compute."""

    settings: dict[str, Any]
    system: str = ""
    where: str = device_policy.CPU
    should_stop: Callable[[], bool] = lambda: False


@dataclass(frozen=True)
class ChatColumn:
    """One column: its target, its turns, of which the last one is to be answered, and its routing overrides."""

    target: str
    turns: list[Turn]
    steering: Steering = AS_TRAINED
    label: str = ""


@dataclass
class UIUpdate:
    """What changes on the page in the column number `place`; None for what stays as it is."""

    place: int = 0
    history: list[Any] | None = None
    view: dict[str, Any] | None = None
    status: str | None = None
    records: LastRecords | None = None


@dataclass
class LastRecords:
    """The routing records of the last replies.

    Attributes:
        by_target: that of each target's last reply, as [id, its overrides in words].
        by_place: the id of that of each column's reply to the last message.
    """

    by_target: dict[str, list[str]] = field(default_factory=dict)
    by_place: dict[int, str] = field(default_factory=dict)

    def to_compare(self, column: ChatColumn) -> tuple[str | None, str]:
        """The record that a reply with overrides is compared with, and what its routing was; (None, "") for none."""
        identifier, overrides = self.by_target.get(column.target, [None, ""])
        return (identifier, overrides or "as trained") if column.steering else (None, "")


def chat_columns(target: str, compare: list[str], steering: Steering, histories: list[list[Any]]) -> list[ChatColumn]:
    """The columns of a message: the chosen target with the overrides, and those beside it as trained."""
    main = turns_of(histories[0])
    columns = [ChatColumn(target, main, steering)]
    for other, history in zip(compare[: MAX_COLUMNS - 1], histories[1:], strict=False):
        columns.append(ChatColumn(other, align_turns(main, turns_of(history)), label=target_label(other)))
    if len(columns) > 1:
        columns[0] = replace(columns[0], label=target_label(target))
    return columns


def answer_columns(columns: list[ChatColumn], request: ReplyRequest, last: LastRecords) -> Iterator[UIUpdate]:
    """Answer in one column after another; an error in one is shown, and the next column goes on.

    `last` are the records of the replies before.
    """
    records, results = LastRecords(dict(last.by_target)), list[str]()
    yield UIUpdate(records=copy.deepcopy(records))
    for place, column in enumerate(columns):
        yield UIUpdate(place, history=history_of([*column.turns[:-1], pending_turn(column)]), view={"meta": None})
    for place, column in enumerate(columns):
        if request.should_stop():
            return
        try:
            for update in answer_column(place, column, request, records):
                result = f"**{escaped(column.label)}** · {update.status}" if column.label else update.status
                yield replace(update, status="\n\n".join([*results, result or ""]))
            yield UIUpdate(place, records=copy.deepcopy(records))
            results += [result or ""] if column.label else []
        except MoleError as error:
            whose = f"{escaped(column.label)}: " if column.label else ""
            results.append(f"**{whose}Not answered.** {escaped(redacted(str(error)))}")
            yield UIUpdate(place, status="\n\n".join(results))


def pending_turn(column: ChatColumn) -> Turn:
    """The last turn without an answer, with a note of the overrides."""
    overrides = overrides_text(column.steering, column.target)
    return Turn(column.turns[-1].user, note=overrides and NOTE + overrides)


def answer_column(place: int, column: ChatColumn, request: ReplyRequest, records: LastRecords) -> Iterator[UIUpdate]:
    """Answer in one column and remember its routing record. Raises `MoleError`."""
    check_target(column.target)
    settings.check_asked(column.turns[-1].user, request.system, request.settings["max_new_tokens"])
    yield UIUpdate(place, status="…")
    yield from wait_for_device(place, request)
    training = device_policy.competing_run()
    device = device_policy.reply_device(request.where, training)
    turn, (against, against_label) = pending_turn(column), records.to_compare(column)
    updated, sent = 0.0, 0
    last: PartialReply | None = None
    for reply in ENGINE.reply(
        column.target, model_messages(column.turns, request.system), request.settings, request.should_stop,
        steering=column.steering, against=against, device=device,
    ):  # fmt: skip
        if isinstance(reply, Stage):
            yield UIUpdate(place, status=STAGES[reply].format(target=escaped(target_label(column.target))))
            continue
        last = reply
        if not reply.finished and time.monotonic() - updated < UPDATE_SECONDS:
            continue
        reply.record.meta["against_label"] = against_label
        thought, answer = split_thought(reply.text)
        turns = [*column.turns[:-1], replace(turn, answer=answer or None, thought=thought)]
        yield UIUpdate(place, history_of(turns), reply.record.since(sent), reply_status(reply, training))
        updated, sent = time.monotonic(), len(reply.record.tokens)
    if last is not None:
        records.by_place[place] = last.record.meta["id"]
        records.by_target[column.target] = [last.record.meta["id"], turn.note.removeprefix(NOTE)]


def wait_for_device(place: int, request: ReplyRequest) -> Iterator[UIUpdate]:
    """If the person chose to wait: wait until no run trains on the device, or they stop."""
    while request.where == device_policy.WAIT and (run := device_policy.competing_run()) and not request.should_stop():
        yield UIUpdate(place, status=f"Waiting until the run {run} has ended{run_progress(run)}.")
        time.sleep(WAIT_SECONDS)


def run_progress(run: str) -> str:
    """How far a run is, as a phrase in brackets; empty if unknown."""
    try:
        status = runs.get(run).status()
    except MoleError:
        return ""
    return f" (step {status['step']} of {status['total_steps']})" if status["total_steps"] else ""


def reply_status(reply: PartialReply, training: str) -> str:
    """How long the reply is and how fast it comes; `training` is the run that slows it down, or empty."""
    slow = f" · slower while the run {training} trains" if training else ""
    note = f"\n\n{escaped(reply.notice)}" if reply.finished and reply.notice else ""
    thought, answer = split_thought(reply.text)
    if reply.finished and thought is not None and not answer:
        note = f"\n\nThe reply ends within the model's thought: raise the maximum length.{note}"
    if reply.count:
        return f"{reply.count} tokens · {reply.count / max(reply.seconds, 1e-3):.1f} tokens/s{slow}{note}"
    return f"The model ended its reply immediately.{note}" if reply.finished else "Reading the prompt …"
