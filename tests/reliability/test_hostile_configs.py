"""Bad run configs: whatever YAML or JSON says, a config is made of it or it is refused in one line; nothing is left."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from hostile import (
    YAML_BITS,
    answer,
    attack,
    damaged,
    in_time,
    junk,
    mole,
    mutated,
    nothing_written,
    real,
    refusal,
    text,
)
from hypothesis import given
from hypothesis import strategies as st

from mole import runs
from mole.config import (
    BUILT_IN_PRESETS,
    ROUTERS,
    SECTIONS,
    RunConfig,
    apply_overrides,
    find_preset,
    merge_preset,
    presets_dir,
    read_yaml,
    saved_presets,
)
from mole.runs import grid

VALID: list[dict[str, Any]] = [
    RunConfig.from_dict({"name": "a-run", "data": {"path": "rows.jsonl"}, "adapter": {"router": router}}).to_dict()
    for router in ROUTERS
]
VALID[0]["data"]["columns"] = {"prompt": "question"}
VALID[1]["adapter"]["num_experts"] = [2, 4]
SETTINGS = sorted(
    {f"{section}.{name}" for valid in VALID for section in SECTIONS for name in valid[section]}
    | {"data.columns.prompt", "data.columns.prompt.deeper", "adapter", "model.", ".", "", "nothing.at.all", "name"}
)
config = st.sampled_from(VALID).flatmap(mutated)
dotted = st.one_of(st.sampled_from(SETTINGS), text)


def is_whole(made: Any) -> None:
    """A config that was taken can be written, read again, and is the same."""
    if isinstance(made, RunConfig):
        assert RunConfig.from_dict(made.to_dict()) == made
        assert RunConfig.from_dict(yaml.safe_load(made.to_yaml())) == made
        json.dumps(made.to_dict(), allow_nan=False)


@attack(250)
@given(config)
def test_a_damaged_config_is_taken_whole_or_refused(values: Any) -> None:
    is_whole(answer(lambda: RunConfig.from_dict(real(values))))


@attack(100)
@given(junk)
def test_any_tree_is_taken_or_refused(values: Any) -> None:
    is_whole(answer(lambda: RunConfig.from_dict(real(values))))


@attack(150)
@given(st.sampled_from(SETTINGS), junk)
def test_any_setting_given_any_value_is_taken_or_refused(name: str, value: Any) -> None:
    section, _, key = name.partition(".")
    is_whole(answer(lambda: RunConfig.from_dict({section: {key: real(value)}})))


@attack(150)
@given(st.one_of(st.sampled_from(VALID), config), st.dictionaries(dotted, junk, max_size=3))
def test_any_override_is_taken_or_refused_and_changes_nothing_else(values: Any, overrides: dict[str, Any]) -> None:
    before, laid_over = repr(values), {name: real(value) for name, value in overrides.items()}
    is_whole(answer(lambda: RunConfig.from_dict(apply_overrides(values, laid_over))))
    assert repr(values) == before


# YAML files

RUN_YAML = yaml.safe_dump(VALID[0], sort_keys=False)
FILES = {
    "a tag that runs code": "model: !!python/object/apply:os.system ['touch ran']",
    "a tag that makes an object": "name: !!python/object:mole.config.schema.RunConfig {}",
    "billion laughs": "a: &a [x,x,x,x,x,x,x,x,x]\n"
    + "".join(f"{b}: &{b} [{','.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)),
    "billion laughs by merging": "a: &a {x: 1}\n"
    + "".join(f"{b}: &{b} {{<<: [{','.join([f'*{a}'] * 9)}]}}\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)),
    "a list that holds itself": "model: &a [*a]",
    "very deep": "model: " + "[" * 100_000,
    "very deep by lines": "".join(f"{' ' * depth}a:\n" for depth in range(600)),
    "keys twice": "training: {seed: 1, seed: 2}",
    "sections twice": "training: {seed: 1}\nmodel: {}\ntraining: {seed: 2}",
    "a date that is none": "name: 2001-99-99",
    "a number that is none": "training: {seed: !!int x}",
    "a flag that is none": "training: {gradient_checkpointing: !!bool perhaps}",
    "an empty number": "training: {seed: !!int ''}",
    "a time that is none": "name: !!timestamp x",
    "a number of 5000 digits": "training: {seed: " + "9" * 5000 + "}",
    "a hexadecimal number of 5000 digits": "training: {seed: 0x" + "f" * 5000 + "}",
    "such a number as a name": "0x" + "f" * 5000 + ": 1",
    "binary": "model: {name: !!binary aGVsbG8=}",
    "a set": "model: !!set {a, b}",
    "two documents": "model: {}\n---\nmodel: {}",
    "a list": "- model\n- data",
    "text": "model",
    "nothing": "",
    "only a comment": "# nothing",
    "tabs": "model:\n\tname: x",
    "no end of a quote": "name: 'x",
    "NUL": "name: a\x00b",
    "another encoding": "name: é".encode("latin-1"),
    "UTF-16": RUN_YAML.encode("utf-16"),
    "not text": bytes(range(256)),
    "100 MB of one line": b"name: " + b"x" * 100_000_000,
    "100 MB of settings": b"name: x\n" * 12_500_000,
    "a long list": "adapter: {num_experts: [" + "1," * 100_000 + "1]}",
}  # fmt: skip


@pytest.mark.parametrize("what", FILES)
def test_a_hostile_yaml_file_is_refused_and_runs_nothing(
    what: str, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    content = FILES[what]
    file = tmp_path / "run.yaml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    monkeypatch.chdir(tmp_path)
    refusal(lambda: RunConfig.load(file))
    with nothing_written(tmp_path):
        assert mole(capsys, "train", "--config", str(file), "--data", "none.jsonl", "--detach") == 2


def test_what_is_no_plain_file_is_no_config(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "link.yaml").symlink_to("/dev/zero")
    (tmp_path / "circle.yaml").symlink_to("circle.yaml")
    paths = [tmp_path / "pipe.yaml", tmp_path / "link.yaml", tmp_path / "circle.yaml", tmp_path, Path("/dev/zero")]
    for path in [*paths, tmp_path / "none.yaml", tmp_path / ("x" * 300), Path("a\x00b"), Path("\ud800")]:
        refusal(lambda path=path: read_yaml(path))


@attack(200)
@given(damaged(RUN_YAML.encode(), YAML_BITS))
def test_a_damaged_run_yaml_is_taken_whole_or_refused(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    file = tmp_path_factory.getbasetemp() / "damaged.yaml"
    file.write_bytes(content)
    is_whole(answer(lambda: RunConfig.load(file)))


# Presets and grids


@attack(60)
@given(
    st.one_of(
        damaged(RUN_YAML.encode(), YAML_BITS), config.map(lambda values: json.dumps(values, default=str).encode())
    )
)
def test_a_damaged_preset_of_ones_own_is_passed_over_or_refused(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOLE_HOME", str(tmp_path_factory.getbasetemp() / "presets-home"))
        presets_dir().mkdir(parents=True, exist_ok=True)
        (presets_dir() / "mine.yaml").write_bytes(content)
        with in_time():
            assert len(saved_presets()) <= 1
        for preset in saved_presets():
            assert preset.summary.isprintable() or len(preset.summary) < 1000
        is_whole(answer(lambda: find_preset("mine").run_config({})))
        is_whole(answer(lambda: RunConfig.from_dict(merge_preset(find_preset("mine"), VALID[1]))))


@attack(60)
@given(st.sampled_from([preset.name for preset in BUILT_IN_PRESETS]), config)
def test_a_preset_over_or_under_damaged_settings_is_taken_or_refused(name: str, values: Any) -> None:
    preset, given_values = find_preset(name), real(values)
    before = copy.deepcopy(preset.overrides)
    is_whole(answer(lambda: preset.run_config(given_values)))
    is_whole(answer(lambda: RunConfig.from_dict(merge_preset(preset, given_values))))
    assert preset.overrides == before


axis = st.tuples(dotted, st.one_of(text, st.lists(st.one_of(st.integers(), text), max_size=3).map(str)))


@attack(60)
@given(st.one_of(st.sampled_from(VALID), config), st.lists(axis, max_size=3), st.one_of(st.just("group"), text))
def test_any_grid_is_expanded_whole_or_refused(values: Any, given_axes: list[tuple[str, str]], group: str) -> None:
    def expand() -> list[RunConfig]:
        axes = dict(grid.parse_axis(f"{real(name)}={real(entry)}") for name, entry in given_axes)
        return grid.expand(real(values), axes, real(group))

    made = answer(expand)
    if isinstance(made, list):
        assert len({one.name for one in made}) == len(made) <= runs.QUEUE_LIMIT
        for one in made:
            is_whole(one)
            runs.check_name(one.name or "")


# The command line

NO_DATA = "data.path=there-is-none.jsonl"


@attack(120)
@given(config, st.lists(st.tuples(dotted, text), max_size=3))
def test_mole_train_refuses_what_it_cannot_train_and_leaves_nothing(
    tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str], values: Any, changes: list[Any]
) -> None:
    folder = tmp_path_factory.getbasetemp() / "train"
    (folder / "home").mkdir(parents=True, exist_ok=True)
    (folder / "run.yaml").write_text(json.dumps(values))
    flags = [part for name, value in changes for part in ("--set", f"{name}={real(value)}")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOLE_HOME", str(folder / "home"))
        patch.chdir(folder)
        with nothing_written(folder):
            assert mole(capsys, "train", "--config", "run.yaml", *flags, "--set", NO_DATA, "--detach") == 2
