"""The patterns in the settings of another PEFT method, resolved into names before PEFT runs them.

PEFT compares some settings of an adapter with the names of a model's modules by Python's `re`, as `adapter_config.json`
gives them. Here each is matched by RE2 once, with PEFT's meaning, and replaced by a pattern of literal names.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from mole.config import ALL_LINEAR
from mole.core import limits, patterns
from mole.core.errors import ConfigError, ModelError, brief

WHOLE_NAMES = ("target_modules", "exclude_modules", "feedforward_modules")
"""Settings that are a pattern of full names if they are text, and otherwise names that are compared as they are."""
PARTS_OF_PATTERNS = ("modules_to_save", "layers_pattern")
"""Settings whose names PEFT puts into patterns."""
COMPARED = ("target_parameters", "target_modules_to_tie", "modules_to_tie")
"""Settings whose names are compared as they are."""
EMBEDDINGS = ("embed_tokens", "lm_head")
"""Names without their place that PEFT compares `target_modules` with, too."""
FUSED = ("gate_up_proj", "down_proj")
EARLIER_NAMES = ("gate", "w1", "w2", "w3", "gate_proj", "up_proj", "down_proj")
"""Parameters of experts, and the modules of transformers 4 that they replace; PEFT looks for both names."""
DUMMY = "dummy-target-modules"
"""PEFT's word for no modules."""


@dataclasses.dataclass(frozen=True)
class Table:
    """How PEFT looks a module's name up in a table of patterns.

    Attributes:
        within: the expression that PEFT makes of a key, with `{}` in its place.
        literal: a key that, within it, matches exactly the names that replace `{}`.
        search: whether a match may begin anywhere in the name, not only at its start.
    """

    within: str
    literal: str
    search: bool = False


USUAL_TABLE = Table(r"(.*\.)?({})$", "^{}")
TABLES = {
    "OSF": Table("{}", "^{}$", search=True),
    "C3A": Table(r".*\.{}$", "(?!)|{}"),
    "FOURIERFT": Table(r".*\.{}$", "(?!)|{}"),
    "ADALORA": None,  # its keys are names of weights, and not matched
}
"""The PEFT methods with another way than `USUAL_TABLE`."""


def resolve_patterns(config: Any, model: Any) -> None:
    """Replace the patterns in a `PeftConfig` by what they mean for a base model; the adapter stays the same.

    Args:
        config: the settings; they are changed in place.
        model: the base model that the adapter is about to be added to.

    Raises:
        ModelError: a kind of adapter that loads others by itself.
        ConfigError: a pattern that is not RE2's, a name that acts as a pattern, or too many of them.
    """
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
    from peft.tuners.tuners_utils import BaseTuner

    kind = getattr(config.peft_type, "value", str(config.peft_type))
    if kind == "XLORA":
        raise ModelError("X-LoRA loads further adapters from wherever its settings say; load those one by one instead.")
    for field in PARTS_OF_PATTERNS:
        check_parts(getattr(config, field, None), field)
    for field in COMPARED:
        patterns.check_names(getattr(config, field, None) or (), field)
    tuner = PEFT_TYPE_TO_TUNER_MAPPING.get(config.peft_type)
    if not (isinstance(tuner, type) and issubclass(tuner, BaseTuner)):
        return  # no module's name is matched
    if getattr(config, "layer_replication", None):
        check_replication(config)  # the names are known when PEFT has repeated the layers
        return
    parameters = bool(getattr(config, "target_parameters", None))
    names = names_to_match(model, parameters)
    for field in WHOLE_NAMES:
        if (value := getattr(config, field, None)) is not None:
            literal = whole_names(value, names, field)
            if field == "target_modules" and literal in (patterns.NOTHING, set()) and value and not parameters:
                raise ConfigError(field, value, "names of modules of the base model, or a pattern of full names")
            setattr(config, field, literal)
    if (table := TABLES.get(kind, USUAL_TABLE)) is not None:
        for field in tables(config):
            setattr(config, field, literal_table(getattr(config, field), names, field, table))


def tables(config: Any) -> list[str]:
    """The settings that are a table of patterns, e.g. `rank_pattern`, and not empty."""
    fields = (item.name for item in dataclasses.fields(config) if item.name.endswith("_pattern"))
    return [field for field in fields if field not in PARTS_OF_PATTERNS and getattr(config, field)]


