"""`mole atlas`: what the experts of a target do over a data file."""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

from tqdm import tqdm

from mole.analysis.atlas import job as atlas_job
from mole.analysis.atlas.comparison import as_json
from mole.analysis.atlas.corpus import Corpus, read_corpus
from mole.analysis.atlas.page import atlas_page
from mole.cli.commands.chat import given_device, load_with_notice
from mole.cli.console import check_writable, print_table, save_text, write_json
from mole.core.devices import physical_device
from mole.core.errors import InputError, RunError
from mole.core.text import print_error
from mole.evaluation.job import data_columns, run_of
from mole.runs.job import device_turn
from mole.runs.targets import locate


class Progress:
    """A progress bar on stderr for each part of the work."""

    def __init__(self) -> None:
        self._bar: Any = None

    def __call__(self, what: str, done: int, total: int) -> None:
        if self._bar is None or self._bar.desc.rstrip(": ") != what:
            self.close()
            self._bar = tqdm(total=total, desc=what)
        self._bar.update(done - self._bar.n)

    def close(self) -> None:
        """End the bar that is shown, if there is one."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def atlas_command(options: argparse.Namespace) -> None:
    """Compute an atlas once the target's device is free, keep it with the run, print a summary, and write files."""
    check_writable(options.json, "--json")
    check_writable(options.html, "--html")
    by = [name.strip() for name in options.by.split(",") if name.strip()]
    targets = [options.target, *([options.versus] if options.versus else [])]
    if options.versus and options.base:
        raise InputError("--base is for one target, and --versus has two.", field="base")
    for target in targets:
        if locate(target)[1] is None:
            line = f"{target} has no routed adapter: it is a base model; name a run or an adapter's folder."
            raise InputError(line, field="target")
    corpora = [read_corpus(options.data, columns_for(target, options), options.limit, by) for target in targets]
    atlases = [atlas_of(target, corpus, by, options) for target, corpus in zip(targets, corpora, strict=True)]
    written = as_json(atlases)  # refuses two that cannot be compared
    for atlas in atlases:
        print_summary(atlas)
    if options.json:
        write_json(options.json, written)
    if options.html:
        save_text(options.html, atlas_page(atlases))


def columns_for(target: str, options: argparse.Namespace) -> dict[str, str]:
    """The names of the data's columns for a target: its run's, if the data has them. Raises `DataError`."""
    try:
        run = run_of(target)
    except RunError:  # an adapter's folder
        return {}
    return data_columns(run, options.data, options.limit)[0]


def atlas_of(target: str, corpus: Corpus, by: list[str], options: argparse.Namespace) -> dict[str, Any]:
    """The atlas of a target, kept with its run."""
    mine = argparse.Namespace(target=target, base=options.base, device=options.device)
    device, begun, progress = given_device(mine), time.monotonic(), Progress()
    with device_turn(physical_device(device), lambda: False, print_error, run="an atlas"):
        loaded = load_with_notice(mine, device)
        from mole.analysis.atlas.build import build_atlas

        try:
            atlas = build_atlas(loaded, corpus, seed=options.seed, samples=not options.quick, report=progress)
        finally:
            progress.close()
            del loaded  # before another target is loaded
    kept = atlas_job.record_atlas(target, atlas, by, options.limit, time.monotonic() - begun)
    if kept is not None:
        print(f"Note: The atlas is kept in {kept.file('atlas.json')}.", file=sys.stderr)
    return atlas


def print_summary(atlas: dict[str, Any]) -> None:
    """Print how much the routers tell of each variable."""
    print(f"{atlas['target']} on {atlas['data']}, {atlas['rows']} rows, {atlas['tokens']} tokens:")
    rows = []
    for variable in atlas["variables"]:
        found, count = variable["specialisation"], len(atlas["projections"])
        most = max(range(count), key=lambda place, excess=found["excess"]: excess[place])  # type: ignore[misc]
        rows.append([
            variable["name"],
            f"{sum(found['excess']) / count:.4f}",
            f"{sum(found['chance']) / count:.4f}",
            f"{sum(found['clear'])}/{count}",
            f"{atlas['projections'][most]['name']} ({found['excess'][most]:.3f})" if any(found["clear"]) else "none",
        ])  # fmt: skip
    print_table(["variable", "bits above chance", "chance", "clear in", "most in"], rows)
    for notice in atlas["notices"]:
        print(f"Note: {notice}", file=sys.stderr)
