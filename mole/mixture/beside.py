"""What is trained beside the experts, as under LoRA: whole modules, biases of the base model, embeddings of tokens."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from mole.core import patterns
from mole.core.errors import ConfigError
from mole.mixture.routing_log import layer_number
from mole.mixture.targets import LISTED, outer_modules

SAVED = "adapter.modules_to_save"
CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
"""Modules that are never called."""


def whole_modules(names: Iterable[str], model: nn.Module, may_be_missing: Collection[str] = ()) -> list[str]:
    """The full names of the modules that `modules_to_save` names: as under LoRA, those whose names end so.

    Args:
        names: ends of names.
        model: the base model.
        may_be_missing: names that stay as they are where the model has no such module.

    Raises:
        ConfigError: no module with weights is named, or one that is never called, such as a list of layers.
    """
    modules = {name: module for name, module in outer_modules(model, False).items() if has_weights(module)}
    found: dict[str, None] = {}
    for name in names:
        ends = [full for full in modules if full.endswith(name)]
        if not ends and name not in may_be_missing:
            plain = [full for full, module in modules.items() if next(module.children(), None) is None]
            others = ", ".join([full for full in plain if layer_number(full) is None][:LISTED])
            raise ConfigError(SAVED, name, f"the end of a module's name (outside the layers: {others})")
        if uncalled := next((full for full in ends if isinstance(modules[full], CONTAINERS)), None):
            kind = type(modules[uncalled]).__name__
            raise ConfigError(SAVED, name, f"a module that is called, and {uncalled} is a {kind}")
        found.update(dict.fromkeys(ends or [name]))
    # one inside another is trained with it
    return [name for name in found if not any(name.startswith(f"{outer}.") for outer in found)]


def has_weights(module: nn.Module) -> bool:
    """Whether a module has parameters."""
    return next(module.parameters(), None) is not None


def check_biases(config: Any, model: nn.Module) -> None:
    """Raise `ConfigError` if biases are to be trained that the model does not have, or that PEFT cannot save."""
    if config.bias == "none":
        return
    if not hasattr(BaseTuner, "_get_learnable_bias_state_dict"):
        raise ConfigError("adapter.bias", config.bias, "none with this version of PEFT", "PEFT 0.21 saves biases.")
    if not any(name.rpartition(".")[2] == "bias" for name, _ in model.named_parameters()):
        raise ConfigError("adapter.bias", config.bias, "none: this model has no biases")


def check_tokens(config: Any, model: Any) -> None:
    """Check that the tokens whose embeddings are trained exist, in a module that has nothing else to train.

    Args:
        config: the settings; `modules_to_save` are full names.
        model: the base model. Where its output layer has the embeddings' weights, the tokens are trained there too.

    Raises:
        ConfigError: the model has no such module or fewer tokens, or the module is trained whole or has an adapter.
    """
    field, given = "adapter.trainable_token_indices", config.trainable_token_indices
    if given is None:
        return
    modules: dict[str, Any] = outer_modules(model, remove_duplicate=True)
    own, output = (name_of(modules, model, f"get_{end}_embeddings") for end in ("input", "output"))
    tied = getattr(getattr(model, "config", None), "tie_word_embeddings", False)
    for end, tokens in (given if isinstance(given, dict) else {own or "embed_tokens": given}).items():
        found = [name for name in modules if name.endswith(end) and hasattr(modules[name], "weight")]
        if not found:
            raise ConfigError(field, end, f"the end of a module's name with embeddings (here: {own})")
        for name in found:
            rows = modules[name].weight.shape[0]
            if max(tokens) >= rows:
                raise ConfigError(field, max(tokens), f"an id below {rows:,}, the number of tokens of {name}")
        for name in [*found, *([output] if tied and output and own in found else [])]:
            for setting in ("modules_to_save", "target_modules"):
                names = getattr(config, setting) or ()
                if not isinstance(names, str) and not set(names).isdisjoint(patterns.suffixes(name)):
                    raise ConfigError(field, tokens, f"empty where {setting} has {name}, of which it trains tokens")


def name_of(modules: dict[str, Any], model: Any, getter: str) -> str | None:
    """The full name of the module that a transformers model's `get_input_embeddings` or the like returns."""
    wanted = getattr(model, getter, lambda: None)()
    return next((name for name, module in modules.items() if module is wanted), None)
