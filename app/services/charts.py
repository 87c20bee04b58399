"""What the live view of a run is fed with: what is new since the last look, cut down to what is drawn."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from mole import runs
from mole.analysis import health
from mole.analysis.history import HISTORIES, STEP_COLUMNS, History
from mole.core.errors import InputError, RunError
from mole.runs.event_reader import number, text_in
from mole.runs.run import Run

LAST = ("loss", "tokens_per_second", "memory_mb", "eta_s", "learning_rate", "grad_norm")
LOG_BYTES, LOG_LINES = 6_000, 14


@dataclass(frozen=True)
class Cursor:
    """What a page has been told of a run: rows of which generation, how many, and the newest step and marks."""

    run: str = ""
    generation: int = 0
    rows: int = 0
    evals: int = 0
    newest: float = 0.0
    read: int = 0
    state: str = ""


def delta(run: Run, cursor: Cursor) -> tuple[dict[str, Any], Cursor]:
    """What is new of `run` since `cursor`, for the live view, and the next cursor.

    Reads on in the run's history for at most a few hundredths of a second: `reading` is the share read so far, null
    once all of it is. Rows are sent from number `at` on; with `reset`, what the page had is no longer right.
    """
    history = HISTORIES.of(run)
    more = history.advance()
    known = status(run)
    with history.lock:
        fresh = (cursor.run, cursor.generation) != (run.name, history.generation)
        rows, evals = (0, 0) if fresh else (cursor.rows, cursor.evals)
        newest = history.newest[-1] if history.newest else None
        moment = newest["time"] if newest else 0.0
        value = {
            "reset": fresh,
            "generation": history.generation,
            "status": known,
            "reading": history.share if more else None,
            "rows": {"at": rows, "columns": list(STEP_COLUMNS), "rows": tidy(history.steps.rows(rows))},
            "evals": {"at": evals, "rows": tidy(history.evals.rows(evals))},
            "marks": list(history.marks) if fresh or cursor.read != history.reader.offset else None,
        }
        value |= newest_of(history, known["total_steps"]) if fresh or cursor.newest != moment else {}
        if known["state"] != cursor.state or fresh:
            value["trouble"] = trouble(run, known)
        told = len(history.steps.closed), len(history.evals.closed), moment, history.reader.offset
        return value, Cursor(run.name, history.generation, *told, known["state"])


def newest_of(history: History, total_steps: int) -> dict[str, Any]:
    """The last logged step's numbers, its routing and the alarms; nulls before there is one."""
    steps = list(history.newest)
    routed = next((event for event in reversed(steps) if event["routing"]), None)
    try:
        alarms = health.alarms(history.run.config, steps, total_steps)
    except InputError:
        alarms = []
    return {
        "last": {"step": steps[-1]["step"], **{key: number(steps[-1].get(key)) for key in LAST}} if steps else None,
        "routing": routing_value(history.run, routed) if routed else None,
        "alarms": [asdict(alarm) for alarm in alarms],
        "watched": sum(1 for event in steps if event["routing"]) >= health.WINDOW,
    }


def routing_value(run: Run, event: dict[str, Any]) -> dict[str, Any]:
    """A step's routing as the heatmap wants it, with the number of experts each layer has and the entropy's line."""
    routing = event["routing"]
    try:
        adapter = run.config.adapter
    except InputError:
        return {"step": event["step"], **routing, "counts": None, "threshold": None}
    counts = [min(count, routing["experts"]) for count in adapter.experts_by_layer(routing["layers"])]
    threshold = getattr(adapter.params, "entropy_threshold", None)
    return {"step": event["step"], **routing, "counts": counts, "threshold": threshold}


def status(run: Run) -> dict[str, Any]:
    """A run's status with the words the live view shows."""
    known, _, last = run.summary()
    known["seconds"] = max(0.0, last["time"] - known["created"]) if known["state"] == "finished" else 0
    known["note"] = "The data is ready; training begins." if last["type"] == "data" else ""
    known["about"] = f"{known['router']} · {known['model']}"
    return known


def trouble(run: Run, known: dict[str, Any]) -> dict[str, Any] | None:
    """Why a run failed or ended without a word: cause, advice and the last lines of its log; None when it did not."""
    if known["state"] not in ("failed", "interrupted"):
        return None
    last = run.last_event
    if known["state"] == "failed":
        cause, advice = text_in(last, "error"), text_in(last, "advice")
    else:
        cause = run.exit_reason()
        advice = "Press Resume to go on from the last checkpoint. If it happens again, try a smaller batch."
    return {"cause": cause or "It failed without saying why.", "advice": advice or "", "log": log_end(run)}


def log_end(run: Run) -> str:
    """The last lines of the run's log, progress bars reduced to their last state."""
    lines = [line.rstrip() for line in run.log_lines(LOG_BYTES)]
    return "\n".join([line for line in lines if line][-LOG_LINES:])


def tidy(rows: list[list[Any]]) -> list[list[Any]]:
    """Rows with numbers no longer than a picture needs."""
    return [[float(f"{value:.6g}") if isinstance(value, float) else value for value in row] for row in rows]


# ---------------------------------------------------------------------------------------------------------
# What the view asks for


def routing_at(request: list[Any]) -> dict[str, Any] | None:
    """`[run, step]` → the routing of the logged step nearest to it, as the heatmap wants it; None without one."""
    name, step = request
    try:
        history = HISTORIES.of(runs.get(str(name)))
        found = history.routing_at(max(0, min(int(step), 1 << 53)))
    except (RunError, ValueError, TypeError, OverflowError):
        return None
    return routing_value(history.run, found) if found else None


def whole(name: str) -> dict[str, Any] | None:
    """All that is known of a run, for a page that missed a part; None when there is no such run."""
    try:
        return delta(runs.get(str(name)), Cursor())[0]
    except RunError:
        return None
