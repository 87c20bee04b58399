"""The comparison of the runs marked in the list: results, curves, differing settings and routing side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr

from app.ui.panels.live import ACTIVE_STATES
from app.ui.wiring import QUIET, on_change
from app.views.compare import compare_view, comparison_value
from mole import runs
from mole.analysis import compare
from mole.core.errors import RunError

COMPARE_POLL_SECONDS = 3.0
READ_SECONDS = 2.0
"""For the events of all compared runs, in one poll; the next poll reads on."""


@dataclass
class ComparisonPanel:
    """The components; `shown` are the outputs of `show_comparison`, `refresh_comparison` and `pause_comparison`.

    Attributes:
        names: the names of the runs to compare; setting them shows their comparison.
        seen: the stamps of the runs when they were last sent, so that only changes are sent.
    """

    names: gr.State
    seen: gr.State
    timer: gr.Timer
    view: gr.HTML

    @property
    def shown(self) -> list[Any]:
        return [self.view, self.seen, self.timer]


def build_comparison(names: gr.State | None = None) -> ComparisonPanel:
    """Create the view in the current layout block; it follows `names`, and the runs while one of them is active."""
    view = compare_view(elem_id="compare")
    timer = gr.Timer(COMPARE_POLL_SECONDS, active=False)
    panel = ComparisonPanel(names or gr.State([]), gr.State(()), timer, view)
    on_change([panel.names], show_comparison, panel.names, panel.shown, show_progress="minimal")
    timer.tick(refresh_comparison, [panel.names, panel.seen], panel.shown, **QUIET)
    return panel


def show_comparison(names: Sequence[str]) -> list[Any]:
    """The comparison of these runs, for `shown`; with fewer than two, a hint how to get one."""
    return refresh_comparison(names, None)


def pause_comparison() -> list[Any]:
    """For `shown` in a tab that is left: polling stops."""
    return [gr.skip(), gr.skip(), gr.Timer(active=False)]


def refresh_comparison(names: Sequence[str], seen: tuple[Any, ...] | None) -> list[Any]:
    """The comparison if it has changed since `seen`, for `shown`; polling goes on while one of the runs is active."""
    stamps = tuple(comparison_stamp(name) for name in names)
    if stamps == seen:
        return [gr.skip(), gr.skip(), gr.skip()]
    comparison = compare.compare(names if len(names) > 1 else [], compare.MAX_DRAWN, READ_SECONDS)
    if len(comparison.runs) < 2:
        return [{"names": []}, stamps, gr.Timer(active=False)]
    active = any(run.status["state"] in ACTIVE_STATES for run in comparison.runs)
    unread = any(run.metrics.share < 1 for run in comparison.runs)
    return [comparison_value(comparison), None if unread else stamps, gr.Timer(active=active or unread)]


def comparison_stamp(name: str) -> tuple[Any, ...]:
    """A value that changes when there is something new to show of a run; the name alone when there is no such run."""
    try:
        run = runs.get(name)
        evaluations = sorted((path.name, path.stat().st_mtime) for path in (run.path / "evaluations").glob("*.json"))
        return name, run.state, run.events_path.stat().st_size, tuple(evaluations)
    except (RunError, OSError):
        return (name,)


def existing_runs(names: str) -> list[str]:
    """The runs of `a,b`, as in the page's address, that exist."""
    return [name for name in dict.fromkeys(names.split(",")) if comparison_stamp(name) != (name,)]
