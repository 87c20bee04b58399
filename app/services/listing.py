"""The list of runs: each row is kept until its folder changes, and a page is sent only what changed."""

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
from mole.analysis.atlas import job as atlas_job
from mole.core import checkpoint, locks
from mole.core.errors import RunError
from mole.evaluation import job as evaluation_job
from mole.runs.event_reader import EventReader, number, numbers, parse_event
from mole.runs.run import Run

FRESH_SECONDS = 0.5
"""The folders are scanned at most once in this time, for all pages."""
READ_AT_ONCE = 1 << 22
READ_IN_ALL = 1 << 27
"""Bytes of events read for held-out losses in one scan, of one run and of all; the next scan continues from there."""
NEWEST_EVENTS = 20
NEWEST_EVALUATIONS = 10
SCORES = ("accuracy", "exact_match")


@dataclass(frozen=True)
class ListCursor:
    """What a page knows: the id of the listing, and the number of the last change it was sent."""

    listing: str = ""
    change: int = 0


class HeldOutLoss:
    """The lowest held-out loss of a run, read on from where the last scan ended."""

    def __init__(self, run: Run) -> None:
        self.reader = EventReader(run.events_path)
        self.best: float | None = None

    @property
    def behind(self) -> bool:
        """Whether there is more to read."""
        return not self.reader.at_end

    def read(self, most: int) -> int:
        """Read at most so many bytes more; returns how many were read."""
        self.reader.at_end = False
        if most <= 0:
            return 0
        try:
            if self.reader.refresh():
                self.best = None
            start = self.reader.offset
            _, block = self.reader.next_block(most)
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
class ListedRun:
    """A run with the stamp of its folder, its row, and the number of the change that made the row."""

    run: Run
    stamp: tuple[Any, ...] = ()
    row: dict[str, Any] = field(default_factory=dict)
    change: int = 0
    held_out: HeldOutLoss = field(init=False)

    def __post_init__(self) -> None:
        self.held_out = HeldOutLoss(self.run)


class Listing:
    """All runs of `$MOLE_HOME`; safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._begin("")

    def _begin(self, folder: str) -> None:
        self._folder, self._id = folder, secrets.token_hex(4)
        self._entries: dict[str, ListedRun] = {}
        self._gone: dict[str, int] = {}
        self._change, self._scanned = 0, 0.0

    def since(self, cursor: ListCursor, at_once: bool = False) -> tuple[dict[str, Any] | None, ListCursor]:
        """What changed since `cursor`, and the next cursor; None when nothing changed.

        `{"reset", "rows", "gone", "now"}`: whether the page starts over, new and changed rows, names of deleted runs,
        and this machine's clock. `at_once` scans the folders even if they have just been scanned.
        """
        with self._lock:
            if at_once or time.monotonic() - self._scanned >= FRESH_SECONDS:
                self._scan()
            reset = cursor.listing != self._id
            known = 0 if reset else cursor.change
            if not reset and known == self._change:
                return None, cursor
            rows = [entry.row for entry in self._entries.values() if entry.change > known]
            gone = [] if reset else [name for name, change in self._gone.items() if change > known]
            return {"reset": reset, "rows": rows, "gone": gone, "now": time.time()}, ListCursor(self._id, self._change)

    def row(self, name: str) -> dict[str, Any] | None:
        """The row of a run as of the last scan; None when there is no such run."""
        with self._lock:
            entry = self._entries.get(name)
            return entry.row if entry else None

    def newest(self, *states: str) -> str:
        """The name of the newest run in one of these states; empty when there is none."""
        return next((str(row["name"]) for row in self.rows() if row["state"] in states), "")

    def rows(self, at_once: bool = True) -> list[dict[str, Any]]:
        """The rows of all runs, the newest first; `at_once` as in `since`."""
        listed, _ = self.since(ListCursor(), at_once)
        return sorted(listed["rows"] if listed else [], key=lambda row: (row["created"], row["name"]), reverse=True)

    def _scan(self) -> None:
        """Scan all folders: update the rows of those that have changed, drop those that are gone."""
        folder = str(runs.runs_dir())
        if folder != self._folder:
            self._begin(folder)
        change, left, seen = self._change + 1, READ_IN_ALL, set()
        try:
            names = runs.folder_names()
        except OSError:
            names = []
        for name in names:
            entry = self._entries.get(name)
            try:
                entry = entry or ListedRun(runs.get(name))
                left -= self._update(entry, f"{folder}/{name}", change, left)
            except (RunError, OSError):
                continue  # not a run, or not any more
            self._entries[name] = entry
            self._gone.pop(name, None)
            seen.add(name)
        for name in self._entries.keys() - seen:
            del self._entries[name]
            self._gone[name] = self._change = change
        self._scanned = time.monotonic()

    def _update(self, entry: ListedRun, path: str, change: int, left: int) -> int:
        """Update the row if the folder has changed; returns the bytes read for held-out losses."""
        stamp = folder_stamp(path)
        if stamp == entry.stamp and not entry.held_out.behind:
            return 0
        if entry.stamp and stamp[0][0] != entry.stamp[0][0]:
            entry.run = runs.get(entry.run.name)  # another run took the name
        read = entry.held_out.read(min(left, READ_AT_ONCE))
        best = entry.held_out.best
        row = {**entry.row, "loss": best} if stamp == entry.stamp else run_row(entry.run, best)
        if row != entry.row:
            entry.row, entry.change, self._change = row, change, change
        entry.stamp = stamp
        return read


LISTING = Listing()
"""The listing that all pages share."""


def folder_stamp(path: str) -> tuple[Any, ...]:
    """A value that changes whenever the run's row may change."""
    try:
        held = locks.is_held(Path(path, "run.lock"))
    except OSError:  # the run is unreadable
        held = None
    return (
        file_stamp(f"{path}/events.jsonl"),
        os.path.exists(f"{path}/adapter/{checkpoint.MANIFEST}"),
        file_stamp(f"{path}/{evaluation_job.FOLDER}"),
        file_stamp(f"{path}/{atlas_job.FOLDER}"),
        held,
    )


def file_stamp(path: str) -> tuple[int, int, int]:
    """A value that changes with a file and who may read it, or with the names in a folder; zeros if there is none."""
    try:
        found = os.lstat(path)
    except OSError:
        return 0, 0, 0
    return found.st_ino, found.st_size, found.st_ctime_ns


def run_row(run: Run, held_out: float | None) -> dict[str, Any]:
    """A run's row: its `status()`, `group`, `ends` (unix seconds, None when not known), `speed` (tokens/s),
    `loss` (the lowest held-out), `score` (`{kind, value}` of the newest evaluation that has one) and `atlases` (their
    numbers, the newest first)."""
    status, group, last = run.summary()
    speed, ends = training_pace(run, last)
    return {
        **status,
        "group": group,
        "speed": speed,
        "ends": ends if status["state"] == "running" else None,
        "loss": held_out,
        "score": newest_score(run),
        "atlases": [one.number for one in atlas_job.atlases_of(run) if one.file("atlas.json").exists()],
    }


def training_pace(run: Run, last: dict[str, Any]) -> tuple[float | None, float | None]:
    """Tokens/s and the time the training ends (unix seconds), from the last logged step or the end of the run."""
    if last["type"] == "":  # no events, or unreadable ones
        return None, None
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
