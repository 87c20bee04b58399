"""A checkpoint is there whole or not at all; what does not verify is set aside, never used, never deleted."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mole.core import checkpoint
from mole.core.errors import CheckpointError


def content(step: int) -> Callable[[Path], None]:
    """A writer of two files, one in a subfolder."""

    def write(folder: Path) -> None:
        (folder / "weights.bin").write_bytes(bytes(range(256)) * 8 + str(step).encode())
        (folder / "more").mkdir()
        (folder / "more" / "state.json").write_text(f'{{"step": {step}}}')

    return write


def truncate(folder: Path) -> None:
    with (folder / "weights.bin").open("r+b") as file:
        file.truncate(100)


def flip_a_bit(folder: Path) -> None:
    data = bytearray((folder / "weights.bin").read_bytes())
    data[7] ^= 1
    (folder / "weights.bin").write_bytes(bytes(data))


def edit_manifest(folder: Path) -> None:
    path = folder / checkpoint.MANIFEST
    path.write_text(path.read_text().replace('"step": 3', '"step": 9'))


def link_outside(folder: Path) -> None:
    data = (folder / "weights.bin").read_bytes()
    (folder / "weights.bin").unlink()
    (folder.parent / "elsewhere").write_bytes(data)
    (folder / "weights.bin").symlink_to(folder.parent / "elsewhere")


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "weights.bin has 100 bytes": truncate,
    "weights.bin has changed": flip_a_bit,
    "more/state.json is missing": lambda folder: (folder / "more" / "state.json").unlink(),
    "training_args.bin is not in its manifest": lambda folder: (folder / "training_args.bin").write_bytes(b"pickle"),
    "has no manifest.json": lambda folder: (folder / checkpoint.MANIFEST).unlink(),
    "manifest.json cannot be read": lambda folder: (folder / checkpoint.MANIFEST).write_text('{"version": 1, '),
    "manifest.json has changed": edit_manifest,
    "not of version": lambda folder: (folder / checkpoint.MANIFEST).write_text('{"version": 99}'),
    "weights.bin is not a plain file": link_outside,
}


def test_what_was_written_verifies_and_carries_its_meta(tmp_path: Path) -> None:
    folder = checkpoint.write(tmp_path / "checkpoints", 3, content(3), {"data": "abc", "sizes": (1, 2), 5: None})
    manifest = checkpoint.verify(folder)
    assert folder.name == "step-3"
    assert manifest.step == 3
    assert manifest.meta == {"data": "abc", "sizes": [1, 2], "5": None}
    assert manifest.files.keys() == {"weights.bin", "more/state.json"}


@pytest.mark.parametrize("reason", DAMAGES)
def test_a_damaged_checkpoint_does_not_verify_and_the_one_before_is_taken(tmp_path: Path, reason: str) -> None:
    before = checkpoint.write(tmp_path, 2, content(2))
    broken = checkpoint.write(tmp_path, 3, content(3))
    DAMAGES[reason](broken)

    with pytest.raises(CheckpointError, match=reason):
        checkpoint.verify(broken)
    assert checkpoint.newest_good(tmp_path) == before
    assert not broken.exists()
    assert (tmp_path / "step-3.bad").is_dir()


def test_broken_ones_of_the_same_step_are_all_kept(tmp_path: Path) -> None:
    for _ in range(3):
        flip_a_bit(checkpoint.write(tmp_path, 3, content(3)))
        assert checkpoint.newest_good(tmp_path) is None
    assert {path.name for path in tmp_path.iterdir()} == {"step-3.bad", "step-3.bad-2", "step-3.bad-3"}


def test_a_folder_named_like_another_step_is_not_taken_for_it(tmp_path: Path) -> None:
    checkpoint.write(tmp_path, 3, content(3)).rename(tmp_path / "step-7")
    assert checkpoint.newest_good(tmp_path) is None


def test_steps_are_ordered_as_numbers(tmp_path: Path) -> None:
    for step in (9, 10, 100):
        checkpoint.write(tmp_path, step, content(step), limit=9)
    assert [step for step, _ in checkpoint.steps(tmp_path)] == [9, 10, 100]
    assert checkpoint.newest_good(tmp_path) == tmp_path / "step-100"


def test_only_the_newest_good_ones_are_kept(tmp_path: Path) -> None:
    for step in range(1, 6):
        checkpoint.write(tmp_path, step, content(step), limit=2)
    assert [step for step, _ in checkpoint.steps(tmp_path)] == [4, 5]


def test_a_broken_checkpoint_never_costs_a_good_one_its_place(tmp_path: Path) -> None:
    checkpoint.write(tmp_path, 1, content(1), limit=2)
    truncate(checkpoint.write(tmp_path, 2, content(2), limit=2))
    checkpoint.write(tmp_path, 3, content(3), limit=2)
    assert {path.name for path in tmp_path.iterdir()} == {"step-1", "step-2.bad", "step-3"}


def test_a_failed_write_leaves_nothing_and_loses_nothing(tmp_path: Path) -> None:
    checkpoint.write(tmp_path, 1, content(1), limit=1)

    def disk_full(folder: Path) -> None:
        content(2)(folder)
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        checkpoint.write(tmp_path, 2, disk_full, limit=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-1"]
    assert checkpoint.newest_good(tmp_path) == tmp_path / "step-1"


def test_leftovers_of_a_killed_writer_are_ignored_and_cleared_by_the_next_write(tmp_path: Path) -> None:
    leftover = tmp_path / ".tmp-step-2-0a1b2c3d"
    leftover.mkdir()
    content(2)(leftover)
    assert checkpoint.newest_good(tmp_path) is None
    checkpoint.write(tmp_path, 1, content(1))
    assert [path.name for path in tmp_path.iterdir()] == ["step-1"]


def test_a_good_checkpoint_of_the_same_step_stays_a_broken_one_is_written_again(tmp_path: Path) -> None:
    folder = checkpoint.write(tmp_path, 1, content(1))
    before = folder.stat().st_ino
    assert checkpoint.write(tmp_path, 1, content(1)).stat().st_ino == before
    flip_a_bit(folder)
    assert checkpoint.write(tmp_path, 1, content(1)).stat().st_ino != before
    checkpoint.verify(folder)


def test_a_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    target = tmp_path / "adapter"
    checkpoint.write_folder(target, content(1), step=1)
    checkpoint.write_folder(target, lambda folder: (folder / "other").write_text("x") and None, step=2)
    assert {path.name for path in target.iterdir()} == {"other", checkpoint.MANIFEST}
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_no_checkpoints_is_no_error(tmp_path: Path) -> None:
    assert checkpoint.newest_good(tmp_path / "nowhere") is None


def test_everything_is_on_the_disk_before_the_folder_gets_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without this order, a power cut can leave a folder with a good name and empty files."""
    calls: list[tuple[str, str]] = []
    sync, rename = os.fsync, Path.rename
    names: dict[int, str] = {}
    really_open = os.open

    def opened(path: Any, *args: Any, **kwargs: Any) -> int:
        descriptor = really_open(path, *args, **kwargs)
        names[descriptor] = Path(path).name
        return descriptor

    def synced(descriptor: int) -> None:
        calls.append(("fsync", names[descriptor]))
        sync(descriptor)

    def renamed(self: Path, target: Path) -> Path:
        calls.append(("rename", Path(target).name))
        return rename(self, target)

    monkeypatch.setattr(os, "open", opened)
    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "rename", renamed)
    checkpoint.write_folder(tmp_path / "step-1", content(1), step=1)

    what = [(call, "folder" if name.startswith(".tmp-") else name) for call, name in calls]
    assert sorted(what[:2]) == [("fsync", "state.json"), ("fsync", "weights.bin")]
    assert what[2:] == [
        ("fsync", checkpoint.MANIFEST),
        ("fsync", "more"),
        ("fsync", "folder"),
        ("rename", "step-1"),
        ("fsync", tmp_path.name),
    ]


def test_the_manifest_is_plain_json(tmp_path: Path) -> None:
    folder = checkpoint.write(tmp_path, 3, content(3), {"data": "abc"})
    values = json.loads((folder / "manifest.json").read_text())
    assert values["version"] == 1
    assert values["files"]["weights.bin"]["size"] == 256 * 8 + 1
