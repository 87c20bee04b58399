"""`mole runs …`: list, show, queue, compare, stop, resume, continue, delete, export and import runs."""

from __future__ import annotations

import argparse
import json
import sys
import unicodedata

from mole import runs
from mole.cli.commands.train import run_in_foreground
from mole.cli.console import created_text, metric_text, print_table, steps_text
from mole.core.errors import InputError
from mole.runs.archive import left_out_note


def list_runs_command(options: argparse.Namespace) -> None:
    """List all runs."""
    rows = [run.status() for run in runs.list_runs()]
    if options.json:
        print(json.dumps(rows, indent=1))
    elif rows:
        cells = [
            [row["name"], row["state"], steps_text(row), row["router"], row["model"], created_text(row)] for row in rows
        ]
        print_table(["NAME", "STATE", "STEP", "ROUTER", "MODEL", "CREATED"], cells)
    else:
        print("No runs yet. Train one: mole train --data FILE")


def show_run_command(options: argparse.Namespace) -> None:
    """Print a run's state, metrics and configuration."""
    run = runs.get(options.run)
    details = run.details()
    if options.json:
        print(json.dumps(details, indent=1))
        return
    print(f"{details['name']}: {details['state']}, step {steps_text(details)}, created {created_text(details)}")
    if details["error"]:
        print(f"Error:   {details['error']} {details['advice'] or ''}".rstrip())
    for notice in details["notices"]:
        print(f"Note:    {notice}")
    for key, value in details["metrics"].items():
        print(f"{key}: {metric_text(value)}")
    print(f"Folder:  {run.path}\n")
    print(run.config.to_yaml(), end="")


def queue_runs_command(options: argparse.Namespace) -> None:
    """List the waiting runs."""
    print_queue(runs.waiting_runs())


def move_run_command(options: argparse.Namespace) -> None:
    """Move a waiting run to another position in its device's queue."""
    print_queue(runs.move(runs.get(options.run), options.place))


def print_queue(line: list[runs.Run]) -> None:
    """Print waiting runs with their device and their position in its queue."""
    places: dict[str, int] = {}
    cells = []
    for run in line:
        device = str(run.last_event.get("device", ""))
        places[device] = places.get(device, 0) + 1
        cells.append([str(places[device]), device, run.name, run.group or "-", runs.device_user(device) or "-"])
    if cells:
        print_table(["PLACE", "DEVICE", "NAME", "GROUP", "NOW RUNNING"], cells)
    else:
        print("The queue is empty.")


def compare_runs_command(options: argparse.Namespace) -> None:
    """Compare runs or groups of runs: results, and mean ± sd over seeds."""
    from mole.analysis import compare, tables

    names = list(dict.fromkeys(name for given in options.runs for name in names_of_run_or_group(given)))
    if len(names) < 2:
        raise InputError("Comparing needs at least two different runs, or a group of runs.", field="runs")
    comparison = compare.compare(names)
    if options.json:
        print(json.dumps(comparison.to_dict(), indent=1))
    elif options.markdown:
        print(tables.markdown(comparison), end="")
    else:
        for head, rows in tables.terminal(comparison):
            print_table(head, rows)
            print()
        print("\n".join([tables.LEGEND, *comparison.notes]))


def names_of_run_or_group(name: str) -> list[str]:
    """Names of the runs in group `name`, or the run of that name. Raises `RunError` when there is neither."""
    group = unicodedata.normalize("NFC", name)
    return [run.name for run in runs.list_runs() if run.group == group] or [runs.get(name).name]


def stop_run_command(options: argparse.Namespace) -> None:
    """Stop a run; a training run saves a checkpoint first."""
    run = runs.get(options.run)
    runs.stop(run)
    if run.state == "stopped":
        print(f"{run.name} is stopped.")
    else:
        print(f"{run.name} is stopping; it saves a checkpoint first.")


def resume_run_command(options: argparse.Namespace) -> None:
    """Continue a run from its last checkpoint."""
    run = runs.get(options.run)
    if options.base is not None:
        from mole.training.moving import move_base

        run = move_base(run, options.base)
    go_on(run, options.detach)


def continue_run_command(options: argparse.Namespace) -> None:
    """Train a finished run for longer, as a new run."""
    from mole.training.continuing import continue_run

    runs.check_room()
    go_on(
        continue_run(runs.get(options.run), options.steps, options.schedule, options.name, options.base), options.detach
    )


def go_on(run: runs.Run, detach: bool) -> None:
    """Train a run from its last checkpoint on, in this process or in the background."""
    if detach:
        runs.start(run, resume=True)
        print(run.name)
    else:
        runs.enqueue(run, resume=True)
        run_in_foreground(run, resume=True)


def delete_run_command(options: argparse.Namespace) -> None:
    """Delete a run's folder, after confirmation unless `--yes`."""
    run = runs.get(options.run)
    if not options.yes:
        if not sys.stdin.isatty():
            raise InputError(f"Deleting {run.name} needs confirmation: add --yes.")
        if input(f"Delete {run.name} ({run.state}, step {run.step}) permanently? [y/N] ").strip().lower() not in (
            "y",
            "yes",
        ):
            print("Kept.")
            return
    runs.delete(run)
    print(f"Deleted {run.name}.")


def export_run_command(options: argparse.Namespace) -> None:
    """Copy a finished run, without its checkpoints, to a folder or .zip file."""
    run = runs.get(options.run)
    path = runs.export(run, options.dest)
    print(f"Wrote {run.name} to {path}, without its checkpoints. Take it back: mole runs import {path}")
    if path.is_dir():
        print(f"Chat: mole chat {path / 'adapter'}")


def import_run_command(options: argparse.Namespace) -> None:
    """Take an exported run into this home."""
    run, left_out = runs.import_run(options.source, options.name)
    if left_out:
        print(f"Note: {left_out_note(left_out)}", file=sys.stderr)
    print(f"Imported the run {run.name}. Chat: mole chat {run.name}")