def check_replication(config: Any) -> None:
    """Raise `ConfigError` if the settings repeat too many layers, or have any pattern besides."""
    ranges = config.layer_replication
    try:
        count = sum(len(range(start, end)) for start, end in ranges)
    except (TypeError, ValueError, OverflowError):
        raise ConfigError("layer_replication", ranges, "a list of ranges of layers") from None
    if count > limits.LAYERS:
        raise ConfigError("layer_replication", f"{brief(count)} layers", f"at most {limits.LAYERS:,}")
    for field in WHOLE_NAMES:
        value = getattr(config, field, None)
        if isinstance(value, str) and value.lower() != ALL_LINEAR:
            raise ConfigError(field, value, "a list of names, where layer_replication is set")
        patterns.check_plain([] if isinstance(value, str) else value or [], field)
    for field in tables(config):
        raise ConfigError(field, getattr(config, field), "empty, where layer_replication is set")


def names_to_match(model: Any, parameters: bool) -> list[str]:
    """Every name that PEFT may compare with a pattern: of modules, and where it adapts parameters too, of these."""
    found = dict.fromkeys((*(name for name, _ in model.named_modules() if name), *EMBEDDINGS))
    weights = [name.replace(".base_layer", "") for name, _ in model.named_parameters()]
    fused = {holder for holder, _, last in (name.rpartition(".") for name in weights) if last in FUSED}
    if parameters or fused:
        found.update(dict.fromkeys(weights))
    found.update(dict.fromkeys(f"{holder}.{earlier}" for holder in sorted(fused) for earlier in EARLIER_NAMES))
    return list(found)


def check_parts(value: Any, field: str) -> None:
    """Check names that PEFT puts into patterns, one or several. Raises `ConfigError`."""
    if value is None:
        return
    single = isinstance(value, str) and field == "layers_pattern"
    if not single and not isinstance(value, (list, tuple, set)):
        raise ConfigError(field, value, "a list of names")
    patterns.check_plain([value] if single else value, field)


def whole_names(value: Any, names: list[str], field: str) -> Any:
    """A setting of `WHOLE_NAMES` without patterns: text becomes the names it matches, a list loses unknown names."""
    if isinstance(value, str):
        if field == "target_modules" and value.lower() in (ALL_LINEAR, DUMMY):
            return value
        pattern = patterns.compile_pattern(value, field)
        return patterns.any_of(name for name in names if pattern.fullmatch(name))
    if not isinstance(value, (list, tuple, set)):
        raise ConfigError(field, value, "a pattern or a list of names")
    patterns.check_names(value, field)
    if field == "feedforward_modules":
        return value  # compared with the ends of names, wherever they begin
    return set(value).intersection(end for name in names for end in patterns.suffixes(name))


def literal_table(value: Any, names: list[str], field: str, table: Table) -> dict[str, Any]:
    """A table with one key for each value: the names whose first matching pattern has that value."""
    if not isinstance(value, dict):
        raise ConfigError(field, value, "a table of patterns and numbers")
    patterns.check_names(value, field)
    if len(names) * sum(1 if patterns.is_plain(key) else len(key) for key in value) > limits.PATTERN_WORK:
        raise ConfigError(field, f"a table of {len(value):,} patterns", f"smaller, for the {len(names):,} names here")
    found: dict[tuple[type, Any], list[str]] = {}
    left = names
    for key, setting in value.items():
        if not isinstance(setting, (int, float)):
            raise ConfigError(field, setting, "a table of patterns and numbers")
        matches = matcher(key, field, table)
        taken = [name for name in left if matches(name)]
        left = sorted(set(left).difference(taken)) if taken else left
        if taken:
            found.setdefault((type(setting), setting), []).extend(taken)
    if len(found) > limits.PATTERN_VALUES:
        raise ConfigError(field, f"{len(found):,} different values", f"at most {limits.PATTERN_VALUES}")
    return {table.literal.replace("{}", patterns.any_of(taken)): number for (_, number), taken in found.items()}


def matcher(key: str, field: str, table: Table) -> Callable[[str], Any]:
    """Whether a name matches a key, as PEFT sees it."""
    pattern = patterns.compile_pattern(key, field, table.within)
    return pattern.search if table.search else pattern.match
