"""Is the routing healthy? Alarms from the statistics of the last logged steps, each with a setting to try. No torch.

What is looked at is the routing of the last `WINDOW` logged steps (`mole.mixture.routing_log.layer_statistics`): `load`
[layer][expert], a layer's loads sum to 1; `entropy` [layer] 0…1; `active` [layer], mean experts of a token. An alarm
is given only for what held in every one of those steps, so a bad batch raises none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from mole.config import RunConfig

WINDOW = 10
"""Logged steps something must have lasted."""
DEAD = 0.01
"""An expert below this share of an even load is dead."""
MANY_DEAD = 0.25
"""From this share of dead experts on it is serious."""
COLLAPSED = 0.9
"""An expert above this share of its layer's load leaves the others nothing to learn from."""
FLAT = 0.98
"""A mean entropy above this is that of a router that has no preference."""
IDLE = 0.05
"""Below this many active experts a token, a layer's adapter does nothing for most tokens."""
ALL = 0.99
"""At or above this share of its experts, a layer uses all of them."""
EARLY, LATE = 1 / 3, 2 / 3
"""Parts of the run that a router is given to make up its mind, and to become sure."""
ADAPTIVE = ("dynmole", "adamole", "topp", "threshold", "sparsegen")
"""Routers that are meant to use more experts for one token than for another."""
MOST_COEF = 0.1
NAMED = 6
"""Layers an alarm names before it only counts."""

Routing = dict[str, Any]


@dataclass(frozen=True)
class Alarm:
    """Something wrong with the routing.

    Attributes:
        kind: `collapse`, `dead`, `idle`, `flat`, `always_all` or `fixed`.
        severity: `serious` (the mixture is broken), `warning` (part of it is) or `note` (worth knowing).
        title: what it is, in a few words.
        where: the layers and experts, counted from 1.
        meaning: what that does to the training, in one sentence.
        advice: a setting to try, with direction and value.
        setting: the setting's dotted name.
        layers: the layers it is about, from 0.
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
    """What is wrong with the routing, the most serious first; empty before `WINDOW` steps have been logged.

    Args:
        config: the run's settings; `lora` has no routing and no alarms.
        steps: step events, the newest last, each with `step` and `routing`.
        total_steps: steps of the whole run, 0 while unknown; what a router needs time for is not asked before.
    """
    last = [event["routing"] for event in steps if event.get("routing")][-WINDOW:]
    sizes = {(routing["layers"], routing["experts"]) for routing in last}
    if config.adapter.router == "lora" or len(last) < WINDOW or len(sizes) > 1:
        return []
    look = Look(config, last, steps[-1]["step"] / total_steps if total_steps else 0.0)
    found = [alarm for check in CHECKS if (alarm := check(look))]
    if any(alarm.kind == "always_all" for alarm in found):  # the same cause, and the more exact word for it
        found = [alarm for alarm in found if alarm.kind != "flat"]
    return sorted(found, key=lambda alarm: ("serious", "warning", "note").index(alarm.severity))


class Look:
    """The last steps' routing, and what the run's settings say about it."""

    def __init__(self, config: RunConfig, last: list[Routing], progress: float) -> None:
        self.config, self.adapter, self.last, self.progress = config, config.adapter, last, progress
        self.router = config.adapter.router
        self.layers = range(last[-1]["layers"])
        allotted = [config.adapter.experts_at(layer, len(self.layers)) for layer in self.layers]
        self.counts = [min(count, last[-1]["experts"]) for count in allotted]

    def value(self, setting: str) -> Any:
        """The value of a setting of the router."""
        return getattr(self.adapter.params, setting)

    def loads(self, layer: int, expert: int) -> list[float]:
        """The expert's share of the layer's load, step by step."""
        return [routing["load"][layer][expert] for routing in self.last]

    def active(self, layer: int) -> list[float]:
        """Mean experts of a token in the layer, step by step."""
        return [routing["active"][layer] for routing in self.last]

    def favourites(self, layer: int) -> list[int]:
        """The expert that carries more than `COLLAPSED` of the layer's load in every step, if others exist."""
        experts = range(self.counts[layer]) if self.counts[layer] > 1 else ()
        return [expert for expert in experts if min(self.loads(layer, expert)) > COLLAPSED]

    def is_idle(self, layer: int) -> bool:
        """Whether next to no token has an expert there."""
        return max(self.active(layer)) < IDLE


