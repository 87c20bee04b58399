"""Detects unhealthy routing: alarms from the statistics of the last logged steps, each with a setting to try.

The statistics are those of the last `WINDOW` logged steps (`mole.mixture.routing_statistics.layer_statistics`): `load`
[layer][expert], sums to 1 per layer; `entropy` [layer], 0…1; `active` [layer], mean number of experts per token. An
alarm requires its condition to hold in every one of these steps, so that a single bad batch raises none. Does not
import torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from mole.config import RunConfig
from mole.core.limits import DEAD_SHARE

WINDOW = 10
"""Logged steps in which an alarm's condition must hold."""
MANY_DEAD = 0.25
"""Share of dead experts from which the alarm is serious."""
COLLAPSED = 0.9
"""Above this share of its layer's load, an expert leaves the others next to nothing to learn from."""
FLAT = 0.98
"""Above this mean entropy, a router has no preference."""
IDLE = 0.05
"""Below this mean number of active experts per token, a layer's adapter does nothing for most tokens."""
ALL = 0.99
"""From this share of its experts on, a layer counts as using all of them."""
EARLY, LATE = 1 / 3, 2 / 3
"""Share of the run before a router is expected to have a preference, and before it is expected to be sparse."""
MOST_COEF = 0.1
"""The largest loss coefficient that is suggested."""
NAMED = 6
"""Layers that an alarm lists; of the others it gives the number."""

Statistics = dict[str, Any]


@dataclass(frozen=True)
class Alarm:
    """A problem with the routing.

    Attributes:
        kind: `collapse`, `dead`, `idle`, `certain`, `flat`, `always_all` or `fixed`.
        severity: `serious` (the mixture is broken), `warning` (part of it is) or `note`.
        title: the problem in a few words.
        where: the layers and experts, counted from 1.
        meaning: the effect on the training, in one sentence.
        advice: a setting to try, with direction and value.
        setting: the setting's dotted name.
        layers: indices of the layers concerned.
    """

    kind: str
    severity: str
    title: str
    where: str
    meaning: str
    advice: str
    setting: str
    layers: tuple[int, ...]


def alarms(config: RunConfig, steps: Sequence[dict[str, Any]], total_steps: int) -> list[Alarm]:
    """The alarms of a run, most serious first; empty before `WINDOW` steps have been logged.

    Args:
        config: the run's settings; `lora` has no routing and no alarms.
        steps: step events with `step` and `routing`, newest last.
        total_steps: steps of the whole run, 0 if unknown: then checks that need a share of the run are skipped.
    """
    last = [event["routing"] for event in steps if event.get("routing")][-WINDOW:]
    sizes = {(routing["layers"], routing["experts"]) for routing in last}
    if config.adapter.router == "lora" or len(last) < WINDOW or len(sizes) > 1:
        return []
    window = RoutingWindow(config, last, steps[-1]["step"] / total_steps if total_steps else 0.0)
    found = [alarm for check in CHECKS if (alarm := check(window))]
    if any(alarm.kind == "always_all" for alarm in found):  # same cause as `flat`, and more specific
        found = [alarm for alarm in found if alarm.kind != "flat"]
    return sorted(found, key=lambda alarm: ("serious", "warning", "note").index(alarm.severity))


class RoutingWindow:
    """The routing statistics of the last steps, with the settings of the run."""

    def __init__(self, config: RunConfig, steps: list[Statistics], progress: float) -> None:
        self.config, self.adapter, self.steps, self.progress = config, config.adapter, steps, progress
        self.router = config.adapter.router
        self.layers = range(steps[-1]["layers"])
        allotted = [config.adapter.experts_at(layer, len(self.layers)) for layer in self.layers]
        self.counts = [min(count, steps[-1]["experts"]) for count in allotted]

    def value(self, setting: str) -> Any:
        """The value of one of the router's settings."""
        return getattr(self.adapter.params, setting)

    def loads(self, layer: int, expert: int) -> list[float]:
        """The expert's share of the layer's load, for each step."""
        return [routing["load"][layer][expert] for routing in self.steps]

    def active(self, layer: int) -> list[float]:
        """Mean number of experts per token in the layer, for each step."""
        return [routing["active"][layer] for routing in self.steps]

    def dominant(self, layer: int) -> list[int]:
        """The expert with more than `COLLAPSED` of the layer's load in every step, if there are others."""
        experts = range(self.counts[layer]) if self.counts[layer] > 1 else ()
        return [expert for expert in experts if min(self.loads(layer, expert)) > COLLAPSED]

    def certain(self, step: Statistics) -> set[int]:
        """The layers where every token of a step used one expert with the weight 1; older runs do not tell."""
        told = step.get("certain")
        return {layer for layer in told if layer in self.layers} if isinstance(told, list) else set()

    def is_idle(self, layer: int) -> bool:
        """Whether hardly any token uses an expert in this layer."""
        return max(self.active(layer)) < IDLE


# ---------------------------------------------------------------------------------------------------------
# Checks


