"""The history of a run for the live view: thinned curves, marks, and the byte offset of each step's routing.

`events.jsonl` may be gigabytes long. A `History` reads it incrementally and in slices, so that a poll never waits for
the whole file. It is a cache and can be discarded at any time. Does not import torch.
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

from mole.core import files
from mole.runs.event_reader import (
    BLOCK,
    NOTICED,
    EventReader,
    in_order,
    lines_of,
    notices_in,
    number,
    parse_event,
    parse_without_routing,
    routing_of,
)
from mole.runs.run import Run

BUDGET_S = 0.05
"""Seconds that one poll may spend on reading; the next poll continues."""
MAX_CURVE_ROWS = 1_200
"""Rows kept of a curve: about as many as a screen has pixels."""
MAX_OFFSETS = 1 << 17
"""Steps whose offset is kept; of longer runs it is kept for every 2nd step, every 4th, …"""
MAX_MARKS = 1_000
RECENT = 20
"""Number of last step events that are kept whole, with their routing."""
MAX_LOOK_BACK = 64
"""Events read from the end of the file to find them."""
MARKS = ("checkpoint", "stopped", "failed", "interrupted")

CurveRow = list[Any]
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
"""Columns of the training curve, and how the values of neighbouring rows are merged: spikes stay visible."""
EVAL_COLUMNS: dict[str, Callable[[Sequence[float]], float]] = {"step": _last, "eval_loss": min}


class ThinnedCurve:
    """A growing table of at most `most` closed rows, each of which stands for `stride` consecutive rows.

    When it is full, rows are merged in pairs and the stride doubles. Rows that do not fill a closed one yet form an
    open row at the end, so the newest value is always included.
    """

    def __init__(self, columns: dict[str, Callable[[Sequence[float]], float]], most: int = MAX_CURVE_ROWS) -> None:
        self.rules, self.most = tuple(columns.values()), most
        self.closed: list[CurveRow] = []
        self.open: list[CurveRow] = []
        self.stride = 1

    def add(self, row: CurveRow) -> bool:
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
        """Remove the rows after `step`, including a closed row that merges it with later ones."""
        while self.closed and self.closed[-1][0] > step:
            self.closed.pop()
            self.open = []
        self.open = [row for row in self.open if row[0] <= step]

    def rows(self, start: int = 0) -> list[CurveRow]:
        """The closed rows from index `start` on, and the open row."""
        return [*self.closed[start:], *([self.merged(self.open)] if self.open else [])]

    @property
    def last_step(self) -> int:
        """The step of the last row, -1 if the curve is empty."""
        row = (self.open or self.closed or [[-1]])[-1]
        return int(row[0])

    def merged(self, rows: list[CurveRow]) -> CurveRow:
        """Merge consecutive rows into one, column by column, ignoring missing values."""
        if len(rows) == 1:
            return rows[0]
        known = ([value for value in column if value is not None] for column in zip(*rows, strict=True))
        return [rule(values) if values else None for rule, values in zip(self.rules, known, strict=True)]


class StepOffsets:
    """Byte offsets of steps in ascending order, at most `most`: of longer runs every 2nd, 4th, … step is kept."""

    def __init__(self, most: int = MAX_OFFSETS) -> None:
        self.most, self.stride, self.skipped = most, 1, 0
        self.steps, self.offsets = array("q"), array("q")

    def add(self, step: int, offset: int) -> None:
        """Add the offset of a step's line."""
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
        """Remove the steps after `step`."""
        while self.steps and self.steps[-1] > step:
            self.steps.pop()
            self.offsets.pop()

    def nearest(self, step: int) -> int | None:
        """The offset of the kept step nearest to `step`; None if there is none."""
        at = bisect_left(self.steps, step)
        near = [index for index in (at - 1, at) if 0 <= index < len(self.steps)]
        return self.offsets[min(near, key=lambda index: abs(self.steps[index] - step))] if near else None