# ---------------------------------------------------------------------------------------------------------
# Checks


def collapse(look: Look) -> Alarm | None:
    """One expert carries more than `COLLAPSED` of a layer's load, in every step.

    Load is a mean over tokens, so routers that use one expert a token are judged alike: only if it is always the same.
    """
    found = {layer: experts for layer in look.layers if (experts := look.favourites(layer))}
    if not found:
        return None
    setting, advice = balance_more(look)
    return Alarm(
        "collapse", "serious", "Collapsed onto one expert", places(found),
        f"One expert gets more than {COLLAPSED:.0%} of the load; the layer's other experts learn next to nothing.",
        advice, setting, tuple(found),
    )  # fmt: skip


def dead(look: Look) -> Alarm | None:
    """Experts whose load is below `DEAD` of an even share, in every step.

    Layers that are idle or collapsed have an alarm of their own, of which dead experts are only the consequence.
    """
    found = {
        layer: [e for e in range(look.counts[layer]) if max(look.loads(layer, e)) < DEAD / look.counts[layer]]
        for layer in look.layers
        if look.counts[layer] > 1 and not look.is_idle(layer) and not look.favourites(layer)
    }
    found = {layer: experts for layer, experts in found.items() if experts}
    if not found:
        return None
    number, of = sum(map(len, found.values())), sum(look.counts)
    setting, advice = balance_more(look)
    return Alarm(
        "dead", "serious" if number >= MANY_DEAD * of else "warning",
        f"{number} of {of} experts {'is' if number == 1 else 'are'} dead", places(found),
        f"They get less than {DEAD:.0%} of an even share of the load, so they are trained no more.",
        advice, setting, tuple(found),
    )  # fmt: skip


def idle(look: Look) -> Alarm | None:
    """Layers where a token has fewer than `IDLE` experts on average, in every step: `threshold` and `adamole` can."""
    setting = {"threshold": "threshold", "adamole": "max_threshold"}.get(look.router)
    found = [layer for layer in look.layers if look.is_idle(layer)]
    if setting is None or not found:
        return None
    lower = even_share(look)
    now = look.value(setting)
    if now is not None and now <= lower:
        lower = round(now / 2, 4)
    return Alarm(
        "idle", "serious", "No expert is used", places({layer: [] for layer in found}),
        "Hardly any token reaches the threshold there, so the adapter changes nothing for it.",
        f"Lower adapter.{setting} to {lower:g}.", f"adapter.{setting}", tuple(found),
    )  # fmt: skip


def flat(look: Look) -> Alarm | None:
    """The mean entropy over all layers is above `FLAT` in every step, after the first third of the run."""
    layers = [layer for layer in look.layers if look.counts[layer] > 1]
    means = [sum(routing["entropy"][layer] for layer in layers) / len(layers) for routing in look.last if layers]
    if look.progress < EARLY or not means or min(means) <= FLAT:
        return None
    setting, advice = decide_more(look)
    return Alarm(
        "flat", "note", "The routers have no preference", f"All layers, mean entropy {means[-1]:.3f}",
        "Nearly every expert is as probable as every other, so they all learn much the same.",
        advice, setting, tuple(layers),
    )  # fmt: skip


def always_all(look: Look) -> Alarm | None:
    """An adaptive router uses all experts of every layer in every step, in the last third of the run."""
    layers = [layer for layer in look.layers if look.counts[layer] > 1]
    if look.router not in ADAPTIVE or look.progress < LATE or not layers:
        return None
    if any(min(look.active(layer)) < ALL * look.counts[layer] for layer in layers):
        return None
    setting, advice = sparser(look)
    why = "is still above adapter.entropy_threshold" if look.router == "dynmole" else "uses every expert"
    return Alarm(
        "always_all", "warning", "Every token uses all experts", "All layers",
        f"Nearly every token {why}: the mixture is dense, and nothing is chosen for a token.",
        advice, setting, tuple(layers),
    )  # fmt: skip


