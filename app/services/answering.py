"""Writing replies: one model after another, each streamed into its own column, with its routing."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from app import settings
from app.services import device_policy
from app.services.conversation import Turn, aligned, messages, parse, render
from app.services.engine import ENGINE, Saying
from app.services.listing import LISTING
from app.services.steering_options import steering_text
from mole import runs
from mole.analysis.tables import escaped
from mole.config import ModelConfig
from mole.core import checkpoint
from mole.core.errors import InputError, ModelError, MoleError
from mole.core.redaction import redacted
from mole.mixture.steering import AS_TRAINED, Steering

BASE = f"base:{ModelConfig().name}"
LANES = 4
"""The chosen target, and at most three beside it."""
SHOW_EVERY = 0.08
"""Seconds between two updates of the page at least: faster than this nobody reads, and the browser falls behind."""
WAIT_EVERY = 0.5
WITH_CHECKPOINTS = 8
"""Of so many runs, the newest, the checkpoints are offered too; others can be typed as RUN@STEP."""


# ---------------------------------------------------------------------------------------------------------
# What there is to chat with


def targets() -> list[tuple[str, str]]:
    """What there is to chat with as (label, target): demo, finished runs, the newest first, checkpoints, bases."""
    demo = settings.demo()
    known = [("Demo: four skills (DynMoLE)", str(demo))] if demo else []
    kept: list[tuple[str, str]] = []
    bases = dict.fromkeys([ModelConfig().name])
    for place, row in enumerate(LISTING.rows()):
        name, finished = row["name"], row["state"] == "finished"
        if finished:
            known.append((f"{name} · {row['router']}", name))
            bases[row["model"]] = None
        if place < WITH_CHECKPOINTS:
            steps = [step for step, _ in checkpoint.steps(runs.runs_dir() / name / "checkpoints")]
            last = row["step"] if finished else None
            kept += [(f"{name} · step {step}", f"{name}@{step}") for step in steps if step != last]
    return [*known, *kept, *((f"Base model: {Path(base).name}", f"base:{base}") for base in bases)]


def name_of(target: str) -> str:
    """A target in a few words."""
    words = {value: label for label, value in targets()}
    return words.get(target) or f"{Path(target.removeprefix('base:')).name}"


def check_allowed(target: str) -> None:
    """On a Space, visitors choose among what is there; they do not make it load anything else."""
    if not target:
        raise InputError("Choose what to chat with first.", field="target")
    if settings.space_id() and target not in {value for _, value in targets()}:
        raise ModelError("This Space has no such model to chat with.", field="target")


# ---------------------------------------------------------------------------------------------------------
# Replies


@dataclass(frozen=True)
class Question:
    """What is asked of every lane: the settings of `mole.chat.ChatSettings`, the system prompt, where to compute."""

    settings: dict[str, Any]
    system: str = ""
    where: str = device_policy.CPU
    should_stop: Callable[[], bool] = lambda: False


@dataclass(frozen=True)
class Lane:
    """One column: its target, its turns (the last one is asked), and what is different in its routing."""

    target: str
    turns: list[Turn]
    steering: Steering = AS_TRAINED
    label: str = ""


@dataclass
class Moment:
    """What changes on the page; None stands for what stays."""

    place: int = 0
    history: list[Any] | None = None
    view: dict[str, Any] | None = None
    status: str | None = None
    reels: dict[str, list[str]] | None = None


@dataclass
class Reels:
    """The last reply's reel of each target: its id, and what was different in it, in words."""

    last: dict[str, list[str]] = field(default_factory=dict)

    def before(self, lane: Lane) -> tuple[str | None, str]:
        """The reel to show the difference from, for a steered reply, and what it was."""
        identifier, words = self.last.get(lane.target, [None, ""])
        return (identifier, words or "as trained") if lane.steering else (None, "")


def lanes_of(target: str, compare: list[str], steering: Steering, histories: list[list[Any]]) -> list[Lane]:
    """The lanes of a question: the chosen target under one's hand, those beside it as trained."""
    main = parse(histories[0])
    lanes = [Lane(target, main, steering)]
    for other, history in zip(compare[: LANES - 1], histories[1:], strict=False):
        lanes.append(Lane(other, aligned(main, parse(history)), label=name_of(other)))
    if len(lanes) > 1:
        lanes[0] = replace(lanes[0], label=name_of(target))
    return lanes


