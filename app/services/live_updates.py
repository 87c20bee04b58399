"""Updates of a run's live view: what is new since the last one, reduced to what is drawn."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from mole import runs
from mole.analysis import health
from mole.analysis.history import HISTORIES, STEP_COLUMNS, History
from mole.core import locks
from mole.core.errors import InputError, RunError
from mole.runs.event_reader import number, text_in
from mole.runs.run import Run

FIGURES = ("loss", "tokens_per_second", "memory_mb", "eta_s", "learning_rate", "grad_norm")
LOG_BYTES, LOG_LINES = 6_000, 14


@dataclass(frozen=True)
class LiveCursor:
    """What a page has been sent of a run.

    Attributes:
        run: its name.
        generation: of its history, which changes when rows that were sent are no longer valid.
        rows: number of complete rows of the training curve.
        evals: number of complete rows of the held-out curve.
        newest: time of the newest logged step, in unix seconds.
        read: bytes of events read.
        state: of the run.
    """

    run: str = ""
    generation: int = 0
    rows: int = 0
    evals: int = 0
    newest: float = 0.0
    read: int = 0
    state: str = ""


def run_update(run: Run, cursor: LiveCursor) -> tuple[dict[str, Any], LiveCursor]:
    """What is new of `run` since `cursor`, for the live view, and the next cursor.

    Reads the run's history for at most a few hundredths of a second: `reading` is the share read so far, null once it
    is complete. Rows are sent from number `at` on; with `reset`, the rows that the page has are no longer valid.
    """
    history = HISTORIES.of(run)
    more = history.advance()
    status = live_status(run)
    with history.lock:
        fresh = (cursor.run, cursor.generation) != (run.name, history.generation)
        rows, evals = (0, 0) if fresh else (cursor.rows, cursor.evals)
        newest = history.newest[-1] if history.newest else None
        moment = newest["time"] if newest else 0.0
        value = {
            "reset": fresh,
            "generation": history.generation,
            "status": status,
            "reading": history.share if more else None,
            "rows": {"at": rows, "columns": list(STEP_COLUMNS), "rows": six_digits(history.steps.rows(rows))},
            "evals": {"at": evals, "rows": six_digits(history.evals.rows(evals))},
            "marks": list(history.marks) if fresh or cursor.read != history.reader.offset else None,
            "notices": history.notices if fresh or cursor.read != history.reader.offset else None,
        }
        value |= newest_step(history, status["total_steps"]) if fresh or cursor.newest != moment else {}
        if status["state"] != cursor.state or fresh:
            value["trouble"] = failure_details(run, status)
        sent = len(history.steps.closed), len(history.evals.closed), moment, history.reader.offset
        return value, LiveCursor(run.name, history.generation, *sent, status["state"])


def newest_step(history: History, total_steps: int) -> dict[str, Any]:
    """The figures of the last logged step, its routing and the alarms; null before the first step."""
    steps = list(history.newest)
    routed = next((event for event in reversed(steps) if event["routing"]), None)
    try:
        alarms = health.alarms(history.run.config, steps, total_steps)
    except InputError:
        alarms = []
    return {
        "last": {"step": steps[-1]["step"], **{key: number(steps[-1].get(key)) for key in FIGURES}} if steps else None,
        "routing": step_routing(history.run, routed) if routed else None,
        "alarms": [asdict(alarm) for alarm in alarms],
        "watched": sum(1 for event in steps if event["routing"]) >= health.WINDOW,
    }


def step_routing(run: Run, event: dict[str, Any]) -> dict[str, Any]:
    """A step's routing for the heatmap, with the number of experts of each layer and DynMoLE's entropy threshold."""
    routing = event["routing"]
    try:
        adapter = run.config.adapter
    except InputError:
        return {"step": event["step"], **routing, "counts": None, "threshold": None}
    counts = [min(count, routing["experts"]) for count in adapter.experts_by_layer(routing["layers"])]
    threshold = getattr(adapter.params, "entropy_threshold", None)
    return {"step": event["step"], **routing, "counts": counts, "threshold": threshold}


def live_status(run: Run) -> dict[str, Any]:
    """A run's status with the texts of the live view."""
    status, _, last = run.summary()
    status["seconds"] = max(0.0, last["time"] - status["created"]) if status["state"] == "finished" else 0
    status["note"] = "The data is loaded; training starts." if last["type"] == "data" else ""
    if pid := locks.suspended_holder(run.lock_path):
        status["note"] = f"Its process {pid} is suspended and does not advance. Let it go on: kill -CONT {pid}"
    status["about"] = f"{status['router']} · {status['model']}"
    return status


def failure_details(run: Run, status: dict[str, Any]) -> dict[str, Any] | None:
    """Why a run failed or exited unexpectedly: cause, advice and the last lines of its log; None if it did not."""
    if status["state"] not in ("failed", "interrupted"):
        return None
    last = run.last_event
    if status["state"] == "failed":
        cause, advice = text_in(last, "error"), text_in(last, "advice")
    else:
        cause = run.exit_reason()
        advice = "Press Resume to continue from the last checkpoint. If it happens again, try a smaller batch."
        if runs.is_unlisted(run.name):  # a visitor's run, whose GPU was taken away
            advice = "Start it again with fewer steps."
    return {"cause": cause or "It failed without an error message.", "advice": advice or "", "log": log_end(run)}


def log_end(run: Run) -> str:
    """The last lines of the run's log, with progress bars reduced to their last state."""
    lines = [line.rstrip() for line in run.log_lines(LOG_BYTES)]
    return "\n".join([line for line in lines if line][-LOG_LINES:])


def six_digits(rows: list[list[Any]]) -> list[list[Any]]:
    """Rows with numbers of at most six digits, which is enough to draw them."""
    return [[float(f"{value:.6g}") if isinstance(value, float) else value for value in row] for row in rows]


# ---------------------------------------------------------------------------------------------------------
# What the page asks for


def fetch_step_routing(request: list[Any]) -> dict[str, Any] | None:
    """`[run, step]` → the routing of the nearest logged step, for the heatmap; None if no routing is logged."""
    name, step = request
    try:
        history = HISTORIES.of(runs.get(str(name)))
        found = history.routing_at(max(0, min(int(step), 1 << 53)))
    except (RunError, ValueError, TypeError, OverflowError):
        return None
    return step_routing(history.run, found) if found else None


def fetch_run(name: str) -> dict[str, Any] | None:
    """Everything about a run, for a page that missed an update; None when there is no such run."""
    try:
        return run_update(runs.get(str(name)), LiveCursor())[0]
    except RunError:
        return None
