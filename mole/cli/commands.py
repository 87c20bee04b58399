"""What the commands of `mole` do. Each takes the parsed options, prints, and raises `MoleError` for one clear line."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mole import runs
from mole.cli import auth
from mole.cli.console import check_parent, shown, steps, table, when, write_json
from mole.config import (
    ROUTERS,
    SECTIONS,
    ModelConfig,
    RunConfig,
    all_presets,
    apply_overrides,
    find_preset,
    merge_preset,
    read_yaml,
)
from mole.core.errors import InputError, RunError
from mole.core.paths import local_path
from mole.core.text import bytes_text
from mole.runs import grid
from mole.training import worker

if TYPE_CHECKING:
    from mole.models.loading import Loaded

__all__ = ["ROUTERS"]


def studio(options: argparse.Namespace) -> None:
    """`mole studio`"""
    credentials = auth.credentials(options.auth)
    auth.check_open(options.host, credentials is not None, options.share, options.allow_anyone)
    from app.main import launch

    launch(host=options.host, port=options.port, auth=credentials, share=options.share)


# ---------------------------------------------------------------------------------------------------------
# Training


def train(options: argparse.Namespace) -> None:
    """`mole train`"""
    if options.grid:
        train_grid(options)
        return
    config = RunConfig.from_dict(train_settings(options))
    if config.name is not None:
        runs.check_name(config.name)
    if options.name is not None and (runs.runs_dir() / options.name).exists():
        raise RunError(
            f"There is a run called {options.name!r} already; choose another name or delete it.", field="name"
        )
    runs.check_inputs(config)
    runs.check_room()
    run = runs.create(config, number=options.name is None)  # a name in a file is that of an earlier run
    if options.detach:
        runs.start(run)
        print(run.name)
    else:
        runs.enqueue(run)
        in_foreground(run, resume=False)


def preflight(options: argparse.Namespace) -> None:
    """`mole preflight`"""
    check_parent(options.json, "--json")
    if options.wait and not options.measure:
        raise InputError("--wait is for --measure: an estimate does not need the device.", field="wait")
    config = RunConfig.from_dict(train_settings(options))
    runs.check_inputs(config)
    from mole.cli import preflight_report

    result = preflight_report.report(config, measure=options.measure, wait=options.wait)
    if options.json:
        write_json(options.json, result)


def train_grid(options: argparse.Namespace) -> None:
    """`mole train --grid`"""
    if options.name is not None:
        raise InputError("--name is for one run; the runs of a --grid are named after their --group.", field="name")
    axes = dict(map(grid.parse_axis, options.grid))
    queued = grid.queue_all(grid.expand(train_settings(options), axes, options.group or grid.free_group()))
    print(f"Queued {len(queued)} runs in the group {queued[0].group}:")
    for run in queued:
        print(run.name)


def train_settings(options: argparse.Namespace) -> dict[str, Any]:
    """The nested form of the settings: preset, config file over it, the flags over that, `--set` over those."""
    values = read_yaml(local_path(options.config)) if options.config else {}
    for key, value in values.items():
        if key in SECTIONS and value is None:
            values[key] = {}
    if options.preset:
        values = merge_preset(find_preset(options.preset), values)
    overrides = {key: value for key, value in vars(options).items() if "." in key and value is not None}
    for entry in options.settings:
        key, separator, value = entry.partition("=")
        if not separator:
            raise InputError(f"--set {entry!r} must be SECTION.FIELD=VALUE, e.g. training.save_steps=50.")
        overrides[key.strip()] = None if value.strip() in ("null", "~") else value
    values = apply_overrides(values, overrides)
    given = {"name": options.name, "group": options.group}
    return {**values, **{key: value for key, value in given.items() if value is not None}}


def list_presets(options: argparse.Namespace) -> None:
    """`mole presets`"""
    found = all_presets()
    table(["NAME", "TITLE", "WHAT IT SETS"], [[preset.name, preset.title, preset.summary] for preset in found])


def in_foreground(run: runs.Run, *, resume: bool) -> None:
    """Work on a queued run here and say how it ended."""
    print(f"Run {run.name} ({run.path})", flush=True)
    worker.perform(run, resume=resume, progress=True)
    if run.state == "finished":
        metrics = ", ".join(f"{key} {shown(value)}" for key, value in run.details()["metrics"].items())
        print(f"Finished at step {run.step}{f': {metrics}' if metrics else ''}.")
        print(f"Adapter: {run.adapter_dir}")
        print(f"Chat:    mole chat {run.name}")
    else:
        print(f"Stopped at step {run.step}. Continue: mole runs resume {run.name}")


# ---------------------------------------------------------------------------------------------------------
# Runs


def list_runs(options: argparse.Namespace) -> None:
    """`mole runs list`"""
    rows = [run.status() for run in runs.list_runs()]
    if options.json:
        print(json.dumps(rows, indent=1))
    elif rows:
        cells = [[row["name"], row["state"], steps(row), row["router"], row["model"], when(row)] for row in rows]
        table(["NAME", "STATE", "STEP", "ROUTER", "MODEL", "CREATED"], cells)
    else:
        print("No runs yet. Train one: mole train --data FILE")


def show_run(options: argparse.Namespace) -> None:
    """`mole runs show`"""
    run = runs.get(options.run)
    details = run.details()
    if options.json:
        print(json.dumps(details, indent=1))
        return
    print(f"{details['name']}: {details['state']}, step {steps(details)}, created {when(details)}")
    if details["error"]:
        print(f"Error:   {details['error']} {details['advice'] or ''}".rstrip())
    for key, value in details["metrics"].items():
        print(f"{key}: {shown(value)}")
    print(f"Folder:  {run.path}\n")
    print(run.config.to_yaml(), end="")


def queue_runs(options: argparse.Namespace) -> None:
    """`mole runs queue`"""
    print_queue(runs.waiting_runs())


def move_run(options: argparse.Namespace) -> None:
    """`mole runs move`"""
    print_queue(runs.move(runs.get(options.run), options.place))


def print_queue(line: list[runs.Run]) -> None:
    """The runs that wait, each with its device and its place there."""
    places: dict[str, int] = {}
    cells = []
    for run in line:
        device = str(run.last_event.get("device", ""))
        places[device] = places.get(device, 0) + 1
        cells.append([str(places[device]), device, run.name, run.group or "-", runs.device_user(device) or "-"])
    if cells:
        table(["PLACE", "DEVICE", "NAME", "GROUP", "NOW RUNNING"], cells)
    else:
        print("No run waits.")


def compare_runs(options: argparse.Namespace) -> None:
    """`mole runs compare`"""
    from mole.analysis import compare, tables

    names = list(dict.fromkeys(name for given in options.runs for name in run_or_group(given)))
    if len(names) < 2:
        raise InputError("Give two or more different runs to compare, or a group of them.", field="runs")
    comparison = compare.compare(names)
    if options.json:
        print(json.dumps(comparison.to_dict(), indent=1))
    elif options.markdown:
        print(tables.markdown(comparison), end="")
    else:
        for head, rows in tables.terminal(comparison):
            table(head, rows)
            print()
        print("\n".join([tables.LEGEND, *comparison.notes]))


def run_or_group(name: str) -> list[str]:
    """The run of that name, or the runs of that group. Raises `RunError` when there is neither."""
    return [run.name for run in runs.list_runs() if run.group == name] or [runs.get(name).name]


def stop_run(options: argparse.Namespace) -> None:
    """`mole runs stop`"""
    run = runs.get(options.run)
    runs.stop(run)
    if run.state == "stopped":
        print(f"{run.name} is stopped.")
    else:
        print(f"{run.name} was asked to stop; it saves a checkpoint first.")


def resume_run(options: argparse.Namespace) -> None:
    """`mole runs resume`"""
    run = runs.get(options.run)
    if options.detach:
        runs.start(run, resume=True)
        print(run.name)
    else:
        runs.enqueue(run, resume=True)
        in_foreground(run, resume=True)


def delete_run(options: argparse.Namespace) -> None:
    """`mole runs delete`"""
    run = runs.get(options.run)
    if not options.yes:
        if not sys.stdin.isatty():
            raise InputError(f"Deleting {run.name} needs a yes: add --yes.")
        if input(f"Delete {run.name} ({run.state}, step {run.step}) for good? [y/N] ").strip().lower() not in (
            "y",
            "yes",
        ):
            print("Kept.")
            return
    runs.delete(run)
    print(f"Deleted {run.name}.")


def export_run(options: argparse.Namespace) -> None:
    """`mole runs export`"""
    run = runs.get(options.run)
    path = runs.export(run, options.dest)
    print(f"Wrote the adapter, run.yaml and events.jsonl of {run.name} to {path}.")
    if path.is_dir():
        print(f"Chat: mole chat {path / 'adapter'}")


# ---------------------------------------------------------------------------------------------------------
# Chat and evaluation


def chat(options: argparse.Namespace) -> None:
    """`mole chat`"""
    if options.prompt is not None and not options.prompt.strip():
        raise InputError("--prompt is empty; give some text.", field="prompt")
    if options.trace and options.prompt is None:
        raise InputError("--trace needs --prompt: the routing of one reply is written.", field="trace")
    check_parent(options.trace, "--trace")
    from mole.chat.generate import ChatSettings
    from mole.mixture.aot_compile import prepare

    settings = ChatSettings(options.max_new_tokens, options.temperature, options.top_p, options.seed)
    loaded = load(options.target)
    messages = [{"role": "system", "content": options.system}] if options.system else []
    if options.prompt is not None:
        messages.append({"role": "user", "content": options.prompt})
        answer(loaded, messages, settings, options.trace)
        return
    print(f"Chat with {options.target}; Ctrl-D ends, Ctrl-C cuts a reply short.", file=sys.stderr)
    while True:
        try:
            question = input("> " if sys.stdin.isatty() else "")
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if question.strip():
            messages.append({"role": "user", "content": question})
            messages.append({"role": "assistant", "content": answer(loaded, messages, settings)})
            prepare(loaded.model)


def answer(loaded: Loaded, messages: list[dict[str, str]], settings: Any, trace_file: str | None = None) -> str:
    """Stream a reply to the terminal, write its routing to `trace_file` if given, and return it."""
    from mole.chat.generate import stream

    text, tokens = "", list[str]()
    try:
        for step in stream(loaded, messages, settings, record=trace_file is not None):
            print(step.text[len(text) :], end="", flush=True)
            text = step.text
            tokens += [token for _, token in step.tokens]
    except KeyboardInterrupt:
        if trace_file:
            raise
    print(flush=True)
    if trace_file and step.trace is not None:
        write_json(trace_file, step.trace.to_dict(tokens, step.prompt_tokens))
    return text


def evaluate(options: argparse.Namespace) -> None:
    """`mole eval`"""
    check_parent(options.json, "--json")
    from mole.data import read_examples

    rows = read_examples(options.data, limit=options.limit, field="--data")
    loaded = load(options.target)
    from mole.evaluation import job as evaluation_job
    from mole.evaluation.evaluate import evaluate_file

    begun = time.monotonic()
    result = evaluate_file(loaded, options.data, limit=options.limit, progress=True)
    evaluation_job.record_evaluation(options.target, result, options.limit, rows.fingerprint, time.monotonic() - begun)
    print(f"{result['target']} on {result['data']}, {result['rows']} rows:")
    for key, value in result["metrics"].items():
        percent = key in ("accuracy", "exact_match") and value is not None
        print(f"  {key.replace('_', ' ')}: {f'{value:.1%}' if percent else shown(value)}")
    if options.json:
        write_json(options.json, result)


def load(target: str) -> Loaded:
    """Load what is chatted with or evaluated, and tell what should be known about it."""
    from mole.runs.targets import load_target

    loaded = load_target(target, ModelConfig())
    if loaded.notice:
        print(f"Note: {loaded.notice}", file=sys.stderr)
    return loaded


# ---------------------------------------------------------------------------------------------------------
# Models and data


def list_models(options: argparse.Namespace) -> None:
    """`mole models list`"""
    from mole import models

    rows = models.list_models()
    if options.json:
        print(json.dumps(rows, indent=1, default=str))
        return
    cells = [
        [row["name"], row["kind"], bytes_text(row["size"]) if row["size"] else "-", "yes" if row["cached"] else "no"]
        for row in rows
    ]
    table(["NAME", "KIND", "SIZE", "CACHED"], cells)


def pull_model(options: argparse.Namespace) -> None:
    """`mole models pull`"""
    from mole import models

    print(f"{options.name} is ready: {models.pull(options.name)}")


def check_data(options: argparse.Namespace) -> None:
    """`mole data check`"""
    from mole.data import read_examples

    rows = read_examples(options.file, field="FILE")
    rejected = [{"row": item.row, "reason": item.reason} for item in rows.rejected]
    report: dict[str, Any] = {
        "data": options.file,
        "shape": rows.shape,
        "rows": len(rows.examples),
        "rejected": rejected,
        "fingerprint": rows.fingerprint,
    }
    if options.model:
        report["tokens"] = token_lengths(rows.examples, options.model, rejected)
        report["rows"] = len(rows.examples) + len(rows.rejected) - len(rejected)
    if not report["rows"]:
        raise InputError(f"{options.file}: no row can be used; row {rejected[0]['row']}: {rejected[0]['reason']}")
    if options.json:
        print(json.dumps(report, indent=1))
        return
    print(f"{options.file}: {report['rows']} rows of shape {rows.shape}, {len(rejected)} rejected")
    if options.model:
        print("Tokens a row: " + ", ".join(f"{key} {value}" for key, value in report["tokens"].items()))
    for item in rejected:
        print(f"  row {item['row']}: {item['reason']}")


def token_lengths(examples: Sequence[Any], model: str, rejected: list[dict[str, Any]]) -> dict[str, int]:
    """Shortest, median, longest and total length in tokens; rows that cannot be encoded are added to `rejected`."""
    from mole.config import DataConfig
    from mole.core.errors import DataError
    from mole.data import encode_examples
    from mole.models.loading import load_tokenizer

    lengths: list[int] = []
    longest = DataConfig().max_length
    for example, encoded in zip(examples, encode_examples(examples, load_tokenizer(model), sys.maxsize), strict=True):
        if isinstance(encoded, DataError):
            rejected.append({"row": example.row, "reason": str(encoded)})
        else:
            lengths.append(len(encoded.input_ids))
    if not lengths:
        return {}
    return {
        "min": min(lengths),
        "median": int(statistics.median(lengths)),
        "max": max(lengths),
        "total": sum(lengths),
        f"longer than {longest}": sum(length > longest for length in lengths),
    }
