"""A run's past, read once and kept small: thinned curves, marks, and where in the events each step's routing is.

`events.jsonl` is the truth and may be gigabytes long. A `History` reads it a slice at a time, so that whoever polls
never waits for the whole of it, and only ever reads what is new. It is a cache: it can be thrown away. No torch.
"""

from __future__ import annotations

import itertools
import threading
import time
from array import array
from bisect import bisect_left
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from typing import Any

from mole.runs.event_reader import BLOCK, EventReader, lines_of, number, parse_event, parse_without_routing, routing_of
from mole.runs.run import Run

BUDGET_S = 0.05
"""Time one poll may spend on reading; the rest of the file waits for the next poll."""
MOST_ROWS = 1_200
"""Rows kept of a curve: about as many as a screen has pixels for."""
MOST_PLACES = 1 << 17
"""Steps whose place in the file is known exactly; of longer runs every second one, every fourth, …"""
MOST_MARKS = 1_000
RECENT = 20
"""Last logged steps that are kept whole, with their routing."""
LOOK_BACK = 64
"""Events looked at from the end of the file to find those."""
MARKS = ("checkpoint", "stopped", "failed", "interrupted")

Row = list[Any]
_generations = itertools.count(1)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _last(values: Sequence[float]) -> float:
    return values[-1]


STEP_COLUMNS: dict[str, Callable[[Sequence[float]], float]] = {
    "step": _last,
    "count": sum,
    "loss": _mean,
    "loss_low": min,
    "loss_high": max,
    "learning_rate": _last,
    "tokens_per_second": _mean,
    "memory_mb": max,
    "grad_norm": max,
    "aux_loss": _mean,
}
"""What a row of the training curves holds, and how neighbouring rows become one: spikes stay visible."""
EVAL_COLUMNS: dict[str, Callable[[Sequence[float]], float]] = {"step": _last, "eval_loss": min}


class Curve:
    """A growing table that never has more than `most` closed rows, each standing for `stride` neighbouring ones.

    When it is full, rows are merged in pairs and the stride doubles. The rows not yet enough for a closed one are an
    open one at the end, so the newest value is always there.
    """

    def __init__(self, columns: dict[str, Callable[[Sequence[float]], float]], most: int = MOST_ROWS) -> None:
        self.rules, self.most = tuple(columns.values()), most
        self.closed: list[Row] = []
        self.open: list[Row] = []
        self.stride = 1

    def add(self, row: Row) -> bool:
        """Add a row; true when the closed rows were merged to make room."""
        self.open.append(row)
        if len(self.open) < self.stride:
            return False
        self.closed.append(self.merged(self.open))
        self.open = []
        if len(self.closed) < self.most:
            return False
        self.closed = [self.merged(self.closed[at : at + 2]) for at in range(0, self.most, 2)]
        self.stride *= 2
        return True

    def cut(self, step: int) -> None:
        """Forget the rows after `step`, and the closed one that holds it together with later ones."""
        while self.closed and self.closed[-1][0] > step:
            self.closed.pop()
            self.open = []
        self.open = [row for row in self.open if row[0] <= step]

    def rows(self, start: int = 0) -> list[Row]:
        """The closed rows from number `start` on, and the open one."""
        return [*self.closed[start:], *([self.merged(self.open)] if self.open else [])]

    @property
    def last_step(self) -> int:
        """The step of the last row, -1 when there is none."""
        row = (self.open or self.closed or [[-1]])[-1]
        return int(row[0])

    def merged(self, rows: list[Row]) -> Row:
        """Neighbouring rows as one, column by column; values that are missing do not count."""
        if len(rows) == 1:
            return rows[0]
        known = ([value for value in column if value is not None] for column in zip(*rows, strict=True))
        return [rule(values) if values else None for rule, values in zip(self.rules, known, strict=True)]


class Places:
    """The byte offsets of steps in ascending order, at most `most` of them: of very many, every 2nd, 4th, … is kept."""

    def __init__(self, most: int = MOST_PLACES) -> None:
        self.most, self.stride, self.skipped = most, 1, 0
        self.steps, self.offsets = array("q"), array("q")

    def add(self, step: int, offset: int) -> None:
        """Remember where a step's line begins."""
        self.skipped += 1
        if self.skipped < self.stride:
            return
        self.skipped = 0
        self.steps.append(step)
        self.offsets.append(offset)
        if len(self.steps) >= self.most:
            self.steps, self.offsets = self.steps[1::2], self.offsets[1::2]
            self.stride *= 2

    def cut(self, step: int) -> None:
        """Forget the steps after `step`."""
        while self.steps and self.steps[-1] > step:
            self.steps.pop()
            self.offsets.pop()

    def nearest(self, step: int) -> int | None:
        """The offset of the known step nearest to `step`; None when none is known."""
        at = bisect_left(self.steps, step)
        near = [place for place in (at - 1, at) if 0 <= place < len(self.steps)]
        return self.offsets[min(near, key=lambda place: abs(self.steps[place] - step))] if near else None


