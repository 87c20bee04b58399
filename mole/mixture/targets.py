"""Which modules of a model `target_modules` names: patterns are resolved here, so that PEFT sees names only."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Mapping
from types import MappingProxyType
from typing import Any, TypeVar

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from mole.config import ALL_LINEAR
from mole.core import patterns
from mole.core.errors import ConfigError, MoleNotice
from mole.mixture.layer import supports

V = TypeVar("V")
FIELD = "adapter.target_modules"
ANY_END = r"(?:.*\.)?(?:{})"
"""A pattern that may leave out the first parts of a name."""
LISTED = 12
"""Names of linear layers that an error lists."""


def resolve_targets(
    targets: str | Collection[str], model: nn.Module, bypassed: Mapping[str, str] = MappingProxyType({})
) -> str | list[str]:
    """The names to give to PEFT in place of `target_modules`, for the same modules of `model`.

    A pattern, which must match a module's full name, becomes the full names it matches; of a list, names that no module
    has are dropped, with a `MoleNotice` that names them; `all-linear` stays.

    Args:
        targets: as in the config.
        model: the base model.
        bypassed: full names of linear layers that must not be named, with the reason.

    Raises:
        ConfigError: no module is named, or one that is not linear, or one that is bypassed.
    """
    if isinstance(targets, str) and targets.lower() == ALL_LINEAR:
        return targets
    modules = adaptable_modules(model)
    found = names = named_by(targets, modules, FIELD)
    if not isinstance(targets, str):
        names = sorted(set(targets) & {suffix for name in found for suffix in patterns.suffixes(name)})
    if not found:
        advice = "A pattern must match the full name, e.g. .*\\.q_proj." if isinstance(targets, str) else ""
        raise ConfigError(FIELD, targets, f"the name of a linear layer ({linear_names(modules)})", advice)
    for name in found:
        if not supports(wrapped(modules[name])):
            kind = type(wrapped(modules[name])).__name__
            allowed = f"linear layers only ({linear_names(modules)}), and {name} is a {kind}"
            raise ConfigError(FIELD, targets, allowed, "Name the projections to adapt, or use all-linear.")
        if name in bypassed:
            allowed = f"without {name}, since {bypassed[name]}"
            raise ConfigError(FIELD, targets, allowed, "all-linear leaves it out, and exclude_modules can.")
    if isinstance(targets, str):
        check_ends(names, modules)
    elif unknown := sorted(set(targets) - set(names)):
        told = f"{FIELD}: this model has no module {', '.join(unknown)}; only the other names are adapted"
        warnings.warn(f"{told}. It has: {linear_names(modules)}.", MoleNotice, stacklevel=2)
    return sorted(names)


def without_bypassed(targets: Iterable[str], bypassed: Mapping[str, str]) -> list[str]:
    """The full names that `all-linear` stands for, without those of projections that are bypassed; says which."""
    left_out = sorted({name.rpartition(".")[2] for name in targets if name in bypassed})
    kept = sorted(name for name in targets if name not in bypassed)
    if not kept:
        raise ConfigError(FIELD, ALL_LINEAR, f"the name of a linear layer other than {', '.join(left_out)}")
    if left_out:
        reasons = sorted({bypassed[name] for name in targets if name in bypassed})
        warnings.warn(f"{ALL_LINEAR} leaves out {', '.join(left_out)}: {'; '.join(reasons)}.", MoleNotice, stacklevel=2)
    return kept


def narrow_targets(names: Iterable[str], config: Any, model: nn.Module) -> list[str]:
    """The targets without the excluded ones and those that are saved whole, and of the chosen layers only.

    Args:
        names: what `resolve_targets` returned.
        config: the settings; `modules_to_save` are full names.
        model: the base model.

    Raises:
        ConfigError: nothing of the model is excluded, a layer does not exist, or no target is left.
    """
    modules = adaptable_modules(model)
    left_out = set(excluded_modules(config.exclude_modules, modules) if config.exclude_modules else ())
    whole = tuple(f"{name}." for name in config.modules_to_save or ())
    kept = [name for name in named_by(list(names), modules, FIELD) if name not in left_out]
    kept = [name for name in kept if not f"{name}.".startswith(whole)]
    if config.layers_to_transform is not None:
        layers = set(config.layers_to_transform)
        numbers = {name: place[1] for name in modules if (place := layer_place(name, config.layers_pattern))}
        if missing := layers - set(numbers.values()):
            allowed = f"indices of layers; this model has 0 to {max(numbers.values(), default=0)}, not {min(missing)}"
            raise ConfigError("adapter.layers_to_transform", sorted(layers), allowed)
        kept = [name for name in kept if numbers.get(name) in layers]
    if not kept:
        narrowing = ("exclude_modules", "layers_to_transform", "modules_to_save")
        field = next((name for name in narrowing if getattr(config, name)), "target_modules")
        raise ConfigError(f"adapter.{field}", getattr(config, field), "such that some of the target modules are left")
    check_ends(kept, modules)
    return sorted(kept)


def layer_place(name: str, patterns_of_lists: str | Collection[str] | None) -> tuple[str, int] | None:
    """The full name of the list of layers that a module is in and its index there; None outside, such as a pooler.

    Args:
        name: the module's full name.
        patterns_of_lists: `layers_pattern`, ends of the names of lists; None for any, then the outermost one counts.
    """
    parts = name.split(".")
    places = [(".".join(parts[:at]), int(part)) for at, part in enumerate(parts) if at and part.isdecimal()]
    if patterns_of_lists is None:
        return places[0] if places else None
    wanted = [patterns_of_lists] if isinstance(patterns_of_lists, str) else patterns_of_lists
    for pattern in wanted:
        compiled = patterns.compile_pattern(pattern, "adapter.layers_pattern", ANY_END)
        if place := next((place for place in places if compiled.fullmatch(place[0])), None):
            return place
    return None


def layer_lists(layers_pattern: str | Collection[str] | None, model: nn.Module) -> list[str] | None:
    """The full names of the lists of layers that `layers_pattern` fits. Raises `ConfigError` if it fits none."""
    if layers_pattern is None:
        return None
    found = {place[0] for name in adaptable_modules(model) if (place := layer_place(name, layers_pattern))}
    if not found:
        lists = sorted({place[0] for name in adaptable_modules(model) if (place := layer_place(name, None))})
        allowed = f"the name of a list of layers of this model ({', '.join(lists[:LISTED])})"
        raise ConfigError("adapter.layers_pattern", layers_pattern, allowed)
    return sorted(found)


def resolve_table(table: Mapping[str, V], names: Iterable[str], field: str) -> dict[str, V]:
    """A table of settings by full names, for one by names and patterns; the first that fits a name counts, as in PEFT.

    Args:
        table: values by names, or patterns of names, of which any end counts as a name.
        names: full names of the adapted projections.
        field: the setting's name, for the error.

    Raises:
        ConfigError: a key fits none of them.
    """
    compiled = [(key, patterns.compile_pattern(key, field, ANY_END)) for key in table]
    found: dict[str, V] = {}
    unused = dict.fromkeys(table)
    for name in names:
        for key, pattern in compiled:
            if pattern.fullmatch(name):
                unused.pop(key, None)
                found.setdefault(name, table[key])
    for key in unused:
        raise ConfigError(field, key, "the name of a target module, or a pattern for some of them")
    return found


def named_by(targets: str | Collection[str], modules: Iterable[str], field: str) -> list[str]:
    """The full names that a pattern matches, or of which a name in a list is the end; `field` is for the error."""
    if isinstance(targets, str):
        pattern = patterns.compile_pattern(targets, field)
        return [name for name in modules if pattern.fullmatch(name)]
    wanted = set(targets)
    return [name for name in modules if not wanted.isdisjoint(patterns.suffixes(name))]


def excluded_modules(exclude: str | Collection[str], modules: Iterable[str]) -> list[str]:
    """The full names of the modules that `exclude_modules` names. Raises `ConfigError` if there are none."""
    field = "adapter.exclude_modules"
    found = named_by(exclude, modules, field)
    if not found:
        advice = "Text is a pattern of full names, e.g. .*\\.v_proj; a list, e.g. [v_proj], holds names."
        raise ConfigError(field, exclude, "the name of a module of this model", advice)
    return sorted(found)


def adaptable_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of a model by their full names, without the inner ones of those that have an adapter already."""
    return outer_modules(model, True)


