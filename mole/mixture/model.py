"""MoLE as a PEFT method: its configuration, its tuner and their registration with PEFT.

After `import mole`, `get_peft_model`, `PeftModel.from_pretrained`, `AutoPeftModelForCausalLM`, `save_pretrained` and
transformers' `load_adapter` support the adapter type `MOLE_STUDIO`. This is the only module that depends on PEFT's
internals.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft import PeftConfig, PeftType
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _maybe_include_all_linear_layers
from peft.utils import AuxiliaryTrainingWrapper, register_peft_method
from torch import nn

from mole.config import OF_RUNS, ROUTERS, AdapterConfig
from mole.config.router_params import TopKParams
from mole.core.errors import ConfigError, MoleError, MoleNotice
from mole.mixture.aux_gradient import AUX_LOSS_MODES
from mole.mixture.beside import check_biases, check_tokens, whole_modules
from mole.mixture.bypassed import bypassed_projections
from mole.mixture.coverage import coverage_notice
from mole.mixture.layer import PREFIX, MoleLinear, features, supports
from mole.mixture.quantised import limit_packing
from mole.mixture.routing_log import install_log, layer_index, remove_log
from mole.mixture.shared_input import SIBLINGS, InputGroup
from mole.mixture.shared_linears import copy_names as copy_names  # for other packages, which import this module first
from mole.mixture.shared_linears import share_linears, with_copies, without_copies
from mole.mixture.targets import (
    adaptable_modules,
    excluded_modules,
    layer_lists,
    narrow_targets,
    resolve_table,
    resolve_targets,
    without_bypassed,
)
from mole.mixture.targets import layer_place as layer_place  # for other packages, as above

METHOD_NAME = PREFIX.rstrip("_")


def add_peft_type(name: str) -> PeftType:
    """Add a member to `PeftType`. It is a closed enum, and PEFT (0.19 to 0.21) has no public way to extend it."""
    if name in PeftType.__members__:
        return PeftType[name]
    member = str.__new__(PeftType, name)
    member._name_, member._value_ = name, name
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    PeftType._member_names_.append(name)
    type.__setattr__(PeftType, name, member)  # from Python 3.12 on, members are found as attributes only
    return member


PEFT_TYPE = add_peft_type(METHOD_NAME.upper())


def config_fields() -> list[tuple[str, Any, Any]]:
    """The fields of `MoleConfig`: those of `AdapterConfig` and of every router; None means the router's default."""
    shared = [item for item in dataclasses.fields(AdapterConfig) if item.name not in OF_RUNS]
    declared: list[tuple[str, Any, Any]] = []
    for item in shared:
        start: dict[str, Any] = {"default": item.default}
        if item.default_factory is not dataclasses.MISSING:
            start = {"default_factory": item.default_factory}
        declared.append((item.name, item.type, dataclasses.field(**start, metadata=item.metadata)))
    names = {item.name for item in shared}
    for params in ROUTERS.values():
        for item in dataclasses.fields(params):
            if item.name not in names:
                names.add(item.name)
                optional = f"{item.type} | None"
                declared.append((item.name, optional, dataclasses.field(default=None, metadata=item.metadata)))
    return declared


HEADS = {"TOKEN_CLS": ["classifier", "score"], "QUESTION_ANS": ["qa_outputs"]}
"""Heads of tasks, which PEFT trains whole, but excludes from the targets only if the config names them beforehand."""
HEADS_OF_TASKS = ("classifier", "score", "qa_outputs")
"""What PEFT adds to the modules that are saved, whether a model has it or not."""


AUX_LOSS = (
    "How the auxiliary losses reach the gradient: in the loss that the model returns (in_loss), injected into its "
    "outputs (injected), the second where a Trainer does not use the first (auto), or not at all, since the loop adds "
    "mole.auxiliary_loss(model) (manual)."
)


TARGET_PARAMETERS = "Not supported: LoRA's setting for parameters that are no linear layers, such as 3-D experts."


def settle_renormalize(config: Any) -> None:
    """Give top-k's `renormalize` a value, so that the adapter's file says what its gate was trained with.

    A file without it is of an earlier version, which always renormalised; only files name their `peft_type`.
    """
    if config.router == TopKParams.name and config.renormalize is None:
        top_k = TopKParams().top_k if config.top_k is None else config.top_k
        config.renormalize = config.peft_type is not None or top_k != 1


