"""The comparison of the runs chosen in the list: numbers, curves, differing settings and routing side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr

from app.ui.panels.live import ALIVE
from app.ui.wiring import QUIET, on_change
from app.views.compare import compare_view, shown
from mole import runs
from mole.analysis import compare
from mole.core.errors import RunError

TICK = 3.0


@dataclass
class Compare:
    """The components; `shown` are the outputs of `show`, `tick` and `hide`.

    Attributes:
        names: the runs to compare, a list of their names: whoever sets it sees them compared.
        seen: what the page has been shown, so that nothing travels that has not changed.
    """

    names: gr.State
    seen: gr.State
    timer: gr.Timer
    view: gr.HTML

    @property
    def shown(self) -> list[Any]:
        return [self.view, self.seen, self.timer]


def build(names: gr.State | None = None) -> Compare:
    """Make the view where we stand in the layout; it follows `names`, and the runs while one of them is alive."""
    view = compare_view(elem_id="compare")
    made = Compare(names or gr.State([]), gr.State(()), gr.Timer(TICK, active=False), view)
    on_change([made.names], show, made.names, made.shown, show_progress="minimal")
    made.timer.tick(tick, [made.names, made.seen], made.shown, **QUIET)
    return made


def show(names: Sequence[str]) -> list[Any]:
    """The comparison of these runs, for `shown`; with fewer than two, what to do to get one."""
    return tick(names, None)


def hide() -> list[Any]:
    """For the `shown` of a view in a tab that is left: nothing ticks there."""
    return [gr.skip(), gr.skip(), gr.Timer(active=False)]


def tick(names: Sequence[str], seen: tuple[Any, ...] | None) -> list[Any]:
    """The comparison if it has changed since `seen`, for `shown`; the timer ticks while one of the runs is alive."""
    marks = tuple(mark(name) for name in names)
    if marks == seen:
        return [gr.skip(), gr.skip(), gr.skip()]
    comparison = compare.compare(names if len(names) > 1 else [], compare.MAX_DRAWN)
    if len(comparison.runs) < 2:
        return [{"names": []}, marks, gr.Timer(active=False)]
    alive = any(run.status["state"] in ALIVE for run in comparison.runs)
    return [shown(comparison), marks, gr.Timer(active=alive)]


def mark(name: str) -> tuple[Any, ...]:
    """What changes when there is something new to show of a run."""
    try:
        run = runs.get(name)
        evaluations = sorted((path.name, path.stat().st_mtime) for path in (run.path / "evaluations").glob("*.json"))
        return name, run.state, run.events_path.stat().st_size, tuple(evaluations)
    except (RunError, OSError):
        return (name,)


def asked_for(address: str) -> list[str]:
    """The runs of `?compare=a,b` in the page's address that are there."""
    return [name for name in dict.fromkeys(address.split(",")) if mark(name) != (name,)]