def check_collapse(window: RoutingWindow) -> Alarm | None:
    """One expert has more than `COLLAPSED` of a layer's load in every step.

    Load is a mean over tokens, so a router with one expert per token raises this only if it is always the same expert.
    """
    found = {layer: experts for layer in window.layers if (experts := window.dominant(layer))}
    if not found:
        return None
    setting, advice = strengthen_balance(window)
    return Alarm(
        "collapse", "serious", "Collapsed onto one expert", location_text(found),
        f"One expert gets more than {COLLAPSED:.0%} of the load; the layer's other experts learn next to nothing.",
        advice, setting, tuple(found),
    )  # fmt: skip


def check_dead(window: RoutingWindow) -> Alarm | None:
    """Experts with less than `DEAD_SHARE` of an even share of the load in every step.

    Idle and collapsed layers are left out: they have their own alarm, and dead experts are only a consequence.
    """
    found = {
        layer: [
            e for e in range(window.counts[layer]) if max(window.loads(layer, e)) < DEAD_SHARE / window.counts[layer]
        ]
        for layer in window.layers
        if window.counts[layer] > 1 and not window.is_idle(layer) and not window.dominant(layer)
    }
    found = {layer: experts for layer, experts in found.items() if experts}
    if not found:
        return None
    number, of = sum(map(len, found.values())), sum(window.counts)
    setting, advice = strengthen_balance(window)
    return Alarm(
        "dead", "serious" if number >= MANY_DEAD * of else "warning",
        f"{number} of {of} experts {'is' if number == 1 else 'are'} dead", location_text(found),
        f"They get less than {DEAD_SHARE:.0%} of an even share of the load, so they hardly train any more.",
        advice, setting, tuple(found),
    )  # fmt: skip


def check_idle(window: RoutingWindow) -> Alarm | None:
    """Layers with fewer than `IDLE` experts per token in every step: possible with `threshold` and `adamole`."""
    setting = {"threshold": "threshold", "adamole": "max_threshold"}.get(window.router)
    found = [layer for layer in window.layers if window.is_idle(layer)]
    if setting is None or not found:
        return None
    lower = even_share(window)
    now = window.value(setting)
    if now is not None and now <= lower:
        lower = round(now / 2, 4)
    return Alarm(
        "idle", "serious", "No expert is used", location_text({layer: [] for layer in found}),
        "Hardly any token reaches the threshold there, so the adapter has next to no effect.",
        f"Lower adapter.{setting} to {lower:g}.", f"adapter.{setting}", tuple(found),
    )  # fmt: skip


def check_certain(window: RoutingWindow) -> Alarm | None:
    """Layers where every token used one expert with the weight 1 in every step: the gate changes no weight."""
    found = set(window.layers).intersection(*(window.certain(step) for step in window.steps))
    if not found:
        return None
    setting, advice = use_more_experts(window)
    return Alarm(
        "certain", "serious", "The loss does not reach the router",
        location_text({layer: [] for layer in sorted(found)}),
        "Every token uses one expert with the weight 1, whatever the gate says, so the router learns nothing from it.",
        advice, setting, tuple(sorted(found)),
    )  # fmt: skip


def check_flat(window: RoutingWindow) -> Alarm | None:
    """The mean entropy over all layers is above `FLAT` in every step, checked after the first third of the run."""
    layers = [layer for layer in window.layers if window.counts[layer] > 1]
    means = [sum(routing["entropy"][layer] for layer in layers) / len(layers) for routing in window.steps if layers]
    if window.progress < EARLY or not means or min(means) <= FLAT:
        return None
    setting, advice = strengthen_entropy(window)
    return Alarm(
        "flat", "note", "The routers have no preference", f"All layers, mean entropy {means[-1]:.3f}",
        "All experts are almost equally probable, so they all learn much the same.",
        advice, setting, tuple(layers),
    )  # fmt: skip


def check_always_all(window: RoutingWindow) -> Alarm | None:
    """An adaptive router uses all experts of every layer in every step, checked in the last third of the run."""
    layers = [layer for layer in window.layers if window.counts[layer] > 1]
    if not window.adapter.params.adaptive or window.progress < LATE or not layers:
        return None
    if any(min(window.active(layer)) < ALL * window.counts[layer] for layer in layers):
        return None
    setting, advice = use_fewer_experts(window)
    why = "is still above adapter.entropy_threshold" if window.router == "dynmole" else "uses every expert"
    return Alarm(
        "always_all", "warning", "Every token uses all experts", "All layers",
        f"Nearly every token {why}: the mixture is dense, and no experts are selected.",
        advice, setting, tuple(layers),
    )  # fmt: skip


def check_fixed(window: RoutingWindow) -> Alarm | None:
    """DynMoLE keeps only `keep_top_k` experts for every token, checked in the last third of the run."""
    if window.router != "dynmole" or window.progress < LATE:
        return None
    keep, threshold = window.value("keep_top_k"), window.value("entropy_threshold")
    layers = [layer for layer in window.layers if window.counts[layer] > keep]
    if not layers or any(max(window.active(layer)) > keep + 0.02 for layer in layers):
        return None
    return Alarm(
        "fixed", "note", f"Every token uses {keep} experts", "All layers",
        "No token has enough entropy to use all experts: the router behaves like plain top-k.",
        f"Lower adapter.entropy_threshold to {max(round(threshold - 0.1, 2), 0.0):g}.",
        "adapter.entropy_threshold", tuple(layers),
    )  # fmt: skip