def _post_init(self: Any) -> None:
    super(MoleConfig, self).__post_init__()
    settle_renormalize(self)
    self.peft_type = PEFT_TYPE
    if self.aux_loss not in AUX_LOSS_MODES:
        raise ConfigError("aux_loss", self.aux_loss, f"one of {', '.join(AUX_LOSS_MODES)}")
    if self.target_parameters:
        allowed = "empty: an adapter is beside linear layers, and how much its experts add depends on the token"
        raise ConfigError("adapter.target_parameters", self.target_parameters, allowed)
    if self.modules_to_save is None:
        self.modules_to_save = HEADS.get(getattr(self.task_type, "value", self.task_type))
    for name in ("target_modules", "exclude_modules", "modules_to_save"):
        if isinstance(names := getattr(self, name), set):
            setattr(self, name, sorted(names))
    values = {name: getattr(self, name) for name, _, _ in config_fields()}
    checked = AdapterConfig.from_flat(values).to_flat()
    for name in values.keys() & checked.keys():
        setattr(self, name, checked[name])


def _adapter(self: Any) -> AdapterConfig:
    """The settings as an `AdapterConfig`."""
    values = {name: getattr(self, name) for name, _, _ in config_fields()}
    if not isinstance(values["target_modules"], (str, list)):
        values["target_modules"] = sorted(values["target_modules"])
    return AdapterConfig.from_flat(values)


# Built from the dataclasses in `mole.config`, which declare every setting once, with its bounds and help.
MoleConfig: Any = dataclasses.make_dataclass(
    "MoleConfig",
    [
        *config_fields(),
        (
            "target_parameters",
            "list[str] | None",
            dataclasses.field(default=None, metadata={"help": TARGET_PARAMETERS}),
        ),
        ("aux_loss", "str", dataclasses.field(default="auto", metadata={"help": AUX_LOSS})),
    ],
    bases=(PeftConfig,),
    namespace={
        "__doc__": "PEFT configuration of a mixture of LoRA experts: settings of `AdapterConfig` and of its router.",
        "__module__": __name__,
        "__post_init__": _post_init,
        "adapter": _adapter,
    },
)


def mole_config(adapter: AdapterConfig, **peft_settings: Any) -> Any:
    """Create the `MoleConfig` of an `AdapterConfig`; `peft_settings` are those of PEFT, e.g. `task_type`."""
    values = {name: value for name, value in adapter.to_flat().items() if name not in OF_RUNS}
    return MoleConfig(**values, **peft_settings)


def num_layers(model: nn.Module) -> int:
    """Number of layers of a model, also where its configuration has another name for it (GPT-2: `n_layer`); or 1."""
    config: Any = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    return getattr(config, "num_hidden_layers", None) or 1


def group_siblings(model: nn.Module) -> None:
    """Put adapted projections that read the same input into one `InputGroup`, so that they compute together."""
    for parent in model.modules():
        for names in SIBLINGS:
            found = [layer for name in names if isinstance(layer := getattr(parent, name, None), MoleLinear)]
            if len(found) > 1 and len({layer.in_features for layer in found}) == 1:
                group = InputGroup(found)
                for layer in found:
                    layer.group = group


