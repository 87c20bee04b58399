"""Routing alarms: given at their bounds and not before them, each with a setting the router has."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from mole import runs
from mole.analysis import health
from mole.analysis.health import COLLAPSED, FLAT, WINDOW, alarms
from mole.config import ROUTERS, RunConfig, apply_overrides
from mole.core.limits import DEAD_SHARE

EXPERTS = 4


def config(router: str = "topk", experts: Any = EXPERTS, **adapter: Any) -> RunConfig:
    own = {f"adapter.{name}": value for name, value in adapter.items()}
    return RunConfig.from_dict(apply_overrides({}, {"adapter.router": router, "adapter.num_experts": experts, **own}))


def table(*rows: list[float], entropy: float = 0.5, active: float = 2.0) -> dict[str, Any]:
    """Statistics of layers with these loads."""
    layers = len(rows)
    return {
        "layers": layers, "experts": len(rows[0]), "load": [list(row) for row in rows],
        "entropy": [entropy] * layers, "active": [active] * layers, "dead": [0] * layers,
    }  # fmt: skip


def steps(routing: dict[str, Any], count: int = WINDOW, last: int = 90) -> list[dict[str, Any]]:
    """`count` logged steps with the same routing, the last one at step `last`."""
    return [{"step": last - count + 1 + place, "routing": routing} for place in range(count)]


def kinds(config: RunConfig, events: list[dict[str, Any]], total: int = 100) -> list[str]:
    return [alarm.kind for alarm in alarms(config, events, total)]


EVEN = [0.25] * 4


def test_an_even_load_is_healthy_for_every_router() -> None:
    for router in ROUTERS:
        experts = 1 if router == "lora" else EXPERTS
        assert alarms(config(router, experts), steps(table(EVEN, EVEN, active=2.5)), 100) == []


def test_an_expert_is_dead_below_one_percent_of_an_even_share_and_not_at_it() -> None:
    bound = DEAD_SHARE / EXPERTS
    alive = [bound, 0.3, 0.3, 0.4 - bound]
    almost = [bound - 1e-4, 0.3, 0.3, 0.4 - bound + 1e-4]
    assert kinds(config(), steps(table(EVEN, alive))) == []
    (alarm,) = alarms(config(), steps(table(EVEN, almost)), 100)
    assert (alarm.kind, alarm.severity, alarm.where, alarm.layers) == ("dead", "warning", "Layer 2 expert 1", (1,))
    assert alarm.title == "1 of 8 experts is dead"
    assert alarm.advice == "Raise adapter.balance_loss_coef to 0.01." and alarm.setting == "adapter.balance_loss_coef"


def test_an_expert_that_was_used_once_in_the_window_is_not_dead() -> None:
    events = steps(table([0.0, 0.5, 0.25, 0.25]))
    assert kinds(config(), events) == ["dead"]
    events[3] = {"step": 84, "routing": table(EVEN)}
    assert kinds(config(), events) == []
    assert kinds(config(), [*events[4:], *steps(table([0.0, 0.5, 0.25, 0.25]), 4)]) == ["dead"], "once it is long ago"


def test_too_few_logged_steps_tell_nothing() -> None:
    routing = table([0.0, 0.0, 0.0, 1.0])
    assert kinds(config(), steps(routing, WINDOW - 1)) == [] and kinds(config(), []) == []
    assert kinds(config(), steps(routing, WINDOW)) == ["collapse"]


def test_many_dead_experts_are_serious() -> None:
    (few,) = alarms(config(), steps(table(*[EVEN] * 3, [0.0, 0.0, 0.5, 0.5])), 100)
    (many,) = alarms(config(), steps(table(EVEN, [0.0, 0.0, 0.5, 0.5])), 100)
    assert (few.severity, many.severity) == ("warning", "serious")
    assert many.title == "2 of 8 experts are dead" and many.where == "Layer 2 experts 1–2"


def test_collapse_begins_above_ninety_percent_and_outranks_the_dead_of_its_layer() -> None:
    rest = (1 - COLLAPSED) / 3
    assert kinds(config(), steps(table([COLLAPSED, rest, rest, rest]))) == []
    (alarm,) = alarms(config(), steps(table([0.0, 0.0, 0.98, 0.02], EVEN)), 100)
    assert (alarm.kind, alarm.severity, alarm.where) == ("collapse", "serious", "Layer 1 expert 3")


def test_one_expert_a_token_is_no_collapse_while_the_tokens_differ() -> None:
    assert kinds(config(top_k=1), steps(table(EVEN, active=1.0))) == []
    assert kinds(config(top_k=1), steps(table([0.95, 0.02, 0.02, 0.01], active=1.0))) == ["collapse"]


def test_a_layer_with_a_single_expert_cannot_collapse_and_absent_experts_are_not_dead() -> None:
    uneven = config(experts=[1, 2, 4])
    routing = table([1.0, 0, 0, 0], [0.5, 0.5, 0, 0], EVEN)
    assert kinds(uneven, steps(routing)) == []
    assert kinds(config(), steps(routing)) == ["collapse", "dead"]


def test_flat_entropy_is_told_above_its_bound_and_after_a_third_of_the_run() -> None:
    flat, edge = table(EVEN, entropy=FLAT + 0.001), table(EVEN, entropy=FLAT)
    assert kinds(config(), steps(flat, last=33)) == []
    assert kinds(config(), steps(edge, last=34)) == []
    (alarm,) = alarms(config(), steps(flat, last=34), 100)
    assert (alarm.kind, alarm.advice) == ("flat", "Set adapter.entropy_loss_coef to 0.01.")
    assert kinds(config(), steps(flat, last=90), total=0) == [], "how far it is, is not known"


@pytest.mark.parametrize(
    ("router", "advice"),
    [
        ("dynmole", "Raise adapter.entropy_loss_coef to 0.1."),
        ("topp", "Lower adapter.top_p to 0.6."),
        ("threshold", "Raise adapter.threshold to 0.25."),
        ("adamole", "Raise adapter.max_threshold to 0.375."),
        ("sparsegen", "Set adapter.sparsity_loss_coef to 0.1."),
    ],
)
def test_an_adaptive_router_that_uses_all_experts_late_is_told(router: str, advice: str) -> None:
    everything = table(EVEN, EVEN, entropy=0.99, active=4.0)
    assert "always_all" not in kinds(config(router), steps(everything, last=60))
    (alarm,) = alarms(config(router), steps(everything, last=67), 100)
    assert (alarm.kind, alarm.advice) == ("always_all", advice)
    assert kinds(config(router), steps(table(EVEN, EVEN, active=3.9), last=67)) == []


def test_using_all_experts_is_what_dense_is_for() -> None:
    assert kinds(config("dense"), steps(table(EVEN, active=4.0))) == []


def test_dynmole_that_always_keeps_its_few_is_top_k() -> None:
    (alarm,) = alarms(config("dynmole"), steps(table(EVEN, active=2.0)), 100)
    assert (alarm.kind, alarm.advice) == ("fixed", "Lower adapter.entropy_threshold to 0.8.")
    assert kinds(config("dynmole"), steps(table(EVEN, active=2.1))) == []


@pytest.mark.parametrize(
    ("router", "settings", "advice"),
    [
        ("topk", {"top_k": 1, "renormalize": True}, "Set adapter.top_k to 2, or leave adapter.renormalize empty."),
        ("topp", {"top_p": 0.1}, "Raise adapter.top_p to 0.3."),
        ("adamole", {}, "Lower adapter.max_threshold to 0.125."),
        ("dynmole", {"keep_top_k": 1}, "Raise adapter.keep_top_k to 2."),
        ("sparsegen", {}, "Lower training.learning_rate"),
    ],
)
def test_weights_that_do_not_depend_on_the_gate_are_told(router: str, settings: dict[str, Any], advice: str) -> None:
    of_the_second = {**table(EVEN, EVEN, active=1.0), "certain": [1]}
    (alarm,) = alarms(config(router, **settings), steps(of_the_second, last=20), 100)
    assert (alarm.kind, alarm.severity, alarm.where) == ("certain", "serious", "Layer 2")
    assert alarm.advice.startswith(advice)
    once = [*steps(of_the_second, WINDOW - 1, last=20), {"step": 21, "routing": {**of_the_second, "certain": []}}]
    assert "certain" not in kinds(config(router, **settings), once)
    broken = {**of_the_second, "certain": [7, "x", None]}
    assert "certain" not in kinds(config(router, **settings), steps(broken, last=20))


def test_a_layer_no_token_uses_is_idle_and_its_experts_are_not_called_dead() -> None:
    nothing = table([0.0] * 4, EVEN)
    nothing["active"][0] = 0.01
    (alarm,) = alarms(config("threshold", threshold=0.6), steps(nothing), 100)
    assert (alarm.kind, alarm.where, alarm.advice) == ("idle", "Layer 1", "Lower adapter.threshold to 0.25.")


def test_advice_ends_where_the_loss_weight_is_large_already() -> None:
    routing = table([0.97, 0.01, 0.01, 0.01])
    for coef, advice in ((0.0, "Set adapter.{} to 0.001."), (0.05, "Raise adapter.{} to 0.1.")):
        (alarm,) = alarms(config(balance_loss_coef=coef), steps(routing), 100)
        assert alarm.advice == advice.format("balance_loss_coef")
    strong = config(balance_loss_coef=0.1)
    assert alarms(strong, steps(routing), 100)[0].setting == "training.learning_rate"
    assert alarms(config("dense"), steps(routing), 100)[0].setting == "adapter.cv_loss_coef"


@pytest.mark.parametrize("router", [name for name in ROUTERS if name != "lora"])
def test_every_advice_is_a_config_this_router_takes(router: str) -> None:
    sick = [
        table([0.0, 0.0, 0.0, 1.0], [0.0, 0.3, 0.3, 0.4], active=1.0),
        table(EVEN, EVEN, entropy=1.0, active=4.0),
        table(EVEN, EVEN, active=2.0),
        table([0.0] * 4, EVEN, active=0.0),
        {**table(EVEN, EVEN, active=1.0), "certain": [0, 1]},
    ]
    given = config(router)
    found = [alarm for routing in sick for alarm in alarms(given, steps(routing), 100)]
    assert {"collapse", "dead", "certain"} <= {alarm.kind for alarm in found}
    for alarm in found:
        match = re.fullmatch(r"(?:Set|Raise|Lower) (\w+\.\w+) to ([\d.e-]+)(?:\.|, or .*)", alarm.advice)
        assert match and match[1] == alarm.setting, alarm.advice
        section, name = alarm.setting.split(".")
        changed = RunConfig.from_dict(apply_overrides(given.to_dict(), {alarm.setting: float(match[2])}))
        assert changed.to_dict()[section][name] == float(match[2])


def test_lora_has_no_alarms_even_with_statistics() -> None:
    assert kinds(config("lora", 1), steps(table([1.0]))) == []


def test_layers_are_named_up_to_a_few() -> None:
    (alarm,) = alarms(config(), steps(table(*[[0.0, 0.4, 0.3, 0.3]] * 9)), 100)
    assert alarm.where.startswith("Layer 1 expert 1; layer 2 expert 1") and alarm.where.endswith("; and 3 more layers")
    assert len(alarm.layers) == 9 and health.ranges_text([0, 1, 2, 5]) == "1–3, 6"


# Real trainings


@pytest.mark.parametrize(
    ("router", "settings", "kind"),
    [
        ("threshold", {"adapter.threshold": 0.99}, "idle"),
        ("dynmole", {"adapter.entropy_threshold": 0}, "always_all"),
        ("dynmole", {"adapter.entropy_threshold": 1, "adapter.top_p": 0.1}, "fixed"),
        ("topp", {"adapter.top_p": 1.0}, "always_all"),
        ("topk", {"adapter.top_k": 1, "adapter.renormalize": True}, "certain"),
    ],
)
def test_a_real_training_driven_into_trouble_is_told(
    home: Path, tiny_folder: Path, tmp_path: Path, router: str, settings: dict[str, Any], kind: str
) -> None:
    from mole.training.trainer import train

    rows = [{"prompt": f"Say {n}", "completion": "yes"} for n in range(12)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    given = {
        "model.name": str(tiny_folder), "model.device": "cpu", "data.path": str(tmp_path / "rows.jsonl"),
        "data.eval_fraction": 0, "adapter.router": router, "adapter.num_experts": 4, "adapter.r": 2,
        "training.max_steps": 24, "training.per_device_train_batch_size": 4, "training.warmup_steps": 0,
    }  # fmt: skip
    run = runs.create(RunConfig.from_dict(apply_overrides({}, {**given, **settings})))
    train(run)
    logged = [event for event in run.events() if event["type"] == "step"]
    assert kind in kinds(run.config, logged, 24)
