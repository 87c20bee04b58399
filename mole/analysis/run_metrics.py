"""The course of a run as its events tell it: every loss by step, time and tokens, and what the training took.

Where `history` keeps thinned curves to be polled, this keeps every loss exactly, in a few bytes, for the numbers
of a comparison. No torch.
"""

from __future__ import annotations

import os
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from threading import Lock
from typing import Any, NamedTuple, TypeVar

from mole.analysis.history import parse_head, routing_of
from mole.runs.run import number, numbers, parse_event
from mole.runs.store import Run

FACTS = {
    "started": {"device": "device used", "dtype": "number format used"},
    "data": {"fingerprint": "data content (sha256)"},
}
"""Event → field → what a comparison calls it: things that can differ though the settings are the same."""
T = TypeVar("T")
KEPT = 16
"""Runs whose events are remembered, so that the next look reads only what is new."""


class Point(NamedTuple):
    """A loss, and when it was: its step, and the seconds and tokens of training up to it."""

    step: int
    seconds: float
    tokens: float
    loss: float


class Points:
    """Points by ascending step, 32 bytes each."""

    def __init__(self, points: Iterable[Point] = ()) -> None:
        self._flat = array("d", [value for point in points for value in point])

    def __len__(self) -> int:
        return len(self._flat) // 4

    def __getitem__(self, place: int) -> Point:
        step, *rest = self._flat[4 * place : 4 * place + 4]
        return Point(int(step), *rest)

    @property
    def steps(self) -> array[float]:
        return self._flat[0::4]

    @property
    def losses(self) -> array[float]:
        return self._flat[3::4]

    def add(self, point: Point) -> None:
        """Add a point at the end."""
        self._flat.extend(point)

    def cut(self, step: int) -> None:
        """Forget the points after `step`."""
        while self._flat and self._flat[-4] > step:
            del self._flat[-4:]

    def copy(self) -> Points:
        """The points there are now."""
        other = Points()
        other._flat = self._flat[:]
        return other

    def thinned(self, most: int) -> list[Point]:
        """At most `most` points, evenly taken, the last one always among them."""
        return [self[place] for place in thinned(range(len(self)), most)]


def thinned(values: Sequence[T], most: int) -> Sequence[T]:
    """At most `most` of the values, evenly taken, the last one always among them."""
    return values[::-1][:: max(1, -(-len(values) // most))][::-1]


@dataclass
class Course:
    """What the events of a run say of its training; of what a resumed run did twice, the later.

    Attributes:
        train, evals: training and held-out losses.
        seconds: training time, over all its sessions.
        memory_mb: the most memory a logged step held.
        routing: the last routing statistics, with the `step` they are of; None without a router.
        facts: what was found when it started (`FACTS`), by the words of a comparison.
    """

    train: Points = field(default_factory=Points)
    evals: Points = field(default_factory=Points)
    seconds: float | None = None
    tokens_per_second: float | None = None
    memory_mb: float | None = None
    trainable_parameters: float | None = None
    routing: dict[str, Any] | None = None
    facts: dict[str, str] = field(default_factory=dict)


class Reader:
    """Reads a run's events once, from where it stopped the last time."""

    def __init__(self) -> None:
        self._file: tuple[int, int] | None = None
        self._start_over()

    def _start_over(self) -> None:
        self.course = Course()
        self._offset = self._sessions = 0
        self._clock, self._tokens = 0.0, 0.0
        self._mark: float | None = None
        """When the time that is not counted yet began."""
        self._routed = b""

    def read(self, run: Run) -> Course:
        """The course up to the last complete line of the events."""
        try:
            with run.events_path.open("rb") as file:
                about = os.fstat(file.fileno())
                if (about.st_dev, about.st_ino) != self._file or about.st_size < self._offset:
                    self._start_over()
                    self._file = about.st_dev, about.st_ino
                file.seek(self._offset)
                for line in file:
                    if not line.endswith(b"\n"):
                        break  # still being written
                    self._offset += len(line)
                    self._take(line[:-1])
        except OSError:
            self._start_over()
        last = parse_event(self._routed) if self._routed else None
        if last is not None and (routing := routing_of(last)):
            self.course.routing = {**routing, "step": last["step"]}
        self._routed = b""
        return replace(self.course, train=self.course.train.copy(), evals=self.course.evals.copy())

    def _take(self, line: bytes) -> None:
        event, routed = parse_head(line)
        if event is None:
            return
        if routed:
            self._routed = line  # most of the bytes are routing: only the last one is parsed
        if reader := self.READERS.get(event["type"]):
            reader(self, event)
        for key, name in FACTS.get(event["type"], {}).items():
            if event.get(key):
                self.course.facts[name] = str(event[key])[:12]

    def _started(self, event: Mapping[str, Any]) -> None:
        self._sessions, self._mark = self._sessions + 1, event["time"]
        self.course.train.cut(event["step"])
        self.course.evals.cut(event["step"])
        self.course.trainable_parameters = number(event.get("trainable_parameters"))

    def _data(self, event: Mapping[str, Any]) -> None:
        self._mark = event["time"]

    def _step(self, event: Mapping[str, Any]) -> None:
        seconds = max(0.0, event["time"] - self._mark) if self._mark is not None else 0.0
        self._mark = event["time"]
        self._clock += seconds
        self._tokens += seconds * (number(event.get("tokens_per_second")) or 0.0)
        if self._clock:
            self.course.seconds, self.course.tokens_per_second = self._clock, self._tokens / self._clock
        if (memory := number(event.get("memory_mb"))) is not None:
            self.course.memory_mb = max(memory, self.course.memory_mb or 0.0)
        self._add(self.course.train, event, "loss")

    def _eval(self, event: Mapping[str, Any]) -> None:
        self._add(self.course.evals, event, "eval_loss")

    def _finished(self, event: Mapping[str, Any]) -> None:
        if self._sessions == 1:  # then it has measured the whole itself
            told = numbers(event.get("metrics"))
            self.course.seconds = told.get("seconds") or self.course.seconds
            self.course.tokens_per_second = told.get("tokens_per_second") or self.course.tokens_per_second

    def _add(self, points: Points, event: Mapping[str, Any], key: str) -> None:
        if (loss := number(event.get(key))) is not None:
            points.add(Point(event["step"], self._clock, self._tokens, loss))

    READERS = {"started": _started, "data": _data, "step": _step, "eval": _eval, "finished": _finished}


_READERS: OrderedDict[str, Reader] = OrderedDict()
_LOCK = Lock()


def course_of(run: Run) -> Course:
    """The course of a run, as far as it has come."""
    with _LOCK:
        reader = _READERS.pop(str(run.path), None) or Reader()
        _READERS[str(run.path)] = reader
        while len(_READERS) > KEPT:
            _READERS.popitem(last=False)
        return reader.read(run)
