"""Output of `mole preflight`: the estimate of a run, measured steps, and ways to reduce memory."""

from __future__ import annotations

import signal
import time
from typing import Any

from mole.config import RunConfig
from mole.core.errors import BusyError, InputError, MoleError
from mole.core.text import bytes_text, duration_text, print_error
from mole.preflight.job import FINAL, PreflightJob

VERDICTS = {
    "yes": "It fits.",
    "tight": "Borderline: the estimate is close to the free memory.",
    "no": "It does not fit.",
    "unknown": "Whether it fits is unknown.",
}
POLL_SECONDS = 0.2


def run_preflight(config: RunConfig, *, measure: bool, wait: bool) -> dict[str, Any]:
    """Estimate a run, measure it if requested, print both → `{"estimate": …, "measurement": … or None}`.

    Raises `InputError` for bad input, `BusyError` when a run has the device, `MoleError` when the preflight failed.
    """
    check = PreflightJob.of(config)
    end = run_job(check, config, "estimate")
    estimate = check.read("estimate")
    print_estimate(estimate)
    measurement: dict[str, Any] | None = None
    fits = estimate["fits"]
    if measure:
        end = run_job(check, config, "measurement", wait)
        if end["phase"] == "no_memory":
            fits = "no"
            print(f"\nMeasured: it does not fit. {end['text']}")
        else:
            measurement = check.read("measurement")
            print_measurement(measurement)
    return {"estimate": estimate, "measurement": measurement, "fits": fits}


def run_job(check: PreflightJob, config: RunConfig, kind: str, wait: bool = False) -> dict[str, Any]:
    """Start a preflight job, print its progress to stderr, and return its final state; Ctrl-C cancels it."""
    check.start(config, kind, wait=wait)
    printed = ""
    # As Ctrl-C: the job ends with the one who asked for it. A signal that is ignored (`nohup`) stays so.
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    for number, handler in before.items():
        if handler != signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler)
    try:
        while (state := check.state())["phase"] not in FINAL:
            if state["text"] != printed:
                printed = state["text"]
                print_error(printed)
            time.sleep(POLL_SECONDS)
    except KeyboardInterrupt:
        check.cancel()
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if state["phase"] == "busy":
        raise BusyError(f"{state['text']} Add --wait to measure once it is free.")
    if state["phase"] == "failed":
        field = state.get("field")
        raise InputError(state["text"], field=field) if state.get("input") else MoleError(state["text"])
    if state["phase"] == "cancelled":
        raise MoleError("The preflight was cancelled.")
    return state


def print_estimate(values: dict[str, Any]) -> None:
    """Print the estimate as a table, whether it fits, and ways to reduce memory."""
    share = values["trainable_parameters"] / values["total_parameters"]
    rows = [
        ("Trainable parameters", f"{values['trainable_parameters']:,} of {values['total_parameters']:,} ({share:.2%})"),
        ("Steps", f"{values['total_steps']:,}, {values['epochs']:.2g} epochs of {values['rows']:,} rows"),
        ("Longest row", f"{values['longest']} tokens (mean {values['typical']:.0f})"),
        ("Time", duration_text(values["seconds"]) if values["seconds"] else "unknown; add --measure"),
    ]
    for label, text in rows:
        print(f"{label:<24}{text}")
    if values["memory"]:
        print(f"\nEstimated memory on {values['device']} ({values['dtype']}):")
        for part, size in values["memory"].items():
            print(f"  {part:<22}{bytes_text(size):>10}")
        print(f"  {'peak':<22}{bytes_text(values['peak']):>10}")
    if values["available"] is not None:
        print(f"  {'free now':<22}{bytes_text(values['available']):>10}")
    print(f"\n{VERDICTS[values['fits']]} (estimated; --measure runs real steps)")
    for note in values["notes"]:
        print(f"Note: {note}")
    if values["ways"]:
        print("Ways to reduce memory, those that affect the result least first:")
    for change in values["ways"]:
        flags = " ".join(f"--set {name}={str(value).lower()}" for name, value in change["overrides"].items())
        mark = {"yes": "fits", "tight": "borderline", "no": "not enough"}.get(change["fits"], "")
        print(f"  {change['label']}: {bytes_text(change['peak'])}, {mark}. {change['effect']}\n    {flags}")


def print_measurement(values: dict[str, Any]) -> None:
    """Print what the measured steps took."""
    print(f"\nMeasured on {values['device']} ({values['dtype']}):")
    rows = [
        ("peak memory", bytes_text(values["peak"])),
        ("step, longest rows", duration_text(values["longest_seconds"])),
        ("step, random rows", duration_text(values["typical_seconds"])),
        ("speed", f"{values['tokens_per_second']:,.0f} tokens/s"),
        ("whole run", f"{duration_text(values['seconds'])} ({values['total_steps']:,} steps)"),
    ]
    for label, text in rows:
        print(f"  {label:<22}{text}")
