"""What `mole preflight` prints: the estimate of a run, what real steps took, and the ways out."""

from __future__ import annotations

import sys
import time
from typing import Any

from mole.config import RunConfig
from mole.core.errors import BusyError, InputError, MoleError
from mole.core.text import bytes_text, duration_text
from mole.preflight.job import FINAL, Check

VERDICTS = {
    "yes": "It fits.",
    "tight": "It is tight: the estimate is close to what is free.",
    "no": "It does not fit.",
    "unknown": "Whether it fits cannot be told.",
}
POLL_SECONDS = 0.2


def report(config: RunConfig, *, measure: bool, wait: bool) -> dict[str, Any]:
    """Estimate a run, measure it too if asked, print both → `{"estimate": …, "measurement": … or None}`.

    Raises `InputError` for bad input, `BusyError` when a run has the device, `MoleError` when the check failed.
    """
    check = Check.of(config)
    end = follow(check, config, "estimate")
    estimate = check.read("estimate")
    print_estimate(estimate)
    measurement: dict[str, Any] | None = None
    fits = estimate["fits"]
    if measure:
        end = follow(check, config, "measurement", wait)
        if end["phase"] == "no_memory":
            fits = "no"
            print(f"\nMeasured: it does not fit. {end['text']}")
        else:
            measurement = check.read("measurement")
            print_measurement(measurement)
    return {"estimate": estimate, "measurement": measurement, "fits": fits}


def follow(check: Check, config: RunConfig, kind: str, wait: bool = False) -> dict[str, Any]:
    """Start a check, tell on stderr how it goes, and return how it ended; Ctrl-C ends it too."""
    check.start(config, kind, wait=wait)
    told = ""
    try:
        while (state := check.state())["phase"] not in FINAL:
            if state["text"] != told:
                told = state["text"]
                print(told, file=sys.stderr, flush=True)
            time.sleep(POLL_SECONDS)
    except KeyboardInterrupt:
        check.cancel()
        raise
    if state["phase"] == "busy":
        raise BusyError(f"{state['text']} Add --wait to measure once it is free.")
    if state["phase"] == "failed":
        field = state.get("field")
        raise InputError(state["text"], field=field) if state.get("input") else MoleError(state["text"])
    if state["phase"] == "cancelled":
        raise MoleError("The check was cancelled.")
    return state


def print_estimate(values: dict[str, Any]) -> None:
    """The estimate as a table, its verdict, and the ways out."""
    share = values["trainable_parameters"] / values["total_parameters"]
    rows = [
        ("Trainable parameters", f"{values['trainable_parameters']:,} of {values['total_parameters']:,} ({share:.2%})"),
        ("Steps", f"{values['total_steps']:,}, {values['epochs']:.2g} passes over {values['rows']:,} rows"),
        ("Longest row", f"{values['longest']} tokens (mean {values['typical']:.0f})"),
        ("Time", duration_text(values["seconds"]) if values["seconds"] else "measure to know"),
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
    print(f"\n{VERDICTS[values['fits']]} (an estimate; --measure takes real steps)")
    for note in values["notes"]:
        print(f"Note: {note}")
    if values["ways"]:
        print("Ways out, the least costly for the result first:")
    for way in values["ways"]:
        flags = " ".join(f"--set {name}={str(value).lower()}" for name, value in way["overrides"].items())
        mark = {"yes": "fits", "tight": "tight", "no": "not enough"}.get(way["fits"], "")
        print(f"  {way['label']}: {bytes_text(way['peak'])}, {mark}. {way['effect']}\n    {flags}")


def print_measurement(values: dict[str, Any]) -> None:
    """What the real steps took."""
    print(f"\nMeasured on {values['device']} ({values['dtype']}):")
    rows = [
        ("peak memory", bytes_text(values["peak"])),
        ("a step, longest rows", duration_text(values["longest_seconds"])),
        ("a step, usual rows", duration_text(values["typical_seconds"])),
        ("speed", f"{values['tokens_per_second']:,.0f} tokens/s"),
        ("the whole run", f"{duration_text(values['seconds'])} ({values['total_steps']:,} steps)"),
    ]
    for label, text in rows:
        print(f"  {label:<22}{text}")
