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
from app.ui.forms import RunForm
from app.ui.wiring import QUIET, on_change
from app.views.preflight import preflight_view
from app.views.problem import problem_value
from mole.config import RunConfig, apply_overrides
from mole.core.errors import InputError, MoleError
from mole.preflight import job as preflight_job
from mole.preflight.job import PreflightJob

CHECK_POLL_SECONDS, IDLE_POLL_SECONDS = 1.0, 5.0
"""Seconds between two updates while a check runs, and otherwise, so that a late result is shown too."""


@dataclass
class PreflightPanel:
    """The components; `shown` are the outputs of `refresh_preflight`."""

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


def build_preflight(form: RunForm, note: gr.HTML) -> PreflightPanel:
    """Create the panel in the current layout block, once the form has all its fields; `note` is the form's problem."""
    gr.Markdown("## Does it fit?", elem_classes="heading")
    view = preflight_view(elem_id="preflight")
    locked = bool(settings.space_id())
    with gr.Row(elem_classes="buttons"):
        check = gr.Button("Check before starting", size="md", interactive=not locked, elem_id="preflight-check")
        measure = gr.Button("Measure real steps", size="md", interactive=not locked, elem_id="preflight-measure")
        wait = gr.Button("Measure when it is free", size="md", visible=False, elem_id="preflight-wait")
        cancel = gr.Button("Cancel", size="md", visible=False, elem_id="preflight-cancel")
    panel = PreflightPanel(view, gr.State({}), gr.Timer(IDLE_POLL_SECONDS, active=False), check, measure, wait, cancel)
    wire_preflight(panel, form, note)
    return panel


def wire_preflight(panel: PreflightPanel, form: RunForm, note: gr.HTML) -> None:
    """The view follows the settings and the process; buttons start and cancel it; a suggestion changes the form."""

    def update(known: dict[str, Any], *values: Any) -> list[Any]:
        try:
            return refresh_preflight(known, form.config(values))
        except InputError:
            return [gr.skip()] * len(panel.shown)  # shown beside the field

    def press(kind: str, wait: bool = False) -> Callable[..., list[Any]]:
        def start(*values: Any) -> list[Any]:
            settings.forbid_on_space()
            try:
                config = form.config(values)
                start_check(config, kind, wait)
                return [problem_value(), *refresh_preflight({}, config)]
            except MoleError as error:
                return [form.problem_of(values, error, reveal=True), *[gr.skip()] * len(panel.shown)]

        return start

    def apply_suggestion(event: gr.EventData, *values: Any) -> list[Any]:
        try:
            return [problem_value(), *form.fill(with_suggestion(form.config(values), int(event._data["at"])))]
        except MoleError as error:
            return [form.problem_of(values, error, reveal=True), *[gr.skip()] * len(form.inputs)]

    def cancel(*values: Any) -> list[Any]:
        settings.forbid_on_space()
        for check in preflight_job.running_jobs():
            check.cancel()
        return update({}, *values)

    given, outputs = [panel.known, *form.inputs], [note, *panel.shown]
    panel.timer.tick(update, given, panel.shown, queue=False, **QUIET)
    on_change(form.inputs, update, given, panel.shown, queue=False)
    estimate = press("estimate")
    panel.check.click(estimate, form.inputs, outputs, **QUIET)
    panel.measure.click(press("measurement"), form.inputs, outputs, **QUIET)
    panel.wait.click(press("measurement", wait=True), form.inputs, outputs, **QUIET)
    panel.cancel.click(cancel, form.inputs, panel.shown, **QUIET)
    panel.view.select(apply_suggestion, form.inputs, [note, *form.inputs], queue=False, **QUIET).then(
        estimate, form.inputs, outputs, **QUIET
    )


def refresh_preflight(known: dict[str, Any], config: RunConfig) -> list[Any]:
    """What is known of the run's memory and time, for `shown`; nothing is sent when the page shows it already."""
    check = PreflightJob.of(config)
    value, alive = preflight_value(check), check.alive
    elsewhere = not alive and bool(preflight_job.running_jobs())
    seen = {**value, "alive": alive, "elsewhere": elsewhere}
    if seen == known:
        return [gr.skip()] * 7
    locked = bool(settings.space_id())
    busy = value["state"] is not None and value["state"]["phase"] == "busy"
    return [
        value,
        seen,
        gr.Timer(CHECK_POLL_SECONDS if alive or elsewhere else IDLE_POLL_SECONDS),
        gr.Button(interactive=not alive and not locked),
        gr.Button(interactive=not alive and not locked, visible=not busy),
        gr.Button(visible=busy and not alive),
        gr.Button(visible=alive or elsewhere),
    ]


def preflight_value(check: PreflightJob) -> dict[str, Any]:
    """The estimate, the measurement and the state of a check, as the view takes them; None where there is none."""
    state = check.state()
    shown = {key: state[key] for key in ("kind", "phase", "text", "share")} if state else None
    return {
        "estimate": check.read("estimate") or None,
        "measurement": check.read("measurement") or None,
        "state": shown,
    }


def start_check(config: RunConfig, kind: str, wait: bool) -> None:
    """Start a check; settings that were never estimated are estimated before they are measured."""
    check = PreflightJob.of(config)
    if kind == "measurement" and not check.read("estimate"):
        kind = "both"
    check.start(config, kind, wait=wait)


def with_suggestion(config: RunConfig, at: int) -> RunConfig:
    """The run's config with the `at`-th suggestion of its estimate applied."""
    suggestions = PreflightJob.of(config).read("estimate").get("ways", [])
    if not 0 <= at < len(suggestions):
        raise InputError("These settings have changed since they were checked; check them again.")
    return RunConfig.from_dict(apply_overrides(config.to_dict(), suggestions[at]["overrides"]))
