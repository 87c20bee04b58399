"""The rows of the list of runs, each remembered until its folder shows something else; a page is told what changed."""

from __future__ import annotations

import os
import secrets
import threading
import time
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from mole import runs
from mole.core import checkpoint, locks
from mole.core.errors import RunError
from mole.evaluation import job as evaluation_job
from mole.runs.event_reader import EventReader, number, numbers, parse_event
from mole.runs.run import Run

FRESH_SECONDS = 0.5
"""Looks at the folders that are no older than this serve every page."""
READ_AT_ONCE = 1 << 22
READ_IN_ALL = 1 << 27
"""Bytes of events read in one look for held-out losses, of one run and of all; the next look goes on from there."""
NEWEST_EVENTS = 20
NEWEST_EVALUATIONS = 10
SCORES = ("accuracy", "exact_match")


@dataclass(frozen=True)
class Cursor:
    """What a page knows: the listing it was told of, and the last change of it."""

    listing: str = ""
    change: int = 0


class HeldOut:
    """The lowest held-out loss of a run, read on from where the last look ended."""

    def __init__(self, run: Run) -> None:
        self.reader = EventReader(run.events_path)
        self.best: float | None = None

    @property
    def behind(self) -> bool:
        """Whether there is more to read."""
        return not self.reader.at_end

    def read(self, most: int) -> int:
        """Read at most so many bytes more; returns how many it took."""
        self.reader.at_end = False
        if most <= 0:
            return 0
        try:
            if self.reader.refresh():
                self.best = None
            start, block = self.reader.next_block(most)
        except OSError:
            self.reader.at_end = True
            return 0
        self._take(block, len(block))
        return self.reader.offset - start

    def _take(self, data: bytes, end: int) -> None:
        at = data.find(b'"eval_loss"', 0, end)
        while at >= 0:
            line_end = data.index(b"\n", at)
            event = parse_event(data[data.rfind(b"\n", 0, at) + 1 : line_end]) or {}
            if (loss := number(event.get("eval_loss"))) is not None and (self.best is None or loss < self.best):
                self.best = loss
            at = data.find(b'"eval_loss"', line_end, end)


@dataclass
class Entry:
    """A run, what its folder showed, the row made of it, and the change that made it."""

    run: Run
    shows: tuple[Any, ...] = ()
    row: dict[str, Any] = field(default_factory=dict)
    change: int = 0
    held_out: HeldOut = field(init=False)

    def __post_init__(self) -> None:
        self.held_out = HeldOut(self.run)