class History:
    """The history of a run as far as it has been read; `advance` reads on. Thread-safe.

    Attributes:
        generation: changes whenever rows that were returned before have become invalid.
        steps: rows of `STEP_COLUMNS`.
        evals: rows of `EVAL_COLUMNS`.
        marks: `[step, kind]`, where kind is one of `MARKS` or `resumed`.
        notices: what somebody should know of the run, in sentences.
        newest: the last `RECENT` step events, read from the end of the file, so complete from the first poll on.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.lock = threading.RLock()
        self.reader = EventReader(run.events_path)
        self._reset()

    def _reset(self) -> None:
        self.run = Run(self.run.name, self.run.path)  # a new object, because a run caches its config
        self.generation = next(_generations)
        self.steps, self.evals, self.offsets = ThinnedCurve(STEP_COLUMNS), ThinnedCurve(EVAL_COLUMNS), StepOffsets()
        self.marks: deque[list[Any]] = deque(maxlen=MAX_MARKS)
        self.newest: deque[dict[str, Any]] = deque(maxlen=RECENT)
        self._told: dict[str, list[str]] = {}
        self._seen_size = 0

    @property
    def share(self) -> float:
        """Share of the file that has been read, 0…1."""
        return self.reader.offset / self.reader.size if self.reader.size else 1.0

    @property
    def notices(self) -> list[str]:
        return in_order(self._told)

    # Reading -----------------------------------------------------------------------------------------------

    def advance(self, budget_s: float = BUDGET_S) -> bool:
        """Read on for about `budget_s` seconds; true if there is more to read."""
        ends = time.perf_counter() + budget_s
        with self.lock:
            try:
                if self.reader.refresh():
                    self._reset()
                self._read_newest()
                while not self.reader.at_end:
                    for at, line in lines_of(*self.reader.next_block()):
                        self._take(line, at)
                    if time.perf_counter() >= ends:
                        return not self.reader.at_end
            except OSError:
                self.reader = EventReader(self.run.events_path)
                self._reset()
            return False

    def _read_newest(self) -> None:
        """Read the step events that are new since the last call from the end of the file."""
        if self.reader.size == self._seen_size:
            return
        known = self.newest[-1]["time"] if self.newest else None
        fresh: list[dict[str, Any]] = []
        for event in itertools.islice(self.run.events_backwards(), MAX_LOOK_BACK):
            if event["type"] == "step":
                if event["time"] == known or len(fresh) == RECENT:
                    break
                fresh.append({**event, "routing": routing_of(event)})
        kept = [event for event in self.newest if not fresh or event["step"] < fresh[-1]["step"]]
        self.newest = deque([*kept, *reversed(fresh)], maxlen=RECENT)
        self._seen_size = self.reader.size

    def _take(self, line: bytes, at: int) -> None:
        """Add the event in the line at byte offset `at`."""
        event, routed = parse_without_routing(line)
        if event is None:
            return
        kind, step = event["type"], event["step"]
        if kind in NOTICED:
            self._told[kind] = notices_in(event)
        if kind == "step":
            if step <= self.steps.last_step:
                self._cut(step - 1)
            values = [number(event.get(name)) for name in ("learning_rate", "tokens_per_second", "memory_mb")]
            loss, rest = number(event.get("loss")), [number(event.get(name)) for name in ("grad_norm", "aux_loss")]
            if self.steps.add([step, 1, loss, loss, loss, *values, *rest]):
                self.generation = next(_generations)
            if routed:
                self.offsets.add(step, at)
        elif kind == "eval" and self.evals.add([step, number(event.get("eval_loss"))]):
            self.generation = next(_generations)
        elif kind in MARKS:
            self.marks.append([step, kind])
        elif kind == "started" and event.get("resumed_from"):
            self.marks.append([step, "resumed"])

    def _cut(self, step: int) -> None:
        """Remove what came after `step`: the run resumed from a checkpoint and repeats these steps."""
        self.steps.cut(step)
        self.evals.cut(step)
        self.offsets.cut(step)
        kept = [mark for mark in self.marks if mark[0] <= step or mark[1] != "checkpoint"]
        self.marks = deque(kept, maxlen=MAX_MARKS)
        self.generation = next(_generations)

    # Queries -----------------------------------------------------------------------------------------------

    def routing_at(self, step: int) -> dict[str, Any] | None:
        """`{"step", "routing"}` of the logged step nearest to `step`, read from the file; None if there is none."""
        with self.lock:
            offset = self.offsets.nearest(step)
            recent = [event for event in self.newest if event["routing"]]
            newest = min(recent, key=lambda event: abs(event["step"] - step), default=None)
            found = self._event_at(offset) if offset is not None else None
        known = [event for event in (found, newest) if event]
        if not known:
            return None
        best = min(known, key=lambda event: abs(event["step"] - step))
        return {"step": best["step"], "routing": best["routing"]}

    def _event_at(self, offset: int) -> dict[str, Any] | None:
        """The step event at byte `offset`; None if it is gone or its routing is incomplete."""
        try:
            with open(self.run.events_path, "rb", opener=files.unlinked) as file:
                file.seek(offset)
                event = parse_event(file.readline(BLOCK))
        except OSError:
            return None
        routing = routing_of(event) if event else None
        return {**event, "routing": routing} if event and routing else None


class Histories:
    """A cache of the `keep` most recently used histories, shared by all pages."""

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
