"""Comparing runs: only what differs is listed, and means and deviations are exact, over the runs that count."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mole import runs
from mole.analysis import compare, tables
from mole.analysis.run_metrics import LossCurve, LossPoint, read_metrics
from mole.cli import parser
from mole.config import RunConfig
from mole.core import checkpoint
from mole.runs.run import Run

Make = Callable[..., Run]


@pytest.fixture
def make(home: Path) -> Make:
    """`make("a", [2.0, 1.0], evals=[1.5])`: a run with these losses at steps 1, 2, …, a second and 100 tokens each."""

    def run(
        name: str, losses: list[float], evals: list[float] | None = None, finished: bool = True, **config: Any
    ) -> Run:
        settings = {"name": name, "data": {"path": "rows.jsonl"}, "model": {"device": "cpu"}, **config}
        made = runs.create(RunConfig.from_dict(settings))
        write(made, "started", 0, time=1000.0, trainable_parameters=2_000_000, device="cpu", dtype="float32")
        write(made, "data", 0, time=1000.0, fingerprint="f" * 64)
        for step, loss in enumerate(losses, 1):
            took = {"tokens_per_second": 100.0, "memory_mb": 1024.0 + step}
            write(made, "step", step, time=1000.0 + step, loss=loss, routing=routing(step), **took)
        for loss in evals or []:
            write(made, "eval", len(losses), time=1000.5 + len(losses), eval_loss=loss)
        if finished:
            write(made, "finished", len(losses), time=1001.0 + len(losses), metrics={})
            checkpoint.write_folder(made.adapter_dir, lambda folder: (folder / "x").write_text("x"), step=1)
        return made

    return run


def write(run: Run, type: str, step: int, **values: Any) -> None:
    """An event with a time of its own."""
    with run.events_path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"type": type, "step": step, **values}) + "\n")


def routing(step: int) -> dict[str, Any]:
    table = {"load": [[0.25, 0.75]], "entropy": [0.5], "active": [1.5], "dead": [0]}
    return {"layers": 1, "experts": 2, **table, "entropy": [step / 1000]}


def evaluation(run: Run, number: int, **values: Any) -> None:
    folder = run.path / "evaluations"
    folder.mkdir(exist_ok=True)
    (folder / f"{number}.json").write_text(json.dumps(values), encoding="utf-8")


TOPK = {"router": "topk", "num_experts": 2, "top_k": 1}


# What differs


def test_only_the_settings_that_differ_are_listed(make: Make) -> None:
    make("a", [1.0], adapter={"router": "topk", "top_k": 1})
    make("b", [1.0], adapter={"router": "lora"}, training={"learning_rate": 0.01})
    table = tables.settings_table(compare.compare(["a", "b"]))
    assert table.head == ("Setting", "a", "b")
    rows = {row.cells[0]: row.cells[1:] for row in table.rows}
    assert rows == {
        "adapter.router": ("topk", "lora"),
        "adapter.num_experts": ("8", "1"),
        "adapter.balance_loss_coef": ("0.001", "0"),
        "adapter.top_k": ("1", "–"),  # a setting of one router only
        "adapter.renormalize": ("not set", "–"),
        "training.learning_rate": ("0.002", "0.01"),
    }


def test_a_flag_is_no_number_and_a_whole_float_is() -> None:
    configs = {"a": {"x": 1, "y": 1, "z": [2, 4]}, "b": {"x": True, "y": 1.0, "z": [2, 4]}}
    assert compare.differing(configs) == {"x": {"a": 1, "b": True}}


def test_a_run_without_readable_settings_hides_no_difference_and_is_told(make: Make) -> None:
    make("a", [1.0])
    make("b", [1.0], training={"seed": 1})
    make("c", [1.0]).config_path.write_text("training: {max_steps: -1}")
    comparison = compare.compare(["a", "b", "c"])
    assert comparison.differences == {"training.seed": {"a": 0, "b": 1}}
    assert [len(cell.runs) for cell in comparison.groups] == [2, 1]
    assert "The settings of c cannot be read." in comparison.notes


@pytest.mark.parametrize(
    ("paths", "short"),
    [
        (["/data/a/rows.jsonl", "/data/b/rows.jsonl"], ["a/rows.jsonl", "b/rows.jsonl"]),
        (["/x/one.csv", "/y/two.csv"], ["one.csv", "two.csv"]),
        (["/x/rows.csv", "/y/x/rows.csv"], ["/x/rows.csv", "y/x/rows.csv"]),
        (["owner/data", "/home/me/owner/data"], ["owner/data", "me/owner/data"]),
    ],
)
def test_paths_are_as_short_as_still_tells_them_apart(paths: list[str], short: list[str]) -> None:
    assert [compare.short_paths([*paths, None, 3])[path] for path in paths] == short


# What came out


def test_metrics_of_a_run(make: Make) -> None:
    run = make("a", [9.0] * 27 + [3.0, 2.0, 1.0], evals=[0.5, 0.7])
    values = compare.final_metrics(read_metrics(run))
    assert values["eval_loss"] == 0.7 and values["best_eval_loss"] == 0.5
    assert values["train_loss"] == 2.0  # the mean of the last 3 of 30
    assert values["seconds"] == 30.0 and values["tokens_per_second"] == 100.0
    assert values["memory_mb"] == 1054.0 and values["trainable_parameters"] == 2_000_000


def test_missing_metrics_are_missing_and_no_error(home: Path) -> None:
    runs.create(RunConfig.from_dict({"name": "new", "data": {"path": "x"}}))
    runs.create(RunConfig.from_dict({"name": "newer", "data": {"path": "x"}, "training": {"seed": 1}}))
    comparison = compare.compare(["new", "newer", "gone"])
    assert [run.values for run in comparison.runs] == [{}, {}]
    assert comparison.metrics == () and comparison.groups[0].stats == {}
    assert [row.cells for row in tables.metrics_table(comparison).rows] == [
        ("dynmole (n = 2)",),
        ("new (seed 0) [queued]",),
        ("newer (seed 1) [queued]",),
    ]
    assert "The run gone was deleted." in comparison.notes


def test_what_a_resumed_run_did_twice_counts_once_and_its_break_not_at_all(make: Make) -> None:
    run = make("a", [4.0, 3.0, 2.0], evals=[9.0], finished=False)
    write(run, "started", 2, time=9000.0, trainable_parameters=5)
    write(run, "step", 3, time=9002.0, loss=1.0, tokens_per_second=10.0)
    metrics = read_metrics(run)
    assert [(point.step, point.loss) for point in map(metrics.train.__getitem__, range(3))] == [(1, 4), (2, 3), (3, 1)]
    assert len(metrics.evals) == 0
    assert metrics.seconds == 5.0 and metrics.tokens_per_second == 320 / 5


def test_events_are_read_on_from_where_they_were_and_half_lines_wait(make: Make) -> None:
    run = make("a", [4.0, 3.0], finished=False)
    before = read_metrics(run)
    with run.events_path.open("ab") as file:
        file.write(b'{"type": "step", "step": 3, "time": 1003, "lo')
    assert len(read_metrics(run).train) == 2
    with run.events_path.open("ab") as file:
        file.write(b'ss": 1.0}\nnot an event\n')
    assert len(read_metrics(run).train) == 3 and len(before.train) == 2, "what was given out stays as it was"
    run.events_path.write_text("")  # another run took the name
    assert len(read_metrics(run).train) == 0


def test_the_last_routing_is_kept_with_its_step(make: Make) -> None:
    run = make("a", [1.0] * 7)
    last = read_metrics(run).routing
    assert last is not None and last["step"] == 7 and last["entropy"] == [0.007]


def test_evaluations_are_columns_by_file_and_unreadable_ones_are_passed_over(make: Make) -> None:
    run = make("a", [1.0])
    evaluation(run, 1, data="/x/test.jsonl", rows=50, metrics={"exact_match": 0.5, "perplexity": 3.0}, sha256="s")
    evaluation(run, 2, data="/x/test.jsonl", rows=50, metrics={"exact_match": 0.6, "perplexity": None}, sha256="s")
    evaluation(run, 3, data="/x/test.jsonl", rows=50, metrics={"exact_match": 0.1}, checkpoint="step-1", sha256="s")
    evaluation(run, 4, data="/x/test.jsonl", rows=9, error="no", begun=True)
    (run.path / "evaluations" / "5.json").write_text("{")
    other = make("b", [1.0], training={"seed": 4})
    evaluation(other, 1, data="/y/test.jsonl", rows=50, metrics={"exact_match": 0.8}, sha256="s")
    comparison = compare.compare(["a", "b"])
    extra = [metric for metric in comparison.metrics if metric.key.startswith("eval:")]
    assert [metric.title for metric in extra] == [
        "Exact match (%), test.jsonl, 50 rows",
        "Perplexity, test.jsonl, 50 rows",
    ]
    table = tables.metrics_table(comparison)
    assert [row.cells[-2:] for row in table.rows] == [("70 ± 14", "3"), ("60", "3"), ("80", "–")]


# Groups


def test_runs_that_differ_in_seed_alone_form_a_group(make: Make) -> None:
    for seed, loss in enumerate([0.10, 0.20, 0.60]):
        make(f"sweep-topk-s{seed}", [1.0], evals=[loss], adapter=TOPK, training={"seed": seed})
    make("other", [1.0], evals=[0.25], adapter={**TOPK, "top_k": 2})
    comparison = compare.compare(["sweep-topk-s0", "other", "sweep-topk-s1", "sweep-topk-s2"])
    assert [(cell.label, len(cell.runs)) for cell in comparison.groups] == [("sweep-topk", 3), ("other", 1)]
    group, single = (cell.stats["eval_loss"] for cell in comparison.groups)
    assert group.n == 3 and group.mean == pytest.approx(0.3, abs=1e-15)
    assert group.sd == pytest.approx(math.sqrt((0.04 + 0.01 + 0.09) / 2), abs=1e-15)
    assert (single.mean, single.sd, single.n) == (0.25, None, 1)
    table = tables.metrics_table(comparison)
    assert [row.cells[:2] for row in table.rows] == [
        ("sweep-topk (n = 3)", "0.30 ± 0.26"),
        ("sweep-topk-s0 (seed 0)", "0.1"),
        ("sweep-topk-s1 (seed 1)", "0.2"),
        ("sweep-topk-s2 (seed 2)", "0.6"),
        ("other", "0.25"),
    ]
    assert 1 not in table.rows[0].best and 1 in table.rows[4].best
    assert {row.cells for row in tables.settings_table(comparison).rows} == {
        ("adapter.top_k", "1", "2"),
        ("training.seed", "0, 1, 2", "0"),
    }


def test_an_unfinished_run_is_flagged_and_left_out_of_the_mean(make: Make) -> None:
    make("a-0", [1.0], evals=[0.1])
    make("a-1", [1.0], evals=[0.3], training={"seed": 1})
    make("a-2", [1.0], evals=[5.0], training={"seed": 2}, finished=False)
    make("b", [1.0], evals=[0.01], adapter=TOPK, finished=False)
    comparison = compare.compare(["a-0", "a-1", "a-2", "b"])
    group, unfinished = comparison.groups
    assert group.stats["eval_loss"].n == 2 and group.stats["eval_loss"].mean == pytest.approx(0.2)
    assert tables.group_title(group) == "a (n = 2, 1 unfinished left out)"
    assert tables.group_title(unfinished) == "b [interrupted]"
    assert not comparison.best(compare.METRICS[0]), "an unfinished run is no winner, and one alone has not won"
    assert sum("are not final" in note for note in comparison.notes) == 2


def test_runs_on_changed_data_are_not_averaged(make: Make) -> None:
    make("a-0", [1.0])
    changed = make("a-1", [1.0], training={"seed": 1}, finished=False)
    write(changed, "data", 0, time=2000.0, fingerprint="0" * 64)
    comparison = compare.compare(["a-0", "a-1"])
    assert len(comparison.groups) == 2
    assert comparison.differences["data content (sha256)"] == {"a-0": "f" * 12, "a-1": "0" * 12}


def test_a_run_that_still_waits_joins_its_group(make: Make) -> None:
    make("a-0", [1.0])
    runs.create(dataclasses.replace(runs.get("a-0").config, name="a-1"))
    comparison = compare.compare(["a-0", "a-1"])
    assert [len(cell.runs) for cell in comparison.groups] == [2] and comparison.differences == {}


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=9))
def test_mean_and_deviation_are_those_of_the_formulas(values: list[float]) -> None:
    found = compare.mean_and_sd(values)
    mean = math.fsum(values) / len(values)
    assert found.n == len(values) and math.isclose(found.mean, mean, rel_tol=1e-12, abs_tol=1e-9)
    if len(values) == 1:
        assert found.sd is None
    else:
        squares = math.fsum((value - mean) ** 2 for value in values)
        assert found.sd is not None
        assert math.isclose(found.sd, math.sqrt(squares / (len(values) - 1)), rel_tol=1e-9, abs_tol=1e-6)


def test_a_mean_curve_has_the_steps_all_have() -> None:
    one = LossCurve([LossPoint(1, 1.0, 10, 4.0), LossPoint(2, 2.0, 20, 2.0), LossPoint(3, 3.0, 30, 1.0)])
    two = LossCurve([LossPoint(2, 4.0, 40, 4.0), LossPoint(3, 5.0, 50, 5.0), LossPoint(4, 9.0, 60, 9.0)])
    assert compare.mean_curve([one, two], 10) == [LossPoint(2, 3.0, 30, 3.0), LossPoint(3, 4.0, 40, 3.0)]


@pytest.mark.parametrize("count", [0, 1, 599, 600, 601, 100_000])
def test_a_curve_is_bounded_and_ends_where_it_ends(count: int) -> None:
    thin = LossCurve(LossPoint(step, step, step, 1.0) for step in range(count)).thinned(600)
    assert min(count, 300) <= len(thin) <= 600
    assert not count or thin[-1].step == count - 1


def test_more_than_a_page_can_draw_are_said_in_one_line(make: Make) -> None:
    names = [make(f"r{number}", [1.0], training={"max_steps": 10 + number}).name for number in range(10)]
    assert len(compare.compare(names).runs) == 10
    comparison = compare.compare(names, 8)
    assert len(comparison.runs) == 8
    assert comparison.notes == ("Up to 8 runs can be compared: r8, r9 left out.",)


def test_a_group_stands_for_its_runs_on_the_command_line(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    for seed, loss in enumerate((0.1, 0.3)):
        make(f"mine-s{seed}", [1.0], evals=[loss], group="mine", training={"seed": seed})
    make("other", [1.0], evals=[0.5], adapter=TOPK)
    assert parser.main(["runs", "compare", "mine", "other", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["groups"][0]["metrics"]["eval_loss"]["mean"] == pytest.approx(0.2)
    assert told["groups"][0]["metrics"]["eval_loss"]["n"] == 2


# Words


@pytest.mark.parametrize(
    ("mean", "sd", "text"),
    [
        (0.04718, 0.00132, "0.0472 ± 0.0013"),
        (12345.6, 234.5, "12,346 ± 234"),
        (1.0, 0.0, "1 ± 0"),
        (0.0, 0.0, "0 ± 0"),
        (3.0, 1e-12, "3 ± 0"),
        (0.5, None, "0.5"),
    ],
)
def test_the_deviation_has_two_digits_and_the_mean_as_many(mean: float, sd: float | None, text: str) -> None:
    assert tables.stat_text(compare.Stat(mean, sd, 2), compare.Metric("x", "X", "low")) == text


def test_markdown_stays_one_table_whatever_a_setting_says(make: Make) -> None:
    make("a", [1.0], evals=[0.1], data={"path": "x | **y** <img src=x>\n# z"})
    make("b", [1.0], evals=[0.2], data={"path": "plain"})
    text = tables.markdown(compare.compare(["a", "b"]))
    assert "| a | **0.1** |" in text
    row = next(line for line in text.splitlines() if line.startswith("| data.path"))
    assert row == r"| data.path | x \| \*\*y\*\* \<img src=x\> # z | plain |"


def test_on_the_command_line(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    make("a", [1.0], evals=[0.1])
    make("b", [1.0], evals=[0.3], training={"learning_rate": 0.5})
    assert parser.main(["runs", "compare", "a", "b", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["differences"] == {"training.learning_rate": {"a": 0.002, "b": 0.5}}
    assert told["groups"][1]["metrics"]["eval_loss"] == {"mean": 0.3, "sd": None, "n": 1}
    assert parser.main(["runs", "compare", "a", "b"]) == 0
    assert "0.1 *" in capsys.readouterr().out
    assert parser.main(["runs", "compare", "a", "a"]) == 2
    assert "at least two different runs" in capsys.readouterr().err
    assert parser.main(["runs", "compare", "a", "nobody"]) == 2
    assert "no run called 'nobody'" in capsys.readouterr().err


# The page


def test_the_page_follows_live_runs_and_sends_only_what_has_changed(make: Make) -> None:
    from app.ui.panels import compare as panel

    run = make("a", [1.0], finished=False)
    make("b", [1.0])
    with run.lock():
        value, seen, timer = panel.show_comparison(["a", "b"])
        assert value["names"] == ["a", "b"] and timer.active
        assert panel.refresh_comparison(["a", "b"], seen) == [panel.gr.skip()] * 3
        write(run, "step", 2, time=1002.0, loss=0.5)
        value, seen, _ = panel.refresh_comparison(["a", "b"], seen)
        assert value["groups"][0]["runs"][0]["train"][-1] == [2, 2.0, 100, 0.5]
    _, seen, timer = panel.refresh_comparison(["a", "b"], seen)
    assert not timer.active, "nobody works on them any more"
    runs.delete(runs.get("b"))
    for names in (["a", "b"], ["a"], []):
        assert panel.show_comparison(names)[0] == {"names": []}


def test_runs_without_any_step_can_be_shown(home: Path) -> None:
    from app.views.compare import comparison_value

    for seed in (0, 1):
        runs.create(RunConfig.from_dict({"name": f"new-{seed}", "data": {"path": "x"}, "training": {"seed": seed}}))
    (group,) = comparison_value(compare.compare(["new-0", "new-1"]))["groups"]
    assert group["mean"] == {"train": [], "evals": []} and group["runs"][0]["routing"] is None