CHECKS: tuple[Callable[[RoutingWindow], Alarm | None], ...] = (
    check_collapse, check_dead, check_idle, check_certain, check_flat, check_always_all, check_fixed,
)  # fmt: skip

# ---------------------------------------------------------------------------------------------------------
# Settings to try


def strengthen_balance(window: RoutingWindow) -> tuple[str, str]:
    """Strengthen the balance loss; if it is strong already, lower the learning rate."""
    name = "cv_loss_coef" if window.router == "dense" else "balance_loss_coef"
    return raise_coefficient(window, name, 0.001) or lower_learning_rate(window)


def strengthen_entropy(window: RoutingWindow) -> tuple[str, str]:
    """Strengthen the entropy loss, which makes routers decide; if it is strong already, train more."""
    rate = window.config.training.learning_rate
    more = "training.learning_rate", f"Raise training.learning_rate to {2 * rate:.3g}, or train longer."
    return raise_coefficient(window, "entropy_loss_coef", 0.01) or more


def use_fewer_experts(window: RoutingWindow) -> tuple[str, str]:
    """Make an adaptive router use fewer experts per token."""
    if window.router == "topp":
        lower = round(window.value("top_p") - 0.2, 2)
        return "adapter.top_p", f"Lower adapter.top_p to {max(lower, 0.1):g}."
    if window.router in ("threshold", "adamole"):
        name = "threshold" if window.router == "threshold" else "max_threshold"
        now = window.value(name)
        higher = min(1.0, max(even_share(window), 1.5 * (even_share(window) if now is None else now)))
        return f"adapter.{name}", f"Raise adapter.{name} to {higher:.3g}."
    if window.router == "sparsegen":
        return raise_coefficient(window, "sparsity_loss_coef", 0.1) or strengthen_entropy(window)
    return strengthen_entropy(window)


def use_more_experts(window: RoutingWindow) -> tuple[str, str]:
    """Make a token's weights depend on the gate: more experts, or one whose weight is its probability."""
    if window.router == "topk" and window.value("top_k") == 1:
        return "adapter.top_k", "Set adapter.top_k to 2, or leave adapter.renormalize empty."
    if window.router == "topp":
        return "adapter.top_p", f"Raise adapter.top_p to {min(round(window.value('top_p') + 0.2, 2), 1.0):g}."
    if window.router == "dynmole" and window.value("keep_top_k") == 1:
        return "adapter.keep_top_k", "Raise adapter.keep_top_k to 2."
    if window.router in ("threshold", "adamole"):
        name = "threshold" if window.router == "threshold" else "max_threshold"
        now = window.value(name)
        return f"adapter.{name}", f"Lower adapter.{name} to {(even_share(window) if now is None else now) / 2:.3g}."
    return lower_learning_rate(window)


def raise_coefficient(window: RoutingWindow, name: str, first: float) -> tuple[str, str] | None:
    """Raise a loss coefficient tenfold, or set it to `first` if it is 0; None if it is at `MOST_COEF` already."""
    now = window.value(name)
    if now >= MOST_COEF:
        return None
    verb, value = ("Raise", min(10 * now, MOST_COEF)) if now else ("Set", first)
    return f"adapter.{name}", f"{verb} adapter.{name} to {value:g}."


def lower_learning_rate(window: RoutingWindow) -> tuple[str, str]:
    """Divide the learning rate by three."""
    rate = window.config.training.learning_rate / 3
    return "training.learning_rate", f"Lower training.learning_rate to {rate:.2g}, or raise training.warmup_steps."


def even_share(window: RoutingWindow) -> float:
    """An even share 1/E of the load in the layer with the most experts."""
    return round(1 / max(window.counts), 4)


def location_text(found: dict[int, list[int]]) -> str:
    """Layers and their experts, counted from 1: the first `NAMED` layers, then the number of the others."""
    named = [
        f"layer {layer + 1}" + (f" expert{'s' if len(experts) > 1 else ''} {ranges_text(experts)}" if experts else "")
        for layer, experts in list(found.items())[:NAMED]
    ]
    more = len(found) - len(named)
    text = "; ".join(named) + (f"; and {more} more layer{'s' if more > 1 else ''}" if more else "")
    return text[0].upper() + text[1:]


def ranges_text(experts: list[int]) -> str:
    """Expert numbers counted from 1, consecutive ones as a range: `1–3, 6`."""
    ranges: list[list[int]] = []
    for expert in experts:
        if ranges and ranges[-1][-1] == expert - 1:
            ranges[-1].append(expert)
        else:
            ranges.append([expert])
    return ", ".join(f"{one[0] + 1}" if len(one) == 1 else f"{one[0] + 1}–{one[-1] + 1}" for one in ranges)