class MoleModel(BaseTuner):
    """The tuner: it replaces every targeted projection of a model by a `MoleLinear` around it."""

    prefix = PREFIX
    tuner_layer_cls = MoleLinear
    target_module_mapping: dict[str, list[str]] = {}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)  # PEFT 0.19 calls `model.forward`, which skips the routing log's hooks

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """What PEFT calls around each forward pass; without it `adapter_names` would be dropped unsaid."""
        if kwargs.get("adapter_names") is not None:
            raise MoleError(
                "adapter_names is not supported: a mixture of experts answers all rows of a batch with one adapter. "
                "Choose it with set_adapter(name), and pass the rows of each adapter by themselves."
            )
        yield

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        adapter: AdapterConfig = self._adapter.at(current_key)
        num_experts = adapter.experts_at(layer_index(current_key), num_layers(self.model))
        if isinstance(target, MoleLinear):
            target.add_adapter(adapter_name, adapter, num_experts, peft_config.inference_mode)
            return
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if not supports(base):
            raise ConfigError(
                "adapter.target_modules",
                current_key,
                f"a linear projection, not a {type(base).__name__}",
                "Name the projections to adapt, or use all-linear.",
            )
        layer = MoleLinear(target, *features(base))
        layer.name = current_key
        layer._active_adapter = adapter_name
        layer.add_adapter(adapter_name, adapter, num_experts, peft_config.inference_mode)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        config: Any = self.peft_config[adapter_name]
        self._resolve_targets(config, model)
        aside = {name: getattr(config, name) for name in ("exclude_modules", "layers_to_transform", "layers_pattern")}
        # The names say it all. PEFT would warn that nothing was excluded, and take an expert's number for a layer's.
        vars(config).update(dict.fromkeys(aside))
        self._adapter: AdapterConfig = config.adapter()
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        finally:
            vars(config).update(aside)
        if isinstance(config.target_modules, set):
            config.target_modules = sorted(config.target_modules)  # the order of a set differs between processes
        limit_packing(model, trains=not config.inference_mode)
        log = install_log(model)
        if not config.inference_mode:
            log.shared.aux_loss = config.aux_loss
            if notice := coverage_notice(model, adapter_name):
                warnings.warn(notice, MoleNotice, stacklevel=2)
        group_siblings(model)
        share_linears(model, adapter_name)
        for layer in model.modules():
            if isinstance(layer, MoleLinear):
                layer.log = log

    def _resolve_targets(self, config: Any, model: nn.Module) -> None:
        """Put names into the config for every pattern and list of layers; PEFT would run the patterns."""
        bypassed = {} if config.inference_mode else bypassed_projections(model)
        exclude = config.exclude_modules
        if bypassed and exclude:
            excluded = excluded_modules(exclude, adaptable_modules(model))
            bypassed = {name: reason for name, reason in bypassed.items() if name not in excluded}
        config.target_modules = resolve_targets(config.target_modules, model, bypassed)
        check_biases(config, model)
        if config.modules_to_save:
            heads = HEADS_OF_TASKS if config.task_type else ()
            config.modules_to_save = whole_modules(config.modules_to_save, model, heads)
        check_tokens(config, model)
        narrowed = exclude or config.layers_to_transform or config.modules_to_save
        by_name = bool(narrowed or config.rank_pattern or config.alpha_pattern)
        if isinstance(config.target_modules, str) and (bypassed or by_name):  # all-linear
            _maybe_include_all_linear_layers(config, model)
            config.target_modules = without_bypassed(config.target_modules, bypassed)
        if by_name:
            config.layers_pattern = layer_lists(config.layers_pattern, model)
            config.target_modules = narrow_targets(config.target_modules, config, model)
            config.exclude_modules = exclude and excluded_modules(exclude, adaptable_modules(model))
        for name in ("rank_pattern", "alpha_pattern"):
            if table := getattr(config, name):
                setattr(config, name, resolve_table(table, config.target_modules, f"adapter.{name}"))

    @classmethod
    def _get_adapter_state_dict(
        cls, model: nn.Module, config: Any, adapter_name: str, *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        """What PEFT saves of an adapter, from 0.21 on."""
        found = super()._get_adapter_state_dict(model, config, adapter_name, *args, **kwargs)
        # transformers, where it loads an adapter by itself, would report the copies as unexpected
        return with_copies(model, adapter_name, found) if any(isinstance(m, cls) for m in model.modules()) else found

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Any]
    ) -> dict[str, Any]:
        """What PEFT loads into an adapter, from 0.21 on; before, `MoleLinear` leaves the copies out."""
        own = without_copies(model, adapter_name, state_dict)
        mapped: dict[str, Any] = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, own)
        return mapped

    def _check_new_adapter_config(self, config: Any) -> None:
        super()._check_new_adapter_config(config)
        biased = [name for name, other in self.peft_config.items() if getattr(other, "bias", "none") != "none"]
        if biased and len(self.peft_config) > 1:
            raise MoleError(
                f"The adapter {biased[0]} trains biases of the base model itself, which all adapters of a model share: "
                "it can only be the model's one adapter. Load a base model for each."
            )

    def disable_adapter_layers(self) -> None:
        self._check_base_is_unchanged()
        super().disable_adapter_layers()

    def _check_base_is_unchanged(self) -> None:
        """Raise `MoleError` if the model without its adapters would not be the base model."""
        configs = self.peft_config.items()
        if biased := next((name for name, config in configs if getattr(config, "bias", "none") != "none"), None):
            raise MoleError(
                f"The adapter {biased} has trained biases of the base model itself, so that the model without it is "
                "not the base model. Load the base model beside it."
            )

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        if isinstance(child, AuxiliaryTrainingWrapper):  # unloaded; its weights are computed, and not its module's
            setattr(parent, child_name, new_module)
        else:
            super()._replace_module(parent, child_name, new_module, child)

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> Any:
        if merge:
            raise MoleError(
                "A mixture of experts cannot be merged into the base weights: how much each expert adds depends "
                "on the token. Save the adapter and load it beside the base model."
            )
        self._check_base_is_unchanged()
        unload: Any = super()._unload_and_optionally_merge
        unloaded = unload(merge, *args, **kwargs)
        remove_log(self.model)
        return unloaded

    def delete_adapter(self, adapter_name: str) -> None:
        self._check_base_is_unchanged()
        super().delete_adapter(adapter_name)
        layers = [layer for layer in self.model.modules() if isinstance(layer, MoleLinear)]
        if not any(layer.routers for layer in layers):  # they stay as they are, as LoRA's do
            remove_log(self.model)
            for layer in layers:
                layer.log = None

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        raise MoleError(
            "add_weighted_adapter is not supported: experts that are weighted for each token cannot be combined into "
            "one adapter. Use one adapter at a time, or train one on the data of both."
        )


if PEFT_TYPE not in PEFT_TYPE_TO_TUNER_MAPPING:
    register_peft_method(name=METHOD_NAME, config_cls=MoleConfig, model_cls=MoleModel, prefix=PREFIX)