def outer_modules(model: nn.Module, remove_duplicate: bool) -> dict[str, nn.Module]:
    """The modules by full names, without the inner ones of adapters; a module with two names has both if asked."""
    modules: dict[str, nn.Module] = {}
    inside: str | None = None
    for name, module in model.named_modules(remove_duplicate=remove_duplicate):  # an adapted module, then its inner
        if inside is not None and name.startswith(inside):
            continue
        inside = f"{name}." if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)) else None
        if name:
            modules[name] = module
    return modules


def wrapped(module: nn.Module) -> nn.Module:
    """The module itself, without the adapter it has already."""
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def linear_names(modules: dict[str, nn.Module]) -> str:
    """The short names of a model's linear layers, for an error."""
    names = sorted({name.rpartition(".")[2] for name, module in modules.items() if supports(wrapped(module))})
    return ", ".join([*names[:LISTED], *(["…"] if len(names) > LISTED else [])]) or "this model has none"


def check_ends(names: Collection[str], modules: Iterable[str]) -> None:
    """Raise `ConfigError` if a full name is also the end of another module's: PEFT would adapt that one too."""
    chosen = set(names)
    for other in modules:
        if other not in chosen and (name := next((end for end in patterns.suffixes(other) if end in chosen), None)):
            allowed = f"a pattern for both {name} and {other}, or for neither, since the one name ends in the other"
            raise ConfigError(FIELD, name, allowed)
