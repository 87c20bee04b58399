"""What the live view of a run is fed with: the events since the last look, cut down to what is drawn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mole.errors import InputError
from mole.runs import Run

MAX_POINTS = 1500
"""Points of a curve sent at once; more than a screen has pixels for would only make the page slow."""
LAST = ("loss", "tokens_per_second", "memory_mb", "eta_s", "learning_rate", "grad_norm")
ENDED = ("finished", "stopped", "failed", "interrupted")


@dataclass(frozen=True)
class Cursor:
    """How far a page has read a run's events: a byte offset, and the run it belongs to."""

    run: str = ""
    offset: int = 0


def delta(run: Run, cursor: Cursor) -> tuple[dict[str, Any], Cursor]:
    """What is new of `run` since `cursor`, for the live view, and the next cursor.

    A cursor of another run, or one past the end of the file, starts over and says so with `reset`.
    """
    events, offset = run.read_events(cursor.offset if cursor.run == run.name else 0)
    fresh = cursor.run != run.name or cursor.offset == 0 or offset < cursor.offset
    steps = [event for event in events if event["type"] == "step"]
    routing = next((event["routing"] for event in reversed(steps) if event.get("routing")), None)
    value = {
        "reset": fresh,
        "status": status(run),
        "points": thinned([[event["step"], event.get("loss")] for event in steps]),
        "evals": [[event["step"], event.get("eval_loss")] for event in events if event["type"] == "eval"],
        "routing": {**routing, "counts": expert_counts(run, routing["layers"])} if routing else None,
        "last": {key: steps[-1].get(key) for key in LAST} if steps else None,
    }
    return value, Cursor(run.name, offset)


def status(run: Run) -> dict[str, Any]:
    """A run's status with the words the live view shows."""
    known = run.status()
    if known["state"] in ("failed", "interrupted"):
        details = run.details()
        known |= {"error": details["error"], "advice": details["advice"]}
    last = run.last_event
    known["seconds"] = last["time"] - known["created"] if known["state"] == "finished" else 0
    known["note"] = "The data is ready; training begins." if last["type"] == "data" else ""
    known["about"] = f"{known['router']} · {known['model']}"
    return known


def expert_counts(run: Run, layers: int) -> list[int] | None:
    """Experts of each layer, as the run's config allocates them; None when the config cannot be read."""
    try:
        adapter = run.config.adapter
    except InputError:
        return None
    return [adapter.experts_at(layer, layers) for layer in range(layers)]


def thinned(points: list[list[Any]], most: int = MAX_POINTS) -> list[list[Any]]:
    """At most `most` points, evenly taken, the last one always among them."""
    if len(points) <= most:
        return points
    stride = -(-len(points) // most)
    return points[::-1][::stride][::-1]
