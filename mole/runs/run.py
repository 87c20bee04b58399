"""One run's folder: its files, its events, and its state, derived each time it is asked for. No torch."""

from __future__ import annotations

import errno
import json
import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

from mole.config import RunConfig
from mole.config.yaml_loader import MAX_YAML_LENGTH
from mole.core import checkpoint, files, locks
from mole.core.errors import BusyError, InputError, RunError
from mole.runs import job, origin
from mole.runs.event_reader import (
    EventReader,
    events_backwards,
    in_order,
    lines_of,
    notices_in,
    number,
    numbers,
    parse_event,
    text_in,
)

STATES = ("queued", "running", "finished", "stopped", "interrupted", "failed", "imported", "unreadable")
"""`imported`: its events say that it waits, but it was not queued in this home, so the user has to start it;
`unreadable`: the system refuses to read its files, e.g. because they belong to root."""
NO_EVENT: dict[str, Any] = {"type": "", "step": 0, "time": 0.0}
WAITING = ("created", "queued")
LOOK_BACK_BYTES = 1 << 26
LOOK_BACK_EVENTS = 20
"""How far back the last losses are searched: bytes of all events, and events that have them."""
HEAD_BYTES = 1 << 13
"""Beginning of the events that is read for how the run was made."""
NO_ROOM = 1 << 16
"""Bytes; a disk with less free space counts as full."""


