"""Events of any length and content: list, show, the live view and comparisons stay quick and small."""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from app.services.endpoints import api_read_events
from app.services.listing import Listing
from mole import runs
from mole.analysis import compare, history, run_metrics
from mole.config import RunConfig
from mole.runs import event_reader
from mole.runs.run import Run

SMALL, LARGE = 16 << 20, 1 << 30
SECONDS = 2.0
"""CPU time of one look at a run."""
MEMORY = 256 << 20


def step(number: int, **more: Any) -> bytes:
    """The line of a step event."""
    return json.dumps({"time": 1e9 + number, "type": "step", "step": number, "loss": 1.5, **more}).encode() + b"\n"


ROUTING = {"layers": 30, "experts": 8, "load": [[0.125] * 8] * 30, "entropy": [0.5] * 30, "active": [2.0] * 30,
           "dead": [0] * 30}  # fmt: skip


def repeated(line: bytes) -> Callable[[BinaryIO, int], Any]:
    block = line * max(1, (1 << 20) // len(line))
    return lambda file, size: [file.write(block) for _ in range(size // len(block))]


CONTENTS: dict[str, Callable[[BinaryIO, int], Any]] = {
    "steps": repeated(step(1)),
    "steps with routing": repeated(step(1, routing=ROUTING)),
    "the longest events": repeated(step(1, more=[0.5] * 200_000)),
    "the longest events without a loss": repeated(
        step(1, more=[0.5] * 200_000).replace(b'"loss": 1.5', b'"loss": "x"')
    ),
    "empty lines": repeated(b"\n"),
    "JSON that is no event": repeated(b"{}\n"),
    "almost events": repeated(b'{"time":0,"type":"","step":-1}\n'),
    "nothing but zeros": lambda file, size: file.truncate(size),  # takes no room on the disk
    "one line": lambda file, size: (repeated(b'{"eval_loss":1,')(file, size), file.write(b"\n")),
    "one line without an end": repeated(b"["),
    "long lines that are no events": repeated(b'{"time":0,"type":"x","step":-1,"a":[' + b"1," * 200_000 + b"1]}\n"),
}


@pytest.fixture
def long_run(home: Path) -> Callable[[str, int], Run]:
    """A run with so many bytes of such events after those it began with."""

    def make(content: str, size: int) -> Run:
        run = runs.create(RunConfig.from_dict({"name": "long", "data": {"path": "rows.jsonl"}}))
        with run.events_path.open("ab") as file:
            CONTENTS[content](file, size)
        return run

    return make


def check_looks(run: Run) -> None:
    """Everything that looks at a run takes little time and memory, whatever its events are."""
    shown, listing = history.History(run), Listing()
    for look in (
        run.status, run.details, shown.advance, shown.advance, listing.rows, listing.rows,
        lambda: api_read_events("long"), lambda: api_read_events("long", 3 << 20),
        lambda: compare.compare(["long"], seconds=0.5),
    ):  # fmt: skip
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        begun = time.process_time()
        look()
        assert time.process_time() - begun < SECONDS, look
        assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10 < MEMORY, look


@pytest.mark.parametrize("content", CONTENTS)
def test_a_look_at_a_run_takes_no_longer_for_long_events(content: str, long_run: Callable[[str, int], Run]) -> None:
    check_looks(long_run(content, SMALL))


@pytest.mark.soak
@pytest.mark.parametrize("content", CONTENTS)
def test_a_look_at_a_gigabyte_takes_no_longer(content: str, long_run: Callable[[str, int], Run]) -> None:
    check_looks(long_run(content, LARGE))


def test_a_gigabyte_of_zeros_is_a_run_without_further_events(long_run: Callable[[str, int], Run]) -> None:
    run = long_run("nothing but zeros", LARGE)
    check_looks(run)
    assert run.state == "interrupted" and run.details()["total_steps"] > 0


def test_a_long_line_hides_neither_what_follows_it_nor_what_is_before_it(
    home: Path, long_run: Callable[[str, int], Run]
) -> None:
    """Also where its end alone looks like an event: a half of a line is none."""
    run = long_run("one line", 0)
    hidden = step(666)
    with run.events_path.open("ab") as file:
        file.write(step(1))
        for length in (event_reader.BLOCK - len(hidden), 2 * event_reader.BLOCK, 3 * event_reader.BLOCK - 100):
            file.write(b"x" * length + hidden)
        file.write(step(2))
    forwards = [event["step"] for event in run.events()]
    assert forwards == [0, 1, 2]
    assert [event["step"] for event in run.events_backwards()] == forwards[::-1]
    assert list(run_metrics.MetricsReader(run.events_path).read().train.steps) == [1, 2]
    assert Listing().rows()[0]["step"] == 2


def test_a_comparison_that_takes_too_long_says_how_far_it_came_and_reads_on(
    long_run: Callable[[str, int], Run],
) -> None:
    long_run("steps", 4 << 20)
    shares = []
    while not shares or shares[-1] < 1:
        found = compare.compare(["long"], seconds=0.05)
        shares.append(found.runs[0].metrics.share)
        assert any("of them have been read so far" in note for note in found.notes) == (shares[-1] < 1)
        assert len(shares) < 500
    assert shares == sorted(shares) and len(shares) > 1


def test_the_api_hands_out_long_events_in_parts(long_run: Callable[[str, int], Run]) -> None:
    run = long_run("steps with routing", 10 << 20)
    offset, parts, events = 0, 0, 0
    while True:
        part = api_read_events("long", offset)
        if not part["events"]:
            break
        offset, parts, events = part["offset"], parts + 1, events + len(part["events"])
    assert parts in (2, 3) and offset == run.events_path.stat().st_size
    assert events == len(run.events()) > 1_000
