"""The adapted projection: a linear layer of the base model with a mixture of LoRA experts beside it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch.utils.checkpoint import _CachedTorchDispatchMode, _CachingTorchDispatchMode
from transformers.pytorch_utils import Conv1D

from mole.config import AdapterConfig
from mole.core.errors import MoleError
from mole.mixture.experts import is_transformed, stacked_experts
from mole.mixture.fused_adapters import AdapterOutput
from mole.mixture.own_linears import is_hooked
from mole.mixture.routers import LINEARS, Router, build_router
from mole.mixture.routing_log import RoutingLog
from mole.mixture.shared_input import InputGroup

PREFIX = "mole_studio_"


class MoleLinear(nn.Module, BaseTunerLayer):
    """`y = base(x) + s · Σ_i w_i(x) · B_i A_i x`, with one router and E experts for each adapter.

    Shape: `x (…, in)` → `(…, out)`, in the base layer's dtype.

    PEFT finds the weights of an adapter in the `ModuleDict`s named `mole_studio_…`, with the adapter's name second to
    last in every key. The routers' linear layers are held there too; `routers` and `experts` refer to the same modules.

    Attributes:
        routers, experts, scaling, dropout, r, num_experts: by adapter; `experts` are the modules of A and B.
        shared: by adapter, the projection that owns a linear layer of the router, by the name of the layer.
        log: the model's routing log; None until the adapter is injected.
        name: the projection's full name in the model.
        group: the projections that read the same input.
    """

    mole_studio_A: nn.ModuleDict
    mole_studio_B: nn.ModuleDict
    adapter_layer_names = (f"{PREFIX}A", f"{PREFIX}B", *(PREFIX + name for name in LINEARS))
    other_param_names = ("routers", "experts", "shared", "scaling", "dropout", "r", "num_experts")

    def __init__(self, base_layer: nn.Module, in_features: int, out_features: int) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.in_features, self.out_features = in_features, out_features
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self.routers: dict[str, Router[Any]] = {}
        self.experts: dict[str, tuple[nn.Linear, nn.Linear]] = {}
        self.shared: dict[str, dict[str, MoleLinear]] = {}
        self.scaling: dict[str, float] = {}
        self.dropout: dict[str, float] = {}
        self.r: dict[str, int] = {}
        self.num_experts: dict[str, int] = {}
        self.log: RoutingLog | None = None
        self.name = ""
        self.group = InputGroup([self])
        for name in self.adapter_layer_names:
            setattr(self, name, nn.ModuleDict())

    def add_adapter(self, adapter_name: str, adapter: AdapterConfig, num_experts: int, inference_mode: bool) -> None:
        """Add an adapter of `num_experts` fresh experts, which leave the output unchanged."""
        router = build_router(adapter.router, self.in_features, num_experts, **vars(adapter.params))
        down, up = stacked_experts(self.in_features, self.out_features, num_experts, adapter.r)
        self.routers[adapter_name], self.experts[adapter_name] = router, (down, up)
        self.scaling[adapter_name] = adapter.scaling
        self.dropout[adapter_name] = adapter.lora_dropout
        self.r[adapter_name], self.num_experts[adapter_name] = adapter.r, num_experts
        getattr(self, f"{PREFIX}A")[adapter_name] = down
        getattr(self, f"{PREFIX}B")[adapter_name] = up
        for name in router.linears:
            getattr(self, PREFIX + name)[adapter_name] = getattr(router, name)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self.group.drop_adapter(adapter_name)
        if self.log is not None and not self.routers:
            self.log.shared.layer_left, self.log = True, None

    def share_linear(self, adapter_name: str, name: str, owner: MoleLinear) -> None:
        """Use the router's linear layer `name` of the projection `owner` in place of an own one."""
        self.shared.setdefault(adapter_name, {})[name] = owner
        del getattr(self, PREFIX + name)[adapter_name]
        setattr(self.routers[adapter_name], name, getattr(owner.routers[adapter_name], name))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Leave out the copies of shared linear layers, which the owner loads. See `shared_linears`."""
        copied = tuple(f"{prefix}{PREFIX}{name}.{adapter}." for adapter, names in self.shared.items() for name in names)
        for key in [key for key in state_dict if copied and key.startswith(copied)]:
            del state_dict[key]
        super()._load_from_state_dict(state_dict, prefix, *args)

    def own_linears(self, adapter_name: str) -> list[Mapping[str, Any]]:
        """Where an adapter's A, B and the linear layers of its router are registered: dictionaries by adapter."""
        names, shared = ("A", "B", *self.routers[adapter_name].linears), self.shared.get(adapter_name, {})
        holders = [shared.get(name, self)._modules[PREFIX + name] for name in names]
        return [holder._modules for holder in holders if holder is not None]

    def lent(self, adapter_name: str) -> Collection[str]:
        """Names of the linear layers of an adapter's router that another projection owns."""
        return self.shared.get(adapter_name, ())

    def use_registered_linears(self, adapter_name: str) -> None:
        """Let `experts` and the router refer to the modules that are registered: FSDP, for one, replaces them."""
        down, up, *others = (place[adapter_name] for place in self.own_linears(adapter_name))
        self.experts[adapter_name] = down, up
        router = self.routers[adapter_name]
        for name, module in zip(router.linears, others, strict=True):
            if getattr(router, name) is not module:
                setattr(router, name, module)

    def _replicate_for_data_parallel(self) -> MoleLinear:
        """The copy for one of the devices of `nn.DataParallel`, which gets its modules afterwards.

        Raises:
            MoleError: it shares a linear layer, whose copy cannot be told from the copies for other devices.
        """
        if self.shared:
            raise MoleError(
                "nn.DataParallel is not supported with LD-MoLE, whose layers share a network: use "
                "DistributedDataParallel (torchrun, or accelerate launch), or a single device."
            )
        replica: MoleLinear = super()._replicate_for_data_parallel()
        routers: dict[str, Any] = self.routers
        replica.routers = {name: router._replicate_for_data_parallel() for name, router in routers.items()}
        replica.experts, replica.group = dict(self.experts), InputGroup([replica])
        return replica

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.disable_adapters:
            return self.base_layer(x, *args, **kwargs)
        outputs = {name: self.adapter_output(name, x) for name in self.active_adapters if name in self.routers}
        for output in outputs.values():
            if output.complete:  # a decode kernel has computed the base layer too
                return output.hidden
        result = self.base_layer(x, *args, **kwargs)
        for name, output in outputs.items():
            result = output.add_to(result, self.experts[name][1], self.scaling[name], in_place=self.owns_result)
        return result

    def adapter_output(self, adapter_name: str, x: Tensor) -> AdapterOutput:
        """Route `x (…, in)` and apply A, together with the projections that read the same input; log the routing."""
        output = self.group.output(self, adapter_name, x)
        if self.log is not None and output.log_entry is not None:
            self.log.add(self.name, self.routers[adapter_name], output.log_entry)
        return output

    def down(self, adapter_name: str) -> Tensor:
        """A of an adapter, `(E·r, in)`."""
        return self.experts[adapter_name][0].weight

    def up(self, adapter_name: str) -> Tensor:
        """B of an adapter, `(out, E·r)`."""
        return self.experts[adapter_name][1].weight

    @property
    def owns_result(self) -> bool:
        """Whether nothing else refers to the base layer's output, so that it may be written into: no hooks, not
        quantised. A backward hook makes the output a view, which autograd lets nobody write into."""
        base: Any = self._modules["base_layer"]  # skips `nn.Module.__getattr__`, which is slow
        if type(base) is not nn.Linear or is_transformed() or is_hooked(base):
            return False
        return not (torch.is_grad_enabled() and outputs_are_cached())

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise MoleError(
            "A mixture of experts cannot be merged into the base weights: how much each expert adds depends on "
            "the token. Keep the adapter beside the base model."
        )

    def unmerge(self) -> None:
        raise MoleError("There is nothing to unmerge: a mixture of experts is never merged.")

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return False

    def __repr__(self) -> str:
        return "mole." + super().__repr__()


def outputs_are_cached() -> bool:
    """Whether selective checkpointing keeps the outputs of operations, to take them again in the backward pass."""
    caching = (_CachingTorchDispatchMode, _CachedTorchDispatchMode)
    return any(isinstance(mode, caching) for mode in _get_current_dispatch_mode_stack())


QUANTISED_WEIGHTS = ("qweight", "W_q", "codes", "weight_scales")
"""Where the quantised linear layers that are no `nn.Linear` keep their weights: GPTQ and AWQ, HQQ, AQLM, EETQ."""


def supports(module: nn.Module) -> bool:
    """Whether a module can be adapted: a linear layer, also a quantised one, or GPT-2's `Conv1D`."""
    if isinstance(module, (nn.Linear, Conv1D)):
        return True
    return hasattr(module, "in_features") and any(hasattr(module, name) for name in QUANTISED_WEIGHTS)


def features(module: nn.Module) -> tuple[int, int]:
    """`(in, out)` of a projection. GPT-2's `Conv1D` stores its weight as `(in, out)`."""
    if isinstance(module, Conv1D):
        weight: torch.Tensor = module.weight
        return weight.shape[0], weight.shape[1]
    return int(module.in_features), int(module.out_features)  # type: ignore[arg-type]