class History:
    """What is known of a run's past so far; `advance` reads on. Safe to use from several threads.

    Attributes:
        generation: another number whenever rows that were given out before are no longer right.
        steps: rows of `STEP_COLUMNS`.
        evals: rows of `EVAL_COLUMNS`.
        marks: `[step, kind]`, kind one of `MARKS` or `resumed`.
        newest: the last `RECENT` step events, whole, read from the end of the file: right from the first poll.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.lock = threading.RLock()
        self.reader = EventReader(run.events_path)
        self._forget()

    def _forget(self) -> None:
        self.run = Run(self.run.name, self.run.path)  # a new one: a run keeps the config it has read
        self.generation = next(_generations)
        self.steps, self.evals, self.places = Curve(STEP_COLUMNS), Curve(EVAL_COLUMNS), Places()
        self.marks: deque[list[Any]] = deque(maxlen=MOST_MARKS)
        self.newest: deque[dict[str, Any]] = deque(maxlen=RECENT)
        self._seen_size = 0

    @property
    def share(self) -> float:
        """How much of the file has been read, 0…1."""
        return self.reader.offset / self.reader.size if self.reader.size else 1.0

    # Reading -----------------------------------------------------------------------------------------------

    def advance(self, budget_s: float = BUDGET_S) -> bool:
        """Read on for about `budget_s` seconds; true when there is more to read."""
        ends = time.perf_counter() + budget_s
        with self.lock:
            try:
                if self.reader.refresh():
                    self._forget()
                self._look_at_end()
                while not self.reader.at_end:
                    for at, line in lines_of(*self.reader.next_block()):
                        self._take(line, at)
                    if time.perf_counter() >= ends:
                        return not self.reader.at_end
            except OSError:
                self.reader = EventReader(self.run.events_path)
                self._forget()
            return False

    def _look_at_end(self) -> None:
        """Take the step events that have come since the last look, from the end of the file."""
        if self.reader.size == self._seen_size:
            return
        known = self.newest[-1]["time"] if self.newest else None
        fresh: list[dict[str, Any]] = []
        for event in itertools.islice(self.run.events_backwards(), LOOK_BACK):
            if event["type"] == "step":
                if event["time"] == known or len(fresh) == RECENT:
                    break
                fresh.append({**event, "routing": routing_of(event)})
        kept = [event for event in self.newest if not fresh or event["step"] < fresh[-1]["step"]]
        self.newest = deque([*kept, *reversed(fresh)], maxlen=RECENT)
        self._seen_size = self.reader.size

    def _take(self, line: bytes, at: int) -> None:
        """Add the event of a line that begins at byte `at`."""
        event, routed = parse_without_routing(line)
        if event is None:
            return
        kind, step = event["type"], event["step"]
        if kind == "step":
            if step <= self.steps.last_step:
                self._cut(step - 1)
            values = [number(event.get(name)) for name in ("learning_rate", "tokens_per_second", "memory_mb")]
            loss, rest = number(event.get("loss")), [number(event.get(name)) for name in ("grad_norm", "aux_loss")]
            if self.steps.add([step, 1, loss, loss, loss, *values, *rest]):
                self.generation = next(_generations)
            if routed:
                self.places.add(step, at)
        elif kind == "eval" and self.evals.add([step, number(event.get("eval_loss"))]):
            self.generation = next(_generations)
        elif kind in MARKS:
            self.marks.append([step, kind])
        elif kind == "started" and event.get("resumed_from"):
            self.marks.append([step, "resumed"])

    def _cut(self, step: int) -> None:
        """Forget what came after `step`: the run went back to a checkpoint and goes there anew."""
        self.steps.cut(step)
        self.evals.cut(step)
        self.places.cut(step)
        kept = [mark for mark in self.marks if mark[0] <= step or mark[1] != "checkpoint"]
        self.marks = deque(kept, maxlen=MOST_MARKS)
        self.generation = next(_generations)

    # Asking ------------------------------------------------------------------------------------------------

    def routing_at(self, step: int) -> dict[str, Any] | None:
        """`{"step", "routing"}` of the logged step nearest to `step`, read from the file; None when none is there."""
        with self.lock:
            place = self.places.nearest(step)
            recent = [event for event in self.newest if event["routing"]]
            newest = min(recent, key=lambda event: abs(event["step"] - step), default=None)
            found = self._event_at(place) if place is not None else None
        known = [event for event in (found, newest) if event]
        if not known:
            return None
        best = min(known, key=lambda event: abs(event["step"] - step))
        return {"step": best["step"], "routing": best["routing"]}

    def _event_at(self, place: int) -> dict[str, Any] | None:
        """The step event whose line begins at byte `place`, if it is still there and its routing is whole."""
        try:
            with self.run.events_path.open("rb") as file:
                file.seek(place)
                event = parse_event(file.readline(BLOCK))
        except OSError:
            return None
        routing = routing_of(event) if event else None
        return {**event, "routing": routing} if event and routing else None


class Histories:
    """The histories this process has read, the last used `keep` of them; all pages share them."""

    def __init__(self, keep: int = 8) -> None:
        self._keep = keep
        self._lock = threading.Lock()
        self._known: OrderedDict[str, History] = OrderedDict()

    def of(self, run: Run) -> History:
        """The history of a run, as far as it has been read."""
        with self._lock:
            key = str(run.path)
            history = self._known[key] = self._known.get(key) or History(run)
            self._known.move_to_end(key)
            while len(self._known) > self._keep:
                self._known.popitem(last=False)
        return history


HISTORIES = Histories()
