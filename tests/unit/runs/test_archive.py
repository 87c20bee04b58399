"""An exported run is taken back whole, and nothing else is: neither half of one nor what somebody put beside it."""

from __future__ import annotations

import json
import shutil
import warnings
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mole import runs
from mole.config import RunConfig
from mole.core import checkpoint, limits
from mole.core.errors import CheckpointError, InputError, RunError
from mole.runs.run import Run

EXPORTED = {
    "adapter/adapter_config.json", "adapter/manifest.json", "run.yaml", "events.jsonl", "evaluations/1.json",
    "atlas/2.json", "atlas/2.atlas.json",
}  # fmt: skip


def files_in(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def run(home: Path) -> Run:
    """A finished run with everything that a run's folder can have."""
    made = runs.create(RunConfig.from_dict({"name": "demo", "data": {"path": "some/data"}, "model": {"device": "cpu"}}))
    checkpoint.write_folder(made.adapter_dir, lambda folder: (folder / "adapter_config.json").write_text("{}"), step=1)
    made.append_event("finished", 3, metrics={"loss": 0.5})
    for name in ("evaluations/1.json", "evaluations/1.log", "atlas/2.json", "atlas/2.atlas.json", "atlas/2.lock"):
        (made.path / name).parent.mkdir(exist_ok=True)
        (made.path / name).write_text("{}")
    (made.path / "checkpoints" / "step-3").mkdir(parents=True)
    (made.path / "checkpoints" / "step-3" / "optimizer.pt").write_bytes(b"a pickle")
    return made


@pytest.fixture(params=["out", "out.zip"])
def exported(run: Run, tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """The same run as a folder, and as a zip."""
    return runs.export(run, tmp_path / request.param)


def test_an_export_is_all_of_a_run_but_its_checkpoints_locks_and_logs(exported: Path) -> None:
    assert set(zipfile.ZipFile(exported).namelist() if exported.is_file() else files_in(exported)) == EXPORTED
    if exported.is_dir():
        checkpoint.verify(exported / "adapter")


def test_it_is_taken_back_whole(run: Run, exported: Path) -> None:
    before = {name: data for name, data in files_in(run.path).items() if name in EXPORTED}
    details = run.details()
    runs.delete(run)
    taken, left_out = runs.import_run(exported)
    assert (taken.name, taken.state, left_out) == ("demo", "finished", [])
    assert files_in(taken.path) == before and runs.get("demo").details() == details


def test_beside_the_run_it_was_made_of_it_takes_another_name(run: Run, exported: Path) -> None:
    with pytest.raises(RunError, match="a run called 'demo' already") as refused:
        runs.import_run(exported)
    assert refused.value.field == "name"
    taken, _ = runs.import_run(exported, "demo-2")
    assert runs.get("demo-2").config.name == "demo-2" == taken.config.name
    assert [other.name for other in runs.list_runs()] == ["demo", "demo-2"]
    with pytest.raises(RunError, match="is not allowed"):
        runs.import_run(exported, "../demo")


def test_a_zip_of_the_folder_itself_is_one_too(run: Run, tmp_path: Path) -> None:
    shutil.make_archive(str(tmp_path / "sent"), "zip", runs.export(run, tmp_path / "mine").parent, "mine")
    with zipfile.ZipFile(tmp_path / "sent.zip", "a") as archive:
        archive.writestr("__MACOSX/mine/._run.yaml", "")
    taken, left_out = runs.import_run(tmp_path / "sent.zip", "sent")
    assert set(files_in(taken.path)) == EXPORTED and left_out == []


def test_what_is_no_part_of_an_export_is_left_out_and_told(run: Run, tmp_path: Path) -> None:
    taken, left_out = runs.import_run(run.path, "copied")
    assert set(files_in(taken.path)) == EXPORTED
    assert left_out == ["atlas/2.lock", "checkpoints/step-3/optimizer.pt", "evaluations/1.log"]


def test_an_export_overwrites_nothing_and_leaves_nothing_half_done(run: Run, tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    for dest, reason in (("taken", "exists already"), ("no/where", "is not a folder")):
        with pytest.raises(RunError, match=reason):
            runs.export(run, tmp_path / dest)
    (run.adapter_dir / "adapter_config.json").write_text("{ }")
    with pytest.raises(CheckpointError):
        runs.export(run, tmp_path / "out.zip")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mole-home", "taken"]
    with pytest.raises(RunError, match="no adapter yet"):
        runs.export(runs.create(RunConfig.from_dict({"data": {"path": "x"}})), tmp_path / "out")


def test_the_run_of_a_space_s_visitor_is_listed_where_it_is_imported(run: Run, tmp_path: Path) -> None:
    made = runs.export(run, tmp_path / "mine")
    config = RunConfig.load(made / "run.yaml")
    (made / "run.yaml").write_text(replace(config, name=runs.unlisted_name()).to_yaml())
    taken, _ = runs.import_run(made)
    assert taken.name == "dynmole-smollm2-135m-1" and taken.name in [other.name for other in runs.list_runs()]


# What others send


def zipped(path: Path, entries: list[tuple[str, bytes]]) -> Path:
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        warnings.simplefilter("ignore")  # about two entries of one name
        for name, data in entries:
            archive.writestr(name, data)
    return path


@pytest.fixture
def entries(run: Run, tmp_path: Path) -> list[tuple[str, bytes]]:
    return [*files_in(runs.export(run, tmp_path / "good")).items()]


@pytest.mark.parametrize("name", ["../../../out", "/x", "./x", "a\\b", "a" * 2000])
def test_no_name_leads_out_of_the_run(entries: list[tuple[str, bytes]], tmp_path: Path, name: str) -> None:
    with pytest.raises(RunError, match="no name within a run"):
        runs.import_run(zipped(tmp_path / "hostile.zip", [*entries, (f"adapter/{name}", b"x")]), "taken")
    assert not (tmp_path / "out").exists() and [run.name for run in runs.list_runs()] == ["demo"]


def test_a_link_in_it_is_not_followed(run: Run, tmp_path: Path, entries: list[tuple[str, bytes]]) -> None:
    secret = tmp_path / "secret"
    secret.write_text("mine")
    (tmp_path / "good" / "adapter" / "more.json").symlink_to(secret)
    with pytest.raises(RunError, match=r"more.json cannot be read: .*symbolic links"):
        runs.import_run(tmp_path / "good", "taken")
    link = zipfile.ZipInfo("adapter/more.json")
    link.external_attr = 0o120777 << 16
    zipped(tmp_path / "hostile.zip", entries)
    with zipfile.ZipFile(tmp_path / "hostile.zip", "a") as archive:
        archive.writestr(link, str(secret))
    with pytest.raises(CheckpointError, match=r"more.json is not in its manifest"):
        runs.import_run(tmp_path / "hostile.zip", "taken")


def spoilt(entries: list[tuple[str, bytes]], name: str, data: bytes) -> list[tuple[str, bytes]]:
    return [(other, data if other == name else kept) for other, kept in entries]


@pytest.mark.parametrize(
    ("change", "error", "reason"),
    [
        (lambda given: given[:0], RunError, "it has no run.yaml"),
        (lambda given: [one for one in given if one[0] != "events.jsonl"], RunError, "it has no events.jsonl"),
        (lambda given: [one for one in given if "manifest" not in one[0]], RunError, "it has no adapter/manifest.json"),
        (lambda given: [*given, ("run.yaml", b"")], RunError, "two files of one name"),
        (lambda given: spoilt(given, "adapter/adapter_config.json", b"[]"), CheckpointError, "adapter_config.json has"),
        (lambda given: spoilt(given, "run.yaml", b"training: 3"), InputError, "training"),
    ],
)
def test_half_an_export_is_refused_and_leaves_nothing(
    entries: list[tuple[str, bytes]], tmp_path: Path, change: Any, error: type[Exception], reason: str
) -> None:
    with pytest.raises(error, match=reason):
        runs.import_run(zipped(tmp_path / "half.zip", change(entries)), "taken")
    assert [path.name for path in runs.runs_dir().iterdir()] == ["demo"]


def test_a_file_that_is_no_zip_an_encrypted_one_and_one_that_is_cut_are_refused(
    entries: list[tuple[str, bytes]], tmp_path: Path
) -> None:
    good = zipped(tmp_path / "good.zip", entries).read_bytes()
    encrypted = bytearray(good)
    at = 0
    while (at := encrypted.find(b"PK\x01\x02", at)) >= 0:
        encrypted[at + 8] |= 1
        at += 4
    for data in (b"{}", good[: len(good) // 2], bytes(encrypted)):
        (tmp_path / "bad.zip").write_bytes(data)
        with pytest.raises(RunError, match="cannot be unpacked"):
            runs.import_run(tmp_path / "bad.zip", "taken")
    with pytest.raises(RunError, match="There is no file or folder"):
        runs.import_run(tmp_path / "nothing.zip")


def test_a_small_zip_of_endless_zeros_is_refused_before_it_is_unpacked(
    entries: list[tuple[str, bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "ARCHIVE_BYTES", 1 << 20)
    bomb = zipped(tmp_path / "bomb.zip", [*entries, ("adapter/more.safetensors", bytes(2 << 20))])
    assert bomb.stat().st_size < 1 << 14
    with pytest.raises(RunError, match="has 2 MB in it; the most is 1 MB"):
        runs.import_run(bomb, "taken")
    monkeypatch.setattr(limits, "ARCHIVE_FILES", 5)
    for source in (bomb, tmp_path / "good"):
        with pytest.raises(RunError, match="more than 5 files"):
            runs.import_run(source, "taken")


def test_an_imported_run_starts_nothing(run: Run, tmp_path: Path) -> None:
    """Its events may say anything: only a run that was queued in this home is started without being asked for."""
    made = runs.export(run, tmp_path / "good")
    waiting = {"time": 1.0, "type": "queued", "step": 0, "device": "cpu"}
    (made / "events.jsonl").write_text(json.dumps(waiting) + "\n")
    taken, _ = runs.import_run(made, "taken")
    assert taken.state == "finished" and not taken.held
    runs.wake_queued()
    assert not runs.get("taken").held