class Listing:
    """All runs of `$MOLE_HOME`; safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._begin("")

    def _begin(self, folder: str) -> None:
        self._folder, self._id = folder, secrets.token_hex(4)
        self._entries: dict[str, Entry] = {}
        self._gone: dict[str, int] = {}
        self._change, self._looked = 0, 0.0

    def since(self, cursor: Cursor, at_once: bool = False) -> tuple[dict[str, Any] | None, Cursor]:
        """What changed since `cursor`, and the next cursor; None when nothing did.

        `{"reset", "rows", "gone", "now"}`: whether the page starts over, rows that are new or other, names of runs that
        are no more, and this machine's clock. `at_once` looks at the folders even if somebody just did.
        """
        with self._lock:
            if at_once or time.monotonic() - self._looked >= FRESH_SECONDS:
                self._look()
            reset = cursor.listing != self._id
            known = 0 if reset else cursor.change
            if not reset and known == self._change:
                return None, cursor
            rows = [entry.row for entry in self._entries.values() if entry.change > known]
            gone = [] if reset else [name for name, change in self._gone.items() if change > known]
            return {"reset": reset, "rows": rows, "gone": gone, "now": time.time()}, Cursor(self._id, self._change)

    def row(self, name: str) -> dict[str, Any] | None:
        """The row of a run as it was last seen; None when there is none."""
        with self._lock:
            entry = self._entries.get(name)
            return entry.row if entry else None

    def newest(self, *states: str) -> str:
        """The name of the newest run in one of these states; empty when there is none."""
        return next((str(row["name"]) for row in self.rows() if row["state"] in states), "")

    def rows(self, at_once: bool = True) -> list[dict[str, Any]]:
        """The rows of all runs, the newest first; `at_once` as in `since`."""
        listed, _ = self.since(Cursor(), at_once)
        return sorted(listed["rows"] if listed else [], key=lambda row: (row["created"], row["name"]), reverse=True)

    def _look(self) -> None:
        """Look at every folder, make the rows of those that show something new, forget those that are no more."""
        folder = str(runs.runs_dir())
        if folder != self._folder:
            self._begin(folder)
        change, left, seen = self._change + 1, READ_IN_ALL, set()
        try:
            names = os.listdir(folder)
        except OSError:
            names = []
        for name in names:
            entry = self._entries.get(name)
            try:
                entry = entry or Entry(runs.get(name))
                left -= self._renew(entry, f"{folder}/{name}", change, left)
            except (RunError, OSError):
                continue  # not a run, or not any more
            self._entries[name] = entry
            self._gone.pop(name, None)
            seen.add(name)
        for name in self._entries.keys() - seen:
            del self._entries[name]
            self._gone[name] = self._change = change
        self._looked = time.monotonic()

    def _renew(self, entry: Entry, path: str, change: int, left: int) -> int:
        """Make the entry's row anew if its folder shows something else; returns the bytes read for held-out losses."""
        shows = appearance(path)
        if shows == entry.shows and not entry.held_out.behind:
            return 0
        if entry.shows and shows[0][0] != entry.shows[0][0]:
            entry.run = runs.get(entry.run.name)  # another run took the name
        read = entry.held_out.read(min(left, READ_AT_ONCE))
        row = row_of(entry.run, entry.held_out.best)
        if row != entry.row:
            entry.row, entry.change, self._change = row, change, change
        entry.shows = shows
        return read


LISTING = Listing()
"""The one all pages share."""


def appearance(path: str) -> tuple[Any, ...]:
    """What a run's folder shows at a glance: its row stays the same as long as this does."""
    return (
        stamp(f"{path}/events.jsonl"),
        os.path.exists(f"{path}/adapter/{checkpoint.MANIFEST}"),
        stamp(f"{path}/{evaluation_job.FOLDER}"),
        locks.is_held(Path(path, "run.lock")),
    )


def stamp(path: str) -> tuple[int, int, int]:
    """What changes with a file, or with the names in a folder; zeros when there is none."""
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return 0, 0, 0
    return found.st_ino, found.st_size, found.st_mtime_ns


def row_of(run: Run, held_out: float | None) -> dict[str, Any]:
    """A run's row: its `status()`, `group`, `ends` (unix seconds, None when not known), `speed` (tokens a second),
    `loss` (the lowest held-out) and `score` (`{kind, value}` of the newest evaluation that has one)."""
    status, group, last = run.summary()
    speed, ends = pace(run, last)
    return {
        **status,
        "group": group,
        "speed": speed,
        "ends": ends if status["state"] == "running" else None,
        "loss": held_out,
        "score": newest_score(run),
    }


def pace(run: Run, last: dict[str, Any]) -> tuple[float | None, float | None]:
    """Tokens a second and the time a training ends, as the last logged step, or the end, has it."""
    if "metrics" in last:
        return numbers(last["metrics"]).get("tokens_per_second"), None
    for event in islice(run.events_backwards(), NEWEST_EVENTS):
        if "tokens_per_second" in event:
            eta = number(event.get("eta_s"))
            return number(event["tokens_per_second"]), None if eta is None else event["time"] + eta
    return None, None


def newest_score(run: Run) -> dict[str, Any] | None:
    """Accuracy or exact match of the newest evaluation that measured one."""
    for evaluation in evaluation_job.evaluations_of(run)[:NEWEST_EVALUATIONS]:
        metrics = numbers(evaluation.record().get("metrics"))
        for kind in SCORES:
            if kind in metrics:
                return {"kind": kind, "value": metrics[kind]}
    return None
