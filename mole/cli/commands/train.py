"""`mole train`, `mole preflight` and `mole presets`: start runs, estimate them, list the presets."""

from __future__ import annotations

import argparse
from typing import Any

from mole import runs
from mole.cli.console import check_writable, metric_text, print_table, write_json
from mole.config import SECTIONS, RunConfig, all_presets, apply_overrides, find_preset, merge_preset, read_yaml
from mole.core.errors import InputError, RunError
from mole.core.paths import local_path
from mole.runs import grid
from mole.training import worker


def train_command(options: argparse.Namespace) -> None:
    """Train a run in the foreground, or start it in the background (`--detach`), or queue a grid (`--grid`)."""
    if options.grid:
        train_grid(options)
        return
    config = RunConfig.from_dict(train_settings(options))
    if config.name is not None:
        config.name = runs.check_name(config.name)
    if options.name is not None and (runs.runs_dir() / str(config.name)).exists():
        raise RunError(f"There is already a run {options.name!r}; choose another name or delete it.", field="name")
    runs.check_inputs(config)
    runs.check_room()
    run = runs.create(
        config, number=options.name is None
    )  # --config may be an earlier run's run.yaml: its name gets a number
    if options.detach:
        runs.start(run)
        print(run.name)
    else:
        runs.enqueue(run)
        run_in_foreground(run, resume=False)


def preflight_command(options: argparse.Namespace) -> None:
    """Estimate what a run takes and whether it fits; `--measure` also runs real steps."""
    check_writable(options.json, "--json")
    if options.wait and not options.measure:
        raise InputError("--wait needs --measure: an estimate does not use the device.", field="wait")
    config = RunConfig.from_dict(train_settings(options))
    runs.check_inputs(config)
    from mole.cli import preflight_report

    result = preflight_report.run_preflight(config, measure=options.measure, wait=options.wait)
    if options.json:
        write_json(options.json, result)


def train_grid(options: argparse.Namespace) -> None:
    """Queue a run for every combination of the grid's values."""
    if options.name is not None:
        raise InputError(
            "--name cannot be used with --grid: the runs of a grid are named after their --group.", field="name"
        )
    axes = dict(map(grid.parse_axis, options.grid))
    queued = grid.queue_all(grid.expand(train_settings(options), axes, options.group or grid.free_group()))
    print(f"Queued {len(queued)} runs in the group {queued[0].group}:")
    for run in queued:
        print(run.name)


def train_settings(options: argparse.Namespace) -> dict[str, Any]:
    """The settings of a run in nested form: the preset, then --config, then the flags, then --set; the latest wins."""
    values = read_yaml(local_path(options.config)) if options.config else {}
    for key, value in values.items():
        if key in SECTIONS and value is None:
            values[key] = {}
    if options.preset:
        values = merge_preset(find_preset(options.preset), values)
    overrides = {key: value for key, value in vars(options).items() if "." in key and value is not None}
    if paths := overrides.get("data.path"):
        overrides["data.path"] = paths[0] if len(paths) == 1 else paths
    for entry in options.settings:
        key, separator, value = entry.partition("=")
        if not separator:
            raise InputError(f"--set {entry!r} must be SECTION.FIELD=VALUE, e.g. training.save_steps=50.")
        overrides[key.strip()] = None if value.strip() in ("null", "~") else value
    values = apply_overrides(values, overrides)
    given = {"name": options.name, "group": options.group}
    return {**values, **{key: value for key, value in given.items() if value is not None}}


def list_presets_command(options: argparse.Namespace) -> None:
    """List the presets."""
    found = all_presets()
    print_table(["NAME", "TITLE", "WHAT IT SETS"], [[preset.name, preset.title, preset.summary] for preset in found])


def run_in_foreground(run: runs.Run, *, resume: bool) -> None:
    """Train a queued run in this process, with a progress bar, and print the result."""
    print(f"Run {run.name} ({run.path})", flush=True)
    worker.perform(run, resume=resume, progress=True)
    if run.state == "finished":
        metrics = ", ".join(f"{key} {metric_text(value)}" for key, value in run.details()["metrics"].items())
        print(f"Finished at step {run.step}{f': {metrics}' if metrics else ''}.")
        print(f"Adapter: {run.adapter_dir}")
        print(f"Chat:    mole chat {run.name}")
    else:
        print(f"Stopped at step {run.step}. To continue: mole runs resume {run.name}")