@dataclass(frozen=True)
class Run:
    """One run's folder. Making one reads nothing; each property reads its file when it is asked for."""

    name: str
    path: Path

    @property
    def adapter_dir(self) -> Path:
        return self.path / "adapter"

    @property
    def checkpoints_dir(self) -> Path:
        return self.path / "checkpoints"

    @property
    def config_path(self) -> Path:
        return self.path / "run.yaml"

    @property
    def events_path(self) -> Path:
        return self.path / "events.jsonl"

    @property
    def log_path(self) -> Path:
        return self.path / "train.log"

    @property
    def lock_path(self) -> Path:
        return self.path / "run.lock"

    @property
    def stop_path(self) -> Path:
        return self.path / "stop"

    @cached_property
    def config(self) -> RunConfig:
        """The settings in `run.yaml`. Raises `InputError` when the file is missing or damaged."""
        return RunConfig.load(self.config_path)

    def config_text(self) -> str:
        """The text of `run.yaml`. Raises `OSError`, or `ValueError` if it is not text."""
        with open(self.config_path, encoding="utf-8", opener=files.unlinked) as file:
            return file.read(MAX_YAML_LENGTH)

    # Events ------------------------------------------------------------------------------------------------

    def append_event(self, type: str, step: int, **values: Any) -> None:
        """Append one line to `events.jsonl` in a single write; a half-written last line is ended first.

        Numbers that are not finite become null, which is what JSON has for them. An event that makes the run wait tells
        that it was written in this home.
        """
        event = _finite({"time": time.time(), "type": type, "step": int(step), **values})
        if type in WAITING:
            event[origin.FIELD] = origin.sign(self.name, event)
        line = json.dumps(event) + "\n"
        descriptor = files.unlinked(self.events_path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
        try:
            size = os.fstat(descriptor).st_size
            if size and os.pread(descriptor, 1, size - 1) != b"\n":
                line = "\n" + line
            data = line.encode()
            written = os.write(descriptor, data)
            if written != len(data):
                if os.fstat(descriptor).st_size == size + written:
                    os.ftruncate(descriptor, size)  # a shorter event that names the cause may still fit
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.events_path))
        finally:
            os.close(descriptor)

    def events(self) -> list[dict[str, Any]]:
        """All events."""
        return self.read_events(0)[0]

    def read_events(self, offset: int = 0, most: float = math.inf) -> tuple[list[dict[str, Any]], int]:
        """The events of the complete lines from byte `offset` on, and the offset for the next call.

        It stops after about `most` bytes. An offset beyond the end of the file, which is then another run's, starts
        over.
        """
        reader, events = EventReader(self.events_path, offset), list[dict[str, Any]]()
        try:
            reader.refresh()
            most += reader.offset
            while not reader.at_end and reader.offset < most:
                lines = lines_of(*reader.next_block())
                events += [event for _, line in lines if (event := parse_event(line))]
        except OSError:
            return [], 0
        return events, reader.offset

    def events_backwards(self) -> Iterator[dict[str, Any]]:
        """The events from the last to the first, reading no more of the file than is asked for."""
        return events_backwards(self.events_path)

    @property
    def last_event(self) -> dict[str, Any]:
        """The last event; an empty one (type `""`) when there is none."""
        return next(self.events_backwards(), NO_EVENT)

    @property
    def _head(self) -> list[dict[str, Any]]:
        """The first events, up to `started`: how the run was made and how many steps it plans."""
        events: list[dict[str, Any]] = []
        try:
            with open(self.events_path, "rb", opener=files.unlinked) as file:
                lines = file.read(HEAD_BYTES).split(b"\n")[:-1]
        except OSError:
            return events
        for event in filter(None, map(parse_event, lines)):
            if event["type"] not in ("created", "queued", "starting", "started", "stopped"):
                break
            events.append(event)
        return events

    def log_lines(self, max_bytes: int) -> list[str]:
        """The lines in the last `max_bytes` bytes of `train.log`, progress bars reduced to their last state."""
        try:
            with open(self.log_path, "rb", opener=files.unlinked) as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - max_bytes))
                text = file.read().decode("utf-8", errors="replace")
        except OSError:
            return []
        return [line.rpartition("\r")[2] for line in text.replace("\r\n", "\n").split("\n")]

    # State -------------------------------------------------------------------------------------------------

    @property
    def held(self) -> bool:
        """Whether a process holds the run: it trains or waits for its device."""
        return locks.is_held(self.lock_path)

    @property
    def suspended(self) -> bool:
        """Whether its process is suspended, see `mole.core.locks.suspended_holder`."""
        return locks.suspended_holder(self.lock_path) is not None

    @property
    def state(self) -> str:
        """One of `STATES`, derived: lock held → running (or waiting); adapter there → finished; else the last event."""
        return self.observe()[0]

    def observe(self) -> tuple[str, dict[str, Any]]:
        """The state and the last event it was derived from."""
        try:
            return self._observe()
        except OSError:
            return "unreadable", NO_EVENT

    def _observe(self) -> tuple[str, dict[str, Any]]:
        held = self.held  # before the events: a process writes its last event before it releases the lock
        last = self.last_event
        if held:
            return ("queued" if last["type"] in WAITING else "running"), last
        state = self.state_unheld(last)
        if state == "interrupted" and self.held:  # it started between the two checks
            return "running", last
        return state, last

    def state_unheld(self, last: dict[str, Any]) -> str:
        """The state when no process holds the run, by its last event."""
        if files.is_folder(self.adapter_dir) and files.is_file(self.adapter_dir / checkpoint.MANIFEST):
            return "finished"
        if last["type"] in WAITING:
            return "queued" if origin.is_from_here(self.name, last) else "imported"
        return last["type"] if last["type"] in ("stopped", "failed") else "interrupted"

    @property
    def step(self) -> int:
        """The optimizer steps done, as the last event says."""
        return int(self.last_event["step"])

    @property
    def group(self) -> str | None:
        """The group of runs it was queued with; None for a run of its own."""
        return next((text_in(event, "group") for event in self._head if event["type"] == "created"), None)

    @cached_property
    def created(self) -> float:
        """When the run was created, in unix seconds."""
        return self._created_in(self._head)

    @property
    def begun(self) -> float:
        """When the run was created or, of a run that continues others, the first of them; in unix seconds."""
        told = (number(event.get("begun")) for event in self._head if event["type"] == "created")
        return next((moment for moment in told if moment is not None), self.created)

    def _created_in(self, head: list[dict[str, Any]]) -> float:
        times = [event["time"] for event in head if event["type"] == "created"]
        if times:
            return float(times[0])
        try:
            return self.config_path.lstat().st_mtime
        except PermissionError:  # the folder may not be entered
            return self.path.lstat().st_mtime

    def status(self) -> dict[str, Any]:
        """Name, state, step, total_steps (0 while unknown), router, model and created (unix seconds)."""
        return self.summary()[0]

    def summary(self) -> tuple[dict[str, Any], str | None, dict[str, Any]]:
        """`status()`, the group and the last event from one reading, for a list of many runs."""
        state, last = self.observe()
        head = self._head
        made: dict[str, Any] = {}
        for event in head:
            if event["type"] in ("created", "started"):
                made.update({key: told for key in ("router", "model") if (told := text_in(event, key))})
                # what it was made for comes first: a run that continues another begins with the events of that one
                steps = made.get("total_steps") or event.get("total_steps")
                if isinstance(steps, int) and 0 < steps < 1 << 53:
                    made["total_steps"] = steps
        if "router" not in made or "model" not in made:
            made = {**self._made(), **made}
        status = {
            "name": self.name,
            "state": state,
            "step": int(last["step"]),
            "total_steps": int(made.get("total_steps") or 0),
            "router": made["router"],
            "model": made["model"],
            "created": self._created_in(head),
        }
        return status, next((text_in(event, "group") for event in head if event["type"] == "created"), None), last

    def _made(self) -> dict[str, Any]:
        """Router, model and steps from `run.yaml`, for a folder whose events do not have them."""
        try:
            config = self.config
        except InputError:
            return {"router": "?", "model": "?", "total_steps": 0}
        return creation_facts(config)

    def details(self) -> dict[str, Any]:
        """`status()` with `config`, `metrics` (the finished run's, and the last `loss` and `eval_loss`) and `error`.

        `error` is what went wrong, null when nothing did; `advice` what to do about it; `notices` what else to know.
        """
        status, _, last = self.summary()
        if status["state"] == "unreadable":
            raise RunError(self.why_unreadable())
        metrics: dict[str, Any] = {}
        error = advice = None
        for key in ("loss", "eval_loss"):
            events = events_backwards(self.events_path, LOOK_BACK_BYTES, f'"{key}"'.encode())
            values = (number(event.get(key)) for event in islice(events, LOOK_BACK_EVENTS))
            if (value := next((value for value in values if value is not None), None)) is not None:
                metrics[key] = value
        if last["type"] == "finished":
            metrics.update(numbers(last.get("metrics")))
        elif last["type"] == "failed":
            error, advice = text_in(last, "error"), text_in(last, "advice")
        if status["state"] == "interrupted":
            error = self.exit_reason()
            advice = f"Continue from the last checkpoint: mole runs resume {self.name}"
        elif status["state"] == "imported":
            advice = f"It was queued elsewhere, so it does not start by itself. Start it: mole runs resume {self.name}"
        elif status["state"] == "queued" and self._has_no_process():
            error = "It is queued, but no process waits for its turn: it was killed, or the machine went down."
            advice = f"Start it again: mole runs resume {self.name}"
        elif pid := locks.suspended_holder(self.lock_path):
            error = f"Its process {pid} is suspended (SIGSTOP or Ctrl-Z): it does not advance, and keeps what it holds."
            advice = f"Let it go on: kill -CONT {pid}"
        told = {"metrics": metrics, "error": error, "advice": advice, "notices": self.notices()}
        return {**status, "config": self.config.to_dict(), **told}

    def notices(self) -> list[str]:
        """What somebody should know of the run, in sentences, as its last start, its data and its end told."""
        told: dict[str, list[str]] = {}
        for event in islice(events_backwards(self.events_path, LOOK_BACK_BYTES, b'"notices"'), LOOK_BACK_EVENTS):
            told.setdefault(event["type"], notices_in(event))
        return in_order(told)

    def exit_reason(self) -> str:
        """Why a process exited without writing its last event, as far as it can be told."""
        disk = os.statvfs(self.path)
        if disk.f_bavail * disk.f_frsize < NO_ROOM or (disk.f_files and not disk.f_favail):
            return f"The process exited because the disk is full ({self.path}). Free some space first."
        return job.EXITED

    def why_unreadable(self) -> str:
        """Why the run's files cannot be read, and what to do."""
        try:
            self._observe()
        except OSError as error:
            problem = f"{error.strerror}: {error.filename or self.path}"
        else:
            problem = "it could not be read a moment ago; look again"
        try:
            foreign = self.path.lstat().st_uid != os.getuid() or self.lock_path.lstat().st_uid != os.getuid()
        except OSError:
            foreign = True
        advice = f'Make it yours with: sudo chown -R "$USER" {self.path}' if foreign else "Check its permissions."
        return f"The run {self.name} cannot be read ({problem}). {advice}"

    def _has_no_process(self) -> bool:
        """Whether no process holds this queued run and none can still be starting."""
        return not self.held and not job.just_started(self.last_event["time"])

    # Locks and stopping --------------------------------------------------------------------------------------

    def lock(self, patience: float = 0.5) -> locks.Lock:
        """Hold the run (a context manager). Raises `BusyError` naming the holder, `RunError` when it is gone."""
        try:
            lock = locks.acquire(self.lock_path, patience)
        except FileNotFoundError:
            raise RunError(f"The run {self.name!r} was deleted.") from None
        if lock is None:
            raise BusyError(f"The run {self.name} is held by {locks.describe_holder(self.lock_path)}.")
        return lock

    def request_stop(self) -> None:
        """Ask the run's process to save and stop; it checks after every step."""
        files.create(self.stop_path)

    def stop_requested(self) -> bool:
        """Whether a stop was requested."""
        return os.path.lexists(self.stop_path)

    def stop_requested_at(self) -> float | None:
        """When a stop was requested, in unix seconds; None if none was."""
        try:
            return os.lstat(self.stop_path).st_mtime
        except OSError:
            return None

    def clear_stop(self) -> None:
        """Withdraw a request to stop."""
        self.stop_path.unlink(missing_ok=True)


def creation_facts(config: RunConfig) -> dict[str, Any]:
    """What the `created` event holds of a config, so that a list of runs need not parse YAML."""
    return {
        "router": config.adapter.router,
        "model": config.model.name,
        "total_steps": config.training.max_steps,
        **({"group": config.group} if config.group else {}),
    }


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    return value
