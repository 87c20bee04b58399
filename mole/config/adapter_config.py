"""The section `adapter` of a run's configuration. No torch."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from mole.config.fields import build_settings, check_settings, setting, unknown_setting
from mole.config.router_params import DynMoLEParams, RouterParams, params_class, router_field_names
from mole.core import limits, patterns
from mole.core.errors import ConfigError, InputError

OF_RUNS = ("params", "init_from")
"""What is no setting of an adapter that has been made: its router's settings stand beside the others there."""
ALL_LINEAR = "all-linear"
"""The `target_modules` that stand for every linear layer except the output layer."""


@dataclass
class AdapterConfig:
    """The mixture of LoRA experts: settings shared by all routers, and the selected router's parameters in `params`."""

    router: str = setting("dynmole", "Routing method.", flag="--router")
    num_experts: int | list[int] = setting(
        8,
        "LoRA experts per projection; a list is spread over equal groups of layers (MoLA: 2,4,6,8).",
        flag="--experts",
    )
    r: int = setting(8, "Rank of each expert.", ge=1, le=limits.RANK, label="Rank", flag="--rank")
    lora_alpha: float = setting(16, "LoRA scaling: the update is multiplied by alpha / r.", gt=0, le=1e30)
    lora_dropout: float = setting(0.05, "Dropout probability of the experts' input during training.", ge=0, le=0.95)
    target_modules: str | list[str] = setting(
        ALL_LINEAR, "Linear layers that get experts: all-linear, a list of names, or a pattern of full names."
    )
    exclude_modules: str | list[str] | None = setting(
        None, "Linear layers that get no experts: a list of names, or a pattern of full names."
    )
    layers_to_transform: list[int] | None = setting(
        None, "Layers that get experts, by index from 0, e.g. 20,21,22; empty for all."
    )
    layers_pattern: str | list[str] | None = setting(
        None, "Which list of layers those indices are of, by name or pattern, where a model has several."
    )
    modules_to_save: list[str] | None = setting(
        None, "Modules trained and saved whole beside the experts, by the end of their names, e.g. lm_head."
    )
    bias: str = setting(
        "none",
        "Biases of the base model that are trained: none, those of layers with experts (lora_only), or all.",
        choices=("none", "lora_only", "all"),
        label="Biases",
    )
    trainable_token_indices: list[int] | dict[str, list[int]] | None = setting(
        None, "Tokens whose embeddings are trained, by id, e.g. 49152,49153.", label="Trainable tokens"
    )
    use_rslora: bool = setting(False, "Multiply the update by alpha / √r instead of alpha / r.", label="rsLoRA scaling")
    rank_pattern: dict[str, int] = setting(
        {}, "Ranks of some layers, by name or pattern, e.g. {down_proj: 16, v_proj: 4}."
    )
    alpha_pattern: dict[str, float] = setting({}, "LoRA alphas of some layers, by name or pattern.")
    init_from: str | None = setting(
        None,
        "A run, RUN@STEP or an adapter's folder whose weights the run begins with; its experts must be as many and as "
        "large.",
        label="Begin with",
    )
    params: RouterParams = field(default_factory=DynMoLEParams)

    def __post_init__(self) -> None:
        expected = params_class(self.router)
        if type(self.params) is not expected:
            raise ConfigError("adapter.params", self.params, f"a {expected.__name__} for router {self.router!r}")
        check_settings(self, "adapter")
        self._check_targets()
        counts = self.expert_counts
        if not counts or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in counts):
            raise ConfigError(
                "adapter.num_experts", self.num_experts, "a whole number of at least 1, or a list of them"
            )
        if self.router == "lora" and counts != [1]:
            self.num_experts = 1
        largest = max(self.expert_counts)
        if largest > limits.EXPERTS or len(self.expert_counts) > limits.EXPERTS:
            raise ConfigError("adapter.num_experts", self.num_experts, f"at most {limits.EXPERTS}")
        if largest * self.largest_rank > limits.RANK_TIMES_EXPERTS:
            allowed = (
                f"such that experts × rank ({largest} × {self.largest_rank}) is at most {limits.RANK_TIMES_EXPERTS}"
            )
            raise ConfigError("adapter.num_experts", self.num_experts, allowed)

    def _check_targets(self) -> None:
        for name in (
            "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save", "trainable_token_indices",
            "init_from",
        ):  # fmt: skip
            setattr(self, name, getattr(self, name) or None)  # an empty box
        for name, targets in (("target_modules", self.target_modules), ("exclude_modules", self.exclude_modules or [])):
            if not isinstance(targets, str):
                patterns.check_names(targets, f"adapter.{name}")
            elif name == "exclude_modules" or targets.lower() != ALL_LINEAR:
                patterns.compile_pattern(targets, f"adapter.{name}")
        if any(layer < 0 for layer in self.layers_to_transform or []):
            raise ConfigError("adapter.layers_to_transform", self.layers_to_transform, "a list of numbers from 0")
        self._check_layers_pattern()
        self._check_tokens()
        if self.modules_to_save:
            patterns.check_plain(self.modules_to_save, "adapter.modules_to_save")
            self.modules_to_save = list(dict.fromkeys(self.modules_to_save))
        self._check_table("rank_pattern", self.rank_pattern, "a rank of 1", 1, limits.RANK)
        self._check_table("alpha_pattern", self.alpha_pattern, "an alpha above 0", sys.float_info.min, 1e30)

    def _check_layers_pattern(self) -> None:
        field, given = "adapter.layers_pattern", self.layers_pattern or []
        wanted = [given] if isinstance(given, str) else given
        patterns.check_names(wanted, field)
        for pattern in wanted:
            patterns.compile_pattern(pattern, field)
        if wanted and not self.layers_to_transform:
            raise ConfigError(field, given, "empty where layers_to_transform is")

    def _check_tokens(self) -> None:
        field, given = "adapter.trainable_token_indices", self.trainable_token_indices or {}
        by_module = given if isinstance(given, dict) else {"": given}
        patterns.check_plain([name for name in by_module if name], field)
        for tokens in by_module.values():
            if not tokens or min(tokens) < 0 or len(set(tokens)) < len(tokens) or len(tokens) > limits.TARGETS:
                raise ConfigError(field, tokens, f"a list of 1 to {limits.TARGETS:,} different ids from 0")

    def _check_table(self, name: str, table: Mapping[str, float], words: str, low: float, high: float) -> None:
        field = f"adapter.{name}"
        patterns.check_names(table, field)
        for key, value in table.items():
            patterns.compile_pattern(key, field)
            if not low <= value <= high:
                raise ConfigError(f"{field}.{key}", value, f"{words} to {high:g}")

    @property
    def largest_rank(self) -> int:
        """The largest rank that a projection has."""
        return max(self.r, *self.rank_pattern.values(), 1)

    def at(self, projection: str) -> AdapterConfig:
        """The settings of one projection, by its full name; the tables must be by full names too."""
        if not (self.rank_pattern or self.alpha_pattern):
            return self
        r, alpha = self.rank_pattern.get(projection, self.r), self.alpha_pattern.get(projection, self.lora_alpha)
        return dataclasses.replace(self, r=r, lora_alpha=alpha, rank_pattern={}, alpha_pattern={})

    @property
    def scaling(self) -> float:
        """What the update is multiplied by: alpha / r, with rsLoRA alpha / √r (arXiv 2312.03732)."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    @property
    def expert_counts(self) -> list[int]:
        """Experts of each group of layers, from the bottom up; one group when `num_experts` is a number."""
        return list(self.num_experts) if isinstance(self.num_experts, (list, tuple)) else [self.num_experts]

    def experts_at(self, layer: int, num_layers: int) -> int:
        """The number of experts of layer `layer` (from 0) out of `num_layers`, in equal groups as in MoLA."""
        counts = self.expert_counts
        return counts[min(layer * len(counts) // max(num_layers, 1), len(counts) - 1)]

    def experts_by_layer(self, num_layers: int) -> list[int]:
        """`experts_at` for each of `num_layers` layers."""
        return [self.experts_at(layer, num_layers) for layer in range(num_layers)]

    @classmethod
    def from_flat(cls, values: Mapping[str, Any]) -> AdapterConfig:
        """An `AdapterConfig` from the flat form of `run.yaml` and `MoleConfig`: router parameters beside the others.

        A router parameter that is None takes the router's default. Raises `InputError` for a parameter of another
        router, listing those of this one, and `ConfigError` for a value that is not allowed.
        """
        router = values.get("router", "dynmole")
        params_type = params_class(router)
        own = {item.name for item in fields(params_type)}
        shared = {item.name for item in fields(cls)} - {"params"}
        given = {key: value for key, value in values.items() if key not in shared and value is not None}
        for key in given:
            if key in own:
                continue
            if key in router_field_names():
                raise InputError(
                    f"adapter.{key} is not a setting of the router {router!r}; its settings: {', '.join(sorted(own))}.",
                    field=f"adapter.{key}",
                )
            raise unknown_setting("adapter", key, shared | own)
        params = build_settings(params_type, given, "adapter")
        rest = {key: value for key, value in values.items() if key in shared}
        return build_settings(cls, {**rest, "params": params}, "adapter")

    def to_flat(self) -> dict[str, Any]:
        """The complete flat form: every setting of the adapter and of its router."""
        values = {item.name: getattr(self, item.name) for item in fields(self) if item.name != "params"}
        return {**values, **dataclasses.asdict(self.params)}
