"""The metrics of a run, read from its events: every loss by step, time and tokens, and the training's speed and memory.

`history` keeps thinned curves for the live view; this module keeps every loss exactly, for comparisons. Does not import
torch.
"""

from __future__ import annotations

import math
import time
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple, TypeVar

from mole.runs.event_reader import (
    EventReader,
    lines_of,
    number,
    numbers,
    parse_event,
    parse_without_routing,
    routing_of,
)
from mole.runs.run import Run

FACTS = {
    "started": {"device": "device used", "dtype": "number format used"},
    "data": {"fingerprint": "data content (sha256)"},
}
"""Event → field → its name in a comparison: what can differ between runs with the same settings."""
Value = TypeVar("Value")
CACHED_READERS = 16
"""Runs whose metrics are kept, so that the next read parses only new events."""


class LossPoint(NamedTuple):
    """A loss with its step, and the seconds and tokens of training up to that step."""

    step: int
    seconds: float
    tokens: float
    loss: float


class LossCurve:
    """Loss points by ascending step, 32 bytes each."""

    def __init__(self, points: Iterable[LossPoint] = ()) -> None:
        self._flat = array("d", [value for point in points for value in point])

    def __len__(self) -> int:
        return len(self._flat) // 4

    def __getitem__(self, place: int) -> LossPoint:
        step, *rest = self._flat[4 * place : 4 * place + 4]
        return LossPoint(int(step), *rest)

    @property
    def steps(self) -> array[float]:
        return self._flat[0::4]

    @property
    def losses(self) -> array[float]:
        return self._flat[3::4]

    def add(self, point: LossPoint) -> None:
        """Append a point."""
        self._flat.extend(point)

    def cut(self, step: int) -> None:
        """Remove the points after `step`."""
        while self._flat and self._flat[-4] > step:
            del self._flat[-4:]

    def copy(self) -> LossCurve:
        """A copy that later points are not added to."""
        other = LossCurve()
        other._flat = self._flat[:]
        return other

    def thinned(self, most: int) -> list[LossPoint]:
        """At most `most` evenly spaced points, including the last."""
        return [self[place] for place in evenly_spaced(range(len(self)), most)]


def evenly_spaced(values: Sequence[Value], most: int) -> Sequence[Value]:
    """At most `most` evenly spaced values, including the last."""
    return values[::-1][:: max(1, -(-len(values) // most))][::-1]


@dataclass
class RunMetrics:
    """The metrics of a run; for steps that a resumed run repeated, the later ones.

    Attributes:
        train, evals: training and held-out losses.
        seconds: training time, summed over all sessions.
        memory_mb: peak memory of the logged steps, in MiB.
        routing: the last routing statistics with their `step`; None without a router.
        facts: device, dtype and data of the run, by the names in `FACTS`.
        share: share of the events that has been read, 0…1.
    """

    train: LossCurve = field(default_factory=LossCurve)
    evals: LossCurve = field(default_factory=LossCurve)
    seconds: float | None = None
    tokens_per_second: float | None = None
    memory_mb: float | None = None
    trainable_parameters: float | None = None
    routing: dict[str, Any] | None = None
    facts: dict[str, str] = field(default_factory=dict)
    share: float = 1.0


class MetricsReader:
    """Reads the events of a run incrementally: each event is parsed once."""

    def __init__(self, path: Path) -> None:
        self.reader = EventReader(path)
        self._start_over()

    def _start_over(self) -> None:
        self.metrics = RunMetrics()
        self._sessions = 0
        self._clock, self._tokens = 0.0, 0.0
        self._mark: float | None = None
        """Time of the last counted event; training time since then is not counted yet."""
        self._routed = b""

    def read(self, seconds: float = math.inf) -> RunMetrics:
        """The metrics up to the last complete line of the events; after about so many seconds, up to where it came."""
        ends = time.perf_counter() + seconds
        try:
            if self.reader.refresh():
                self._start_over()
            while not self.reader.at_end and time.perf_counter() < ends:
                for _, line in lines_of(*self.reader.next_block()):
                    self._take(line)
        except OSError:
            self.reader = EventReader(self.reader.path)
            self._start_over()
        last = parse_event(self._routed) if self._routed else None
        if last is not None and (routing := routing_of(last)):
            self.metrics.routing = {**routing, "step": last["step"]}
        self._routed = b""
        self.metrics.share = 1.0 if self.reader.at_end else self.reader.offset / max(self.reader.size, 1)
        return replace(self.metrics, train=self.metrics.train.copy(), evals=self.metrics.evals.copy())

    def _take(self, line: bytes) -> None:
        event, routed = parse_without_routing(line)
        if event is None:
            return
        if routed:
            self._routed = line  # routing is most of the bytes, so only the last one is parsed
        if reader := self.READERS.get(event["type"]):
            reader(self, event)
        for key, name in FACTS.get(event["type"], {}).items():
            if event.get(key):
                self.metrics.facts[name] = str(event[key])[:12]

    def _started(self, event: Mapping[str, Any]) -> None:
        self._sessions, self._mark = self._sessions + 1, event["time"]
        self.metrics.train.cut(event["step"])
        self.metrics.evals.cut(event["step"])
        self.metrics.trainable_parameters = number(event.get("trainable_parameters"))

    def _data(self, event: Mapping[str, Any]) -> None:
        self._mark = event["time"]

    def _step(self, event: Mapping[str, Any]) -> None:
        seconds = max(0.0, event["time"] - self._mark) if self._mark is not None else 0.0
        self._mark = event["time"]
        self._clock += seconds
        self._tokens += seconds * (number(event.get("tokens_per_second")) or 0.0)
        if self._clock:
            self.metrics.seconds, self.metrics.tokens_per_second = self._clock, self._tokens / self._clock
        if (memory := number(event.get("memory_mb"))) is not None:
            self.metrics.memory_mb = max(memory, self.metrics.memory_mb or 0.0)
        self._add(self.metrics.train, event, "loss")

    def _eval(self, event: Mapping[str, Any]) -> None:
        self._add(self.metrics.evals, event, "eval_loss")

    def _finished(self, event: Mapping[str, Any]) -> None:
        if self._sessions == 1:  # a single session has measured the whole training itself
            measured = numbers(event.get("metrics"))
            self.metrics.seconds = measured.get("seconds") or self.metrics.seconds
            self.metrics.tokens_per_second = measured.get("tokens_per_second") or self.metrics.tokens_per_second

    def _add(self, points: LossCurve, event: Mapping[str, Any], key: str) -> None:
        if (loss := number(event.get(key))) is not None:
            points.add(LossPoint(event["step"], self._clock, self._tokens, loss))

    READERS = {"started": _started, "data": _data, "step": _step, "eval": _eval, "finished": _finished}


_READERS: OrderedDict[str, MetricsReader] = OrderedDict()
_LOCK = Lock()


def read_metrics(run: Run, seconds: float = math.inf) -> RunMetrics:
    """The current metrics of a run, or those that can be read in about so many seconds; the next call reads on."""
    with _LOCK:
        reader = _READERS.pop(str(run.path), None) or MetricsReader(run.events_path)
        _READERS[str(run.path)] = reader
        while len(_READERS) > CACHED_READERS:
            _READERS.popitem(last=False)
        return reader.read(seconds)
