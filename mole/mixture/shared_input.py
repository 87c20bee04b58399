"""Projections that read the same input, such as q, k and v or gate and up, compute their adapters together."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mole.mixture.decode_kernel import KernelSpec
from mole.mixture.experts import is_transformed
from mole.mixture.fused_adapters import AdaptedLayer, AdapterOutput, FusedAdapters
from mole.mixture.own_linears import is_hooked

SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Names of projections that models call one after another with the same tensor."""


class SharedCall(NamedTuple):
    """What must be the same for a sibling to take the output kept for it: the very tensor, and how it is computed."""

    x: Tensor
    writes: int
    settings: tuple[Any, ...]

    def matches(self, other: SharedCall) -> bool:
        """Whether the outputs of one call are those of the other."""
        return self.x is other.x and self.writes == other.writes and self.settings == other.settings


class KeptOutputs(threading.local):
    """What the first projection of a group has computed for its siblings. Each thread has its own: threads that call
    one model at the same time must not take each other's outputs.

    Attributes:
        call: the call that the outputs belong to.
        outputs: by the id of the layer they are kept for.
    """

    def __init__(self) -> None:
        self.call: SharedCall | None = None
        self.outputs: dict[int, AdapterOutput] = {}


class InputGroup:
    """The adapted projections that read the same input; a single one if it has no siblings.

    The first projection of the group computes the adapters of all. Each of the others takes the output kept for it, if
    it is called with the very same tensor, and computes on its own if not. Once all have been called nothing is kept.
    """

    def __init__(self, layers: Sequence[AdaptedLayer]) -> None:
        self.layers = list(layers)
        self._kept = KeptOutputs()
        self._fused: dict[tuple[str, int], FusedAdapters] = {}

    def __getstate__(self) -> list[AdaptedLayer]:
        """The group of a copied or pickled model is one of the copied layers, and keeps nothing."""
        return self.layers

    def __setstate__(self, layers: list[AdaptedLayer]) -> None:
        self.layers, self._kept, self._fused = layers, KeptOutputs(), {}

    def output(self, layer: AdaptedLayer, adapter: str, x: Tensor) -> AdapterOutput:
        """The output of `layer`'s adapter for the input `x (…, in)`."""
        log = layer.log if layer.log is not None and (layer.training or layer.log.listeners) else None
        if is_transformed():
            # Nothing is kept, so that the layers do not differ and all of them run one compiled graph.
            return FusedAdapters([layer], adapter).outputs(x, log)[0]
        if len(self.layers) == 1:
            return self.fused([layer], adapter).outputs(x, log)[0]
        kept = self._kept
        call = SharedCall(x, write_count(x), (adapter, layer.training, torch.is_grad_enabled(), log))
        if layer is self.layers[0]:
            siblings = [other for other in self.layers[1:] if can_fuse(layer, other, adapter)]
            own, *rest = self.fused([layer, *siblings], adapter).outputs(x, log)
            kept.outputs = {id(sibling): output for sibling, output in zip(siblings, rest, strict=True)}
            kept.call = call if rest else None
            return own
        output = kept.outputs.pop(id(layer), None)
        valid = output is not None and kept.call is not None and call.matches(kept.call)
        if not (valid and kept.outputs):
            kept.call, kept.outputs = None, {}
        return output if output is not None and valid else self.fused([layer], adapter).outputs(x, log)[0]

    def fused(self, layers: Sequence[AdaptedLayer], adapter: str) -> FusedAdapters:
        """The fused adapters of `layers`, built again only if an adapter or a base layer was replaced."""
        key = (adapter, id(layers[0]) if len(layers) == 1 else -len(layers))
        found = self._fused.get(key)
        if found is None or not found.is_of(layers):
            for layer in layers:
                layer.use_registered_linears(adapter)
            found = self._fused[key] = FusedAdapters(layers, adapter)
        return found

    def kernel_specs(self) -> list[KernelSpec]:
        """The specs of the decode kernels that the tokens decoded so far could have used."""
        specs = [fused.decode_call.spec for fused in list(self._fused.values())]
        return [spec for spec in specs if spec is not None]

    def drop_adapter(self, adapter: str) -> None:
        """Drop what refers to an adapter that was deleted."""
        self._kept = KeptOutputs()  # that of all threads
        self._fused = {key: fused for key, fused in self._fused.items() if fused.adapter != adapter}


def write_count(x: Tensor) -> int:
    """How often a tensor was written in place; 0 for tensors of inference mode, which do not count it."""
    return 0 if x.is_inference() else x._version


def can_fuse(first: AdaptedLayer, layer: AdaptedLayer, adapter: str) -> bool:
    """Whether the adapters of one name in two layers have the same routing rule, number and kind of experts.

    It is False where the weights of `layer` may be there only during its call: hooks on it may be what provides them,
    and where FSDP has sharded them they are flat.
    """
    if adapter not in layer.routers or layer.disable_adapters or layer.active_adapters != first.active_adapters:
        return False
    if is_hooked(layer):  # type: ignore[arg-type]
        return False
    router, other = first.routers[adapter], layer.routers[adapter]
    down, other_down = first.experts[adapter][0].weight, layer.experts[adapter][0].weight
    return (
        type(router) is type(other)
        and router.num_experts == other.num_experts
        and vars(router.params) == vars(other.params)
        and router.allowed is None
        and other.allowed is None
        and first.r[adapter] == layer.r[adapter]
        and first.scaling[adapter] == layer.scaling[adapter]
        and first.dropout[adapter] == layer.dropout[adapter]
        and down.dtype == other_down.dtype
        and down.dim() == other_down.dim()
        and first.training == layer.training
    )
