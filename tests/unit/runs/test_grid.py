"""A grid is every combination once, under names one can read; all of them are queued, or none."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mole import runs
from mole.config import RunConfig
from mole.core.errors import BusyError, InputError, RunError
from mole.runs import grid, queue, store

Axes = dict[str, list[Any]]


@pytest.fixture
def unstarted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The names of the runs whose process would have been started; none is."""
    started: list[str] = []
    monkeypatch.setattr(queue, "spawn", lambda run, **_: started.append(run.name))
    yield started


def base(tiny_folder: Path, tmp_path: Path) -> RunConfig:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "say yes", "completion": "yes"}\n' * 4)
    data = {"path": str(tmp_path / "rows.jsonl")}
    return RunConfig.from_dict({"data": data, "model": {"name": str(tiny_folder), "device": "cpu"}})


def test_every_combination_has_its_settings_and_a_name_to_read() -> None:
    axes: Axes = {"adapter.router": ["topk", "dynmole"], "training.seed": ["0", "1"]}
    made = grid.expand(RunConfig(), axes, "sweep")
    assert [(config.name, config.adapter.router, config.training.seed) for config in made] == [
        ("sweep-topk-s0", "topk", 0),
        ("sweep-topk-s1", "topk", 1),
        ("sweep-dynmole-s0", "dynmole", 0),
        ("sweep-dynmole-s1", "dynmole", 1),
    ]
    assert {config.group for config in made} == {"sweep"}


def test_a_router_keeps_its_own_settings_of_the_config_and_the_others_take_their_defaults() -> None:
    config = RunConfig.from_dict({"adapter": {"router": "dynmole", "entropy_threshold": 0.5, "r": 3}})
    topk, dynmole = grid.expand(config, {"adapter.router": ["topk", "dynmole"]}, "x")
    assert dynmole.adapter == config.adapter
    assert (topk.adapter.r, topk.adapter.to_flat()["top_k"]) == (3, 2)


def test_lora_beside_routers_does_not_take_their_experts_away() -> None:
    nested = {"adapter": {"router": "lora", "num_experts": 4}}
    lora, topk = grid.expand(nested, {"adapter.router": ["lora", "topk"]}, "x")
    assert (lora.adapter.num_experts, topk.adapter.num_experts) == (1, 4)


@pytest.mark.parametrize(
    ("axes", "names"),
    [
        ({"adapter.num_experts": ["8", ["2", "4", "6", "8"]]}, ["g-e8", "g-e2-4-6-8"]),
        ({"training.learning_rate": ["1e-3", 2e-4]}, ["g-lr1e-3", "g-lr0.0002"]),
        ({"data.path": ["a/one.jsonl", "b/two.jsonl"]}, ["g-one", "g-two"]),
        ({"data.path": ["a/rows.jsonl", "b/rows.jsonl"]}, ["g-1", "g-2"]),
        ({"training.seed": ["1", 1, "1"]}, ["g-s1"]),
        ({"model.name": ["org/" + "m" * 70]}, ["g-1"]),
    ],
)
def test_names_are_short_and_differ(axes: Axes, names: list[str]) -> None:
    assert [config.name for config in grid.expand(RunConfig(), axes, "g")] == names


@pytest.mark.parametrize(
    ("axes", "words"),
    [
        (
            {"adapter.router": ["dynmole", "topk"], "adapter.entropy_threshold": ["0.8"]},
            r"adapter\.router=topk, adapter\.entropy_threshold=0\.8 is not possible: .*not a setting of the router",
        ),
        ({"training.seed": ["0", "-1"]}, r"training\.seed=-1 is not possible: training\.seed is -1"),
        ({"training.speed": ["1"]}, r"training\.speed is not a setting"),
        ({"seed": ["1"]}, "seed is not a setting"),
        ({"training.seed": []}, r"no values for training\.seed"),
        ({}, "The grid is empty"),
        ({"training.seed": list(range(9)), "adapter.r": list(range(1, 9))}, "72 combinations; 64 runs"),
    ],
)
def test_what_cannot_be_is_refused_by_name(axes: Axes, words: str) -> None:
    with pytest.raises(InputError, match=words):
        grid.expand(RunConfig(), axes, "g")


@pytest.mark.parametrize(
    ("text", "axis"),
    [
        ("training.seed=0,1, 2", ("training.seed", ["0", "1", "2"])),
        ("adapter.num_experts=8,[2,4]", ("adapter.num_experts", ["8", ["2", "4"]])),
        ("adapter.max_threshold=null,0.2", ("adapter.max_threshold", [None, "0.2"])),
        ("data.path=a b.jsonl,{c", ("data.path", ["a b.jsonl", "{c"])),
    ],
)
def test_an_axis_is_read_as_it_is_typed(text: str, axis: tuple[str, list[Any]]) -> None:
    assert grid.parse_axis(text) == axis


def test_all_are_queued_in_their_order_under_one_group(
    home: Path, tmp_path: Path, tiny_folder: Path, unstarted: list[str]
) -> None:
    made = grid.expand(base(tiny_folder, tmp_path), {"training.seed": [0, 1, 2]}, "g")
    queued = grid.queue_all(made)
    assert unstarted == ["g-s0", "g-s1", "g-s2"] == [run.name for run in runs.waiting_runs()]
    assert {run.group for run in queued} == {run.config.group for run in queued} == {"g"}
    assert grid.free_group("g") == "g-1"
    with pytest.raises(RunError, match="'g-s0' already; choose another group"):
        grid.queue_all(made)


def test_when_one_is_wrong_none_is_made(home: Path, tmp_path: Path, tiny_folder: Path, unstarted: list[str]) -> None:
    config = base(tiny_folder, tmp_path)
    with pytest.raises(InputError, match=r"gone\.jsonl"):
        grid.queue_all(grid.expand(config, {"data.path": [config.data.path, "gone.jsonl"]}, "g"))
    runs.create(RunConfig(name="g-s1"))
    with pytest.raises(RunError, match="g-s1"):
        grid.queue_all(grid.expand(config, {"training.seed": [0, 1]}, "g"))
    assert [run.name for run in runs.list_runs()] == ["g-s1"] and not unstarted


def test_a_failure_half_way_leaves_nothing(
    home: Path, tmp_path: Path, tiny_folder: Path, unstarted: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    create = runs.create

    def full(config: RunConfig) -> runs.Run:
        if config.training.seed == 2:
            raise OSError(28, "No space left on device")
        return create(config)

    monkeypatch.setattr(store, "create", full)
    with pytest.raises(OSError, match="No space left"):
        grid.queue_all(grid.expand(base(tiny_folder, tmp_path), {"training.seed": [0, 1, 2]}, "g"))
    assert runs.list_runs() == [] and not unstarted


def test_a_grid_that_does_not_fit_the_queue_is_refused_whole(
    home: Path, tmp_path: Path, tiny_folder: Path, unstarted: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = base(tiny_folder, tmp_path)
    grid.queue_all(grid.expand(config, {"training.seed": [0, 1]}, "g"))
    monkeypatch.setattr(queue, "QUEUE_LIMIT", 4)
    with pytest.raises(BusyError, match="2 runs wait already and 3 more would exceed the queue's limit of 4"):
        grid.queue_all(grid.expand(config, {"training.seed": [0, 1, 2]}, "h"))
    assert len(runs.list_runs()) == 2
