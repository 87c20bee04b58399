"""Whether a run fits: an estimate, measured steps on request, and suggestions that reduce memory with one click each.

The checks are separate processes that this panel starts and polls. The panel keeps no state, so another page, or this
one after a refresh, shows the same for the same settings.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gradio as gr

from app import settings
from app.ui import forms
from app.ui.wiring import QUIET, on_change
from app.views.preflight import preflight_view
from app.views.problem import problem_value
from mole.config import RunConfig, apply_overrides
from mole.core.errors import InputError, MoleError
from mole.preflight import job as preflight_job
from mole.preflight.job import PreflightJob

TICK, TICK_IDLE = 1.0, 5.0
"""Seconds between two looks while a check goes on, and else: an answer that came late is put right by the next look."""


@dataclass
class Preflight:
    """The components; `shown` are the outputs of `refresh`."""

    view: gr.HTML
    known: gr.State
    timer: gr.Timer
    check: gr.Button
    measure: gr.Button
    wait: gr.Button
    cancel: gr.Button

    @property
    def shown(self) -> list[Any]:
        return [self.view, self.known, self.timer, self.check, self.measure, self.wait, self.cancel]


def build(form: forms.RunForm, note: gr.HTML) -> Preflight:
    """Make the panel where we stand in the layout, once the form has all its fields.

    What is wrong with the form is said in `note`, a `problem_view`.
    """
    gr.Markdown("## Does it fit?", elem_classes="heading")
    view = preflight_view(elem_id="preflight")
    locked = bool(settings.space_id())
    with gr.Row(elem_classes="buttons"):
        check = gr.Button("Check before starting", size="md", interactive=not locked, elem_id="preflight-check")
        measure = gr.Button("Measure real steps", size="md", interactive=not locked, elem_id="preflight-measure")
        wait = gr.Button("Measure when it is free", size="md", visible=False, elem_id="preflight-wait")
        cancel = gr.Button("Cancel", size="md", visible=False, elem_id="preflight-cancel")
    panel = Preflight(view, gr.State({}), gr.Timer(TICK_IDLE, active=False), check, measure, wait, cancel)
    wire(panel, form, note)
    return panel


def wire(panel: Preflight, form: forms.RunForm, note: gr.HTML) -> None:
    """The view follows the settings and the process; the buttons start and end it; a suggestion fills the form."""

    def look(known: dict[str, Any], *values: Any) -> list[Any]:
        try:
            return refresh(known, form.config(values))
        except InputError:
            return [gr.skip()] * len(panel.shown)  # said beside the field

    def press(kind: str, wait: bool = False) -> Callable[..., list[Any]]:
        def start(*values: Any) -> list[Any]:
            settings.forbid_on_space()
            try:
                config = form.config(values)
                begin(config, kind, wait)
                return [problem_value(), *refresh({}, config)]
            except MoleError as error:
                return [form.problem_of(values, error, reveal=True), *[gr.skip()] * len(panel.shown)]

        return start

    def take(event: gr.EventData, *values: Any) -> list[Any]:
        try:
            return [problem_value(), *form.fill(with_suggestion(form.config(values), int(event._data["at"])))]
        except MoleError as error:
            return [form.problem_of(values, error, reveal=True), *[gr.skip()] * len(form.inputs)]

    def end(*values: Any) -> list[Any]:
        settings.forbid_on_space()
        for check in preflight_job.running_jobs():
            check.cancel()
        return look({}, *values)

    given, outputs = [panel.known, *form.inputs], [note, *panel.shown]
    panel.timer.tick(look, given, panel.shown, queue=False, **QUIET)
    on_change(form.inputs, look, given, panel.shown, queue=False)
    estimate = press("estimate")
    panel.check.click(estimate, form.inputs, outputs, **QUIET)
    panel.measure.click(press("measurement"), form.inputs, outputs, **QUIET)
    panel.wait.click(press("measurement", wait=True), form.inputs, outputs, **QUIET)
    panel.cancel.click(end, form.inputs, panel.shown, **QUIET)
    panel.view.select(take, form.inputs, [note, *form.inputs], queue=False, **QUIET).then(
        estimate, form.inputs, outputs, **QUIET
    )


def refresh(known: dict[str, Any], config: RunConfig) -> list[Any]:
    """For `shown`: what is known of a run's cost; what the page has already does not travel."""
    check = PreflightJob.of(config)
    value, alive = value_of(check), check.alive
    elsewhere = not alive and bool(preflight_job.running_jobs())
    seen = {**value, "alive": alive, "elsewhere": elsewhere}
    if seen == known:
        return [gr.skip()] * 7
    locked = bool(settings.space_id())
    busy = value["state"] is not None and value["state"]["phase"] == "busy"
    return [
        value,
        seen,
        gr.Timer(TICK if alive or elsewhere else TICK_IDLE),
        gr.Button(interactive=not alive and not locked),
        gr.Button(interactive=not alive and not locked, visible=not busy),
        gr.Button(visible=busy and not alive),
        gr.Button(visible=alive or elsewhere),
    ]


def value_of(check: PreflightJob) -> dict[str, Any]:
    """The view's value: the estimate, the measurement and the state of a check, None where there is none."""
    state = check.state()
    shown = {key: state[key] for key in ("kind", "phase", "text", "share")} if state else None
    return {
        "estimate": check.read("estimate") or None,
        "measurement": check.read("measurement") or None,
        "state": shown,
    }


def begin(config: RunConfig, kind: str, wait: bool) -> None:
    """Start a check; a measurement of settings that were never estimated is estimated with it."""
    check = PreflightJob.of(config)
    if kind == "measurement" and not check.read("estimate"):
        kind = "both"
    check.start(config, kind, wait=wait)


def with_suggestion(config: RunConfig, at: int) -> RunConfig:
    """The run's config with the `at`-th suggestion of its estimate applied."""
    suggestions = PreflightJob.of(config).read("estimate").get("suggestions", [])
    if not 0 <= at < len(suggestions):
        raise InputError("These settings have changed since they were checked; check them again.")
    return RunConfig.from_dict(apply_overrides(config.to_dict(), suggestions[at]["overrides"]))