def fixed(look: Look) -> Alarm | None:
    """DynMoLE keeps `keep_top_k` experts for every token, in the last third: it has become top-k."""
    if look.router != "dynmole" or look.progress < LATE:
        return None
    keep, threshold = look.value("keep_top_k"), look.value("entropy_threshold")
    layers = [layer for layer in look.layers if look.counts[layer] > keep]
    if not layers or any(max(look.active(layer)) > keep + 0.02 for layer in layers):
        return None
    return Alarm(
        "fixed", "note", f"Every token uses {keep} experts", "All layers",
        "No token is unsure enough to ask all experts: the router does what plain top-k does.",
        f"Lower adapter.entropy_threshold to {max(round(threshold - 0.1, 2), 0.0):g}.",
        "adapter.entropy_threshold", tuple(layers),
    )  # fmt: skip


CHECKS: tuple[Callable[[Look], Alarm | None], ...] = (collapse, dead, idle, flat, always_all, fixed)

# ---------------------------------------------------------------------------------------------------------
# Settings to try


def balance_more(look: Look) -> tuple[str, str]:
    """The balance loss, ten times as strong; the learning rate when that is strong already."""
    return raised(look, "cv_loss_coef" if look.router == "dense" else "balance_loss_coef", 0.001) or slower(look)


def decide_more(look: Look) -> tuple[str, str]:
    """The entropy loss, ten times as strong: it makes a router decide; more learning when that is strong already."""
    rate = look.config.training.learning_rate
    more = "training.learning_rate", f"Raise training.learning_rate to {2 * rate:.3g}, or train longer."
    return raised(look, "entropy_loss_coef", 0.01) or more


def sparser(look: Look) -> tuple[str, str]:
    """What makes an adaptive router use fewer experts for a token."""
    if look.router == "topp":
        lower = round(look.value("top_p") - 0.2, 2)
        return "adapter.top_p", f"Lower adapter.top_p to {max(lower, 0.1):g}."
    if look.router in ("threshold", "adamole"):
        name = "threshold" if look.router == "threshold" else "max_threshold"
        now = look.value(name)
        higher = min(1.0, max(even_share(look), 1.5 * (even_share(look) if now is None else now)))
        return f"adapter.{name}", f"Raise adapter.{name} to {higher:.3g}."
    return decide_more(look)


def raised(look: Look, name: str, first: float) -> tuple[str, str] | None:
    """A loss weight ten times as large, `first` when it is off; None when it is at `MOST_COEF` already."""
    now = look.value(name)
    if now >= MOST_COEF:
        return None
    verb, value = ("Raise", min(10 * now, MOST_COEF)) if now else ("Set", first)
    return f"adapter.{name}", f"{verb} adapter.{name} to {value:g}."


def slower(look: Look) -> tuple[str, str]:
    """A third of the learning rate."""
    rate = look.config.training.learning_rate / 3
    return "training.learning_rate", f"Lower training.learning_rate to {rate:.2g}, or raise training.warmup_steps."


def even_share(look: Look) -> float:
    """An even share of the experts, 1/E, of the layer with the most of them."""
    return round(1 / max(look.counts), 4)


def places(found: dict[int, list[int]]) -> str:
    """Layers and their experts, counted from 1; the first few by name, then how many more."""
    named = [
        f"layer {layer + 1}" + (f" expert{'s' if len(experts) > 1 else ''} {listed(experts)}" if experts else "")
        for layer, experts in list(found.items())[:NAMED]
    ]
    more = len(found) - len(named)
    text = "; ".join(named) + (f"; and {more} more layer{'s' if more > 1 else ''}" if more else "")
    return text[0].upper() + text[1:]


def listed(experts: list[int]) -> str:
    """Expert numbers counted from 1, runs of them as a range."""
    runs: list[list[int]] = []
    for expert in experts:
        if runs and runs[-1][-1] == expert - 1:
            runs[-1].append(expert)
        else:
            runs.append([expert])
    return ", ".join(f"{run[0] + 1}" if len(run) == 1 else f"{run[0] + 1}–{run[-1] + 1}" for run in runs)
