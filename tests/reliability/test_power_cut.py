"""A power cut keeps what was synced and forgets any of the rest, so everything is synced before it gets its name; and
what is killed half-way through being made or deleted is there whole or not at all. The real calls are recorded."""

from __future__ import annotations

import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from forks import Forked, Make
from operations import die_before, note_operations, operations_of

from mole import runs
from mole.config import RunConfig, save_preset, saved_presets
from mole.core import checkpoint, processes
from mole.runs.run import Run


def synced(operations: list[str]) -> list[str]:
    """What was synced and renamed, in order."""
    return [what for what in operations if what.startswith(("fsync ", "rename "))]


def check_order(calls: list[str], aside: str, target: str, files: set[str], parent: str) -> None:
    """Each file, the manifest, the folder; then the rename; then the folder it is in."""
    place = calls.index(f"rename {aside} → {target}")
    before = calls[place - len(files) - 2 : place]
    assert set(before[:-2]) == {f"fsync {aside}/{name}" for name in files}
    assert before[-2:] == [f"fsync {aside}/{checkpoint.MANIFEST}", f"fsync {aside}"]
    assert calls[place + 1] == f"fsync {parent}"


@pytest.mark.slow
def test_checkpoints_and_the_adapter_are_on_the_disk_before_they_have_their_names(
    make_tiny: Make, tmp_path: Path
) -> None:
    operations = operations_of(make_tiny, tmp_path / "operations")
    (run,) = runs.list_runs()
    calls = synced(operations)
    assert calls.index("fsync .") < calls.index("fsync checkpoints"), "the name of the folder of all of them too"
    saves = calls.count("rename checkpoints/.tmp-step-N → checkpoints/step-N")
    assert saves == 4
    files = set(checkpoint.verify(run.checkpoints_dir / "step-12").files)
    for _ in range(saves):
        check_order(calls, "checkpoints/.tmp-step-N", "checkpoints/step-N", files, "checkpoints")
        del calls[: calls.index("fsync checkpoints") + 1]
    check_order(calls, ".tmp-adapter", "adapter", set(checkpoint.verify(run.adapter_dir).files), ".")


# What is not trained: runs, presets, uploads, results


def make_run(config: dict[str, Any]) -> None:
    runs.create(RunConfig.from_dict(config))


def save_my_preset(config: dict[str, Any]) -> None:
    save_preset("mine", RunConfig.from_dict(config))


def keep_upload(config: dict[str, Any]) -> None:
    from app.settings import keep_upload

    keep_upload(config["data"]["path"])


def write_record(config: dict[str, Any]) -> None:
    processes.write_record(runs.home() / "record.json", config)


def delete_run(config: dict[str, Any]) -> None:
    runs.delete(runs.get("there"))


def in_child(home: Path, prepare: Any, act: Any, config: dict[str, Any]) -> int:
    """Do it in a process of its own, of which `prepare` watches the whole home → exit code."""
    child = Forked(_act, str(home), prepare, act, config)
    assert child.ended(), "it hangs"
    assert child.process.exitcode is not None
    return child.process.exitcode


def _act(home: str, prepare: Any, act: Any, config: dict[str, Any]) -> None:
    os.environ["MOLE_HOME"] = home
    prepare(Run("home", Path(home)))
    act(config)


@pytest.mark.parametrize(
    ("act", "expected"),
    [
        (
            make_run,  # the home's first run makes its key
            "fsync .key.#, rename .key.# → key, fsync ., "
            "fsync runs/.new-made/run.yaml, fsync runs/.new-made/events.jsonl, fsync runs/.new-made, "
            "rename runs/.new-made → runs/made, fsync runs, fsync .",
        ),
        (
            save_my_preset,
            "fsync presets/.mine.yaml.#, rename presets/.mine.yaml.# → presets/mine.yaml, fsync presets",
        ),
        (
            keep_upload,
            "fsync uploads/.rows.jsonl.#, rename uploads/.rows.jsonl.# → uploads/rows.jsonl, fsync uploads",
        ),
        (write_record, "fsync .record.json.#, rename .record.json.# → record.json, fsync ."),
    ],
)  # fmt: skip
def test_what_a_person_made_is_on_the_disk_before_it_has_its_name(
    home: Path, tiny: dict[str, Any], tmp_path: Path, act: Any, expected: str
) -> None:
    file = tmp_path / "operations"
    assert in_child(home, partial(note_operations, file), act, {**tiny, "name": "made"}) == 0
    assert synced(file.read_text().splitlines()) == expected.split(", ")


@pytest.mark.parametrize("act", [make_run, save_my_preset, write_record, delete_run])
def test_killed_before_any_of_its_operations_it_is_there_whole_or_not_at_all(
    home: Path, tiny: dict[str, Any], tmp_path: Path, act: Any
) -> None:
    file, config = tmp_path / "operations", {**tiny, "name": "made"}
    there = RunConfig.from_dict({**tiny, "name": "there"})
    runs.create(there)
    assert in_child(home, partial(note_operations, file), act, config) == 0
    operations = file.read_text().splitlines()
    assert len(operations) >= 3
    for place, what in enumerate(operations):
        for name in ("made", "there"):
            if (runs.runs_dir() / name).exists():
                runs.delete(runs.get(name))
        runs.create(there)
        die = partial(die_before, what, operations[:place].count(what))
        assert in_child(home, die, act, config) == -signal.SIGKILL, what
        for run in runs.list_runs():
            assert run.name in ("made", "there") and run.state == "queued", what
            assert run.config.training.max_steps == there.training.max_steps
            assert [event["type"] for event in run.events()] == ["created"]
        if act is save_my_preset:
            assert all(preset.run_config({}).training == there.training for preset in saved_presets())
        if act is write_record:
            assert processes.read_record(home / "record.json") == config
    runs.delete(runs.get("there")) if (runs.runs_dir() / "there").exists() else runs.create(there)
    runs.create(RunConfig.from_dict({**tiny, "name": "next"}))
    runs.delete(runs.get("next"))
    assert not list(runs.runs_dir().glob(".deleted-*")), "what a kill has left is removed by the next"
