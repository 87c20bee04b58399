"""Reading `events.jsonl`: lines that are events, told from damage, and each read once from where the last read stopped.

The file is append-only, may be gigabytes long, may be written to at this moment, and may be another run's under the
same name: its content is never trusted. No torch.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mole.core import files

BLOCK = 1 << 20
"""Bytes read at a time; no line of an event is longer."""
TAIL_BLOCK = 1 << 14
"""Bytes read at a time from the end."""
MAX_DAMAGE = 6 << 20
"""Bytes of lines that are no events after which the search for one from the end is given up."""
LINE_COST, READ_COST = 160, 16
"""A line counts as so many bytes more, since each takes time; of bytes that are only read, one in so many counts."""
SHORTEST = len('{"time":0,"type":"","step":0}')
"""Bytes of the shortest line that is an event."""
IDENTITY_BYTES = 64
"""First bytes of the file, which tell another file under the same name and number."""
ROUTING_KEY = b'"routing":'
LONE_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
"""What may be half of a surrogate pair, which neither a page nor UTF-8 can hold."""
NOTICED = ("started", "data", "finished")
"""The events with notices, in their order."""
LONGEST_NOTICE = 2_000
"""Characters of a notice."""
LARGEST_METRIC = 1e40
"""Beyond 32-bit floating point, but squares and sums of such numbers are still finite in 64 bits."""


class EventReader:
    """Reads the complete lines of a run's events once, a block at a time, from where it stopped.

    Attributes:
        offset: bytes read so far.
        size: bytes of the file at the last `refresh`.
        at_end: whether nothing complete is left to read.
    """

    def __init__(self, path: Path, offset: int = 0) -> None:
        self.path, self.offset, self.size, self.at_end = path, offset, 0, False
        self._file: tuple[int, int] | None = None
        self._head = b""
        self._in_overlong = False

    def refresh(self) -> bool:
        """Look at the file again; true when reading starts over: it is shorter, another one, or begins differently.

        Raises `OSError` when it cannot be read.
        """
        with open(self.path, "rb", opener=files.unlinked) as file:
            stat, head = os.fstat(file.fileno()), file.read(IDENTITY_BYTES)
        identity = stat.st_dev, stat.st_ino
        same = self._file in (None, identity) and head.startswith(self._head) and stat.st_size >= self.offset
        self._file, self._head, self.size, self.at_end = identity, head, stat.st_size, False
        if not same:
            self.offset, self._in_overlong = 0, False
        return not same

    def next_block(self, most: int = BLOCK) -> tuple[int, bytes]:
        """The next complete lines in at most `most` bytes, and the offset of the first. Raises `OSError`."""
        with open(self.path, "rb", opener=files.unlinked) as file:
            file.seek(self.offset)
            data = file.read(most)
        self.at_end = len(data) < most
        begin, end = 0, data.rfind(b"\n") + 1
        if self._in_overlong:  # no event is so long: what is left of its line is not one either
            begin = data.find(b"\n") + 1
        if not end:
            self._in_overlong = self._in_overlong or not self.at_end
            end = begin = len(data) if self._in_overlong else 0
        else:
            self._in_overlong = False
        start = self.offset + begin
        self.offset += end
        return start, data[begin:end]


def lines_of(start: int, block: bytes) -> Iterator[tuple[int, bytes]]:
    """The lines of a block that begins at byte `start`, each with its own offset and without its newline.

    Lines too short for an event are left out.
    """
    for line in block.split(b"\n")[:-1]:
        if len(line) >= SHORTEST:
            yield start, line
        start += len(line) + 1


def events_backwards(path: Path, most: int = sys.maxsize, holding: bytes = b"") -> Iterator[dict[str, Any]]:
    """The events from the last to the first, reading no more of the file than is asked for, and at most `most` bytes.

    It ends early where `MAX_DAMAGE` is reached between two events. Only lines with the text `holding` are parsed.
    """
    if not files.is_file(path):
        return
    with open(path, "rb", opener=files.unlinked) as file:
        end = start = file.seek(0, os.SEEK_END)
        rest, damage = b"", 0
        dropping = True  # what follows the last newline is still being written
        while start > 0 and damage < MAX_DAMAGE and end - start < most:
            size = min(max(TAIL_BLOCK, len(rest)), start)  # doubled for a line that does not end
            start -= size
            damage += size // READ_COST
            file.seek(start)
            rest, *lines = (file.read(size) + rest).split(b"\n")
            if lines and dropping:
                lines.pop()
                dropping = False
            for line in reversed(lines):
                damage += LINE_COST + len(line)
                if len(line) < SHORTEST:
                    continue
                if holding not in line:
                    damage = 0  # it may be an event
                elif event := parse_event(line):
                    damage = 0
                    yield event
            if len(rest) > BLOCK:  # no event is so long; its beginning is dropped, too
                rest, dropping = b"", True
        if not start and not dropping and holding in rest and (event := parse_event(rest)):
            yield event


# ---------------------------------------------------------------------------------------------------------
# Lines


def parse_event(line: bytes) -> dict[str, Any] | None:
    """The event in a line; None for what is not one: damage, or the rest of a write that was cut off."""
    if not SHORTEST <= len(line) < BLOCK:
        return None
    try:
        event = json.loads(line, parse_int=_parse_int)
        if LONE_SURROGATE.search(line):
            json.dumps(event, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        return None
    return event if is_event(event) else None


def _parse_int(digits: str) -> float:
    """A whole number as JavaScript can hold it: of more than 64 bits only the first digits count."""
    return int(digits) if len(digits) < 19 else float(digits)


def is_event(event: Any) -> bool:
    """Whether a parsed line has what every event has: a type, and a plausible step and time."""
    if not isinstance(event, dict):
        return False
    step, moment = event.get("step"), event.get("time")
    return (
        isinstance(event.get("type"), str)
        and isinstance(step, int)
        and 0 <= step < 1 << 53
        and isinstance(moment, (int, float))
        and 0 <= moment < 1 << 40
    )


def parse_without_routing(line: bytes) -> tuple[dict[str, Any] | None, bool]:
    """A line's event without its routing, and whether it has some; None for a line that is no event.

    The routing is by far the longest part and the last one, so it is cut off before parsing; where it is not the
    last, or the rest does not parse without it, the whole line is parsed.
    """
    at = line.find(ROUTING_KEY)
    value = at + len(ROUTING_KEY)
    plain = line[value : value + 2].lstrip()[:1] == b"{" and line.find(b"}", value) == len(line) - 2
    if at > 0 and line.endswith(b"}") and (plain or line[value:].strip() == b"null}"):
        event = parse_event(line[:at].rstrip(b" ,") + b"}")
        if event is not None:
            return event, plain
    event = parse_event(line)
    return event, bool(event and event.pop("routing", None))


# ---------------------------------------------------------------------------------------------------------
# Values


def text_in(event: dict[str, Any], key: str) -> str | None:
    """A text of an event; None when it is none."""
    value = event.get(key)
    return value if isinstance(value, str) else None


def notices_in(event: dict[str, Any]) -> list[str]:
    """What somebody should know of a run, as an event tells it: at most twenty sentences."""
    told = event.get("notices")
    return [text[:LONGEST_NOTICE] for text in told if isinstance(text, str)][:20] if isinstance(told, list) else []


def in_order(told: Mapping[str, list[str]]) -> list[str]:
    """The sentences that the events of a run tell, by their types: those of its start, its data and its end."""
    return [notice for kind in NOTICED for notice in told.get(kind, [])]


def number(value: Any) -> float | None:
    """A number as it is; None for anything else, and for one that no training reaches."""
    return value if isinstance(value, (int, float)) and abs(value) < LARGEST_METRIC else None


def numbers(values: Any) -> dict[str, float]:
    """The numbers among named values; none when they are no mapping."""
    known = {name: number(value) for name, value in values.items()} if isinstance(values, dict) else {}
    return {name: value for name, value in known.items() if value is not None}


def routing_of(event: dict[str, Any]) -> dict[str, Any] | None:
    """The routing statistics of a step event, if they are whole: a table `load` and three lists by layer."""
    routing = event.get("routing")
    if not isinstance(routing, dict):
        return None
    layers, experts, load = (routing.get(key) for key in ("layers", "experts", "load"))
    if not (isinstance(layers, int) and isinstance(experts, int) and experts):
        return None
    lists = [routing.get(key) for key in ("entropy", "active", "dead")]
    if not layers or not all(isinstance(each, list) and len(each) == layers for each in (load, *lists)):
        return None
    rows = [row for row in load or [] if isinstance(row, list) and len(row) == experts]
    entries = [value for values in (*rows, *lists) for value in values or []]
    return routing if len(rows) == layers and all(number(value) is not None for value in entries) else None