def answer_all(lanes: list[Lane], question: Question, last: dict[str, list[str]]) -> Iterator[Moment]:
    """Answer in every lane, one after another; what goes wrong in one is said, and the next has its turn."""
    reels, said = Reels(dict(last)), list[str]()
    for place, lane in enumerate(lanes):
        yield Moment(place, history=render([*lane.turns[:-1], asked(lane)]), view={"meta": None})
    for place, lane in enumerate(lanes):
        if question.should_stop():
            return
        try:
            for moment in answer(place, lane, question, reels):
                words = f"**{escaped(lane.label)}** · {moment.status}" if lane.label else moment.status
                yield replace(moment, status="\n\n".join([*said, words or ""]))
            yield Moment(place, reels=dict(reels.last))
            said += [words or ""] if lane.label else []
        except MoleError as error:
            whose = f"{escaped(lane.label)}: " if lane.label else ""
            said.append(f"**{whose}Not answered.** {escaped(redacted(str(error)))}")
            yield Moment(place, status="\n\n".join(said))


def asked(lane: Lane) -> Turn:
    """The last turn, without an answer, and with what is different for it."""
    words = steering_text(lane.steering, lane.target)
    return Turn(lane.turns[-1].user, note=words and f"Under your hand: {words}")


def answer(place: int, lane: Lane, question: Question, reels: Reels) -> Iterator[Moment]:
    """Answer in one lane. Raises `MoleError`."""
    check_allowed(lane.target)
    settings.check_asked(lane.turns[-1].user, question.system, question.settings["max_new_tokens"])
    yield Moment(place, status="…")
    yield from wait_for_device(place, question)
    training = device_policy.training_on(device_policy.device())
    device = device_policy.device_for(question.where, training)
    if not ENGINE.holds(lane.target, device):
        yield Moment(place, status=f"Loading {escaped(name_of(lane.target))} …")
    turn, (against, before) = asked(lane), reels.before(lane)
    shown, sent = 0.0, 0
    saying = None
    for saying in ENGINE.say(
        lane.target, messages(lane.turns, question.system), question.settings, question.should_stop,
        steering=lane.steering, against=against, device=device,
    ):  # fmt: skip
        if not saying.finished and time.monotonic() - shown < SHOW_EVERY:
            continue
        saying.reel.meta["against_label"] = before
        turns = [*lane.turns[:-1], replace(turn, answer=saying.text or None)]
        yield Moment(place, render(turns), saying.reel.since(sent), status_text(saying, training))
        shown, sent = time.monotonic(), len(saying.reel.tokens)
    if saying is not None:
        reels.last[lane.target] = [saying.reel.meta["id"], turn.note.removeprefix("Under your hand: ")]


def wait_for_device(place: int, question: Question) -> Iterator[Moment]:
    """Wait until no run trains on the device, if that is what the person chose; one may stop waiting."""
    device = device_policy.device()
    while (
        question.where == device_policy.WAIT
        and (run := device_policy.training_on(device))
        and not question.should_stop()
    ):
        yield Moment(place, status=f"Waiting until the run {run} has ended{progress_of(run)}.")
        time.sleep(WAIT_EVERY)


def progress_of(run: str) -> str:
    """How far a run is, as a phrase; empty if that cannot be told."""
    try:
        status = runs.get(run).status()
    except MoleError:
        return ""
    return f" (step {status['step']} of {status['total_steps']})" if status["total_steps"] else ""


def status_text(saying: Saying, training: str) -> str:
    """How far the reply is, and how fast."""
    slow = f" · slower while the run {training} trains" if training else ""
    note = f"\n\n{escaped(saying.notice)}" if saying.finished and saying.notice else ""
    if saying.count:
        return f"{saying.count} tokens · {saying.count / max(saying.seconds, 1e-3):.1f} a second{slow}{note}"
    return f"The model ended its reply at once.{note}" if saying.finished else "Reading the prompt …"
