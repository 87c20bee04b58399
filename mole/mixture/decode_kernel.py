"""Decode kernels: one token on a CPU, with base layers, routers and experts computed by one compiled function.

One token is so little work that launching the operations, some sixty for each layer, takes most of the time. A kernel
is launched once. It takes the weights as inputs, so one kernel serves every layer of every model whose adapters have
the same `KernelSpec`. This module calls the kernels of this process and never waits for one; `aot_compile` makes them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from mole.mixture.experts import is_transformed
from mole.mixture.grouped import grouped_is_faster
from mole.mixture.own_linears import has_own_hooks
from mole.mixture.routers import Router, Routing

KERNELS: dict[str, Callable[[list[Tensor]], list[Tensor]]] = {}
"""The kernels of this process by the text of their spec. A kernel maps a token `(1, 1, in)` and the weights to the
outputs `(1, 1, out)` of L layers and the fields of their `Routing` `(1, 1, L, …)`."""


@dataclass(frozen=True)
class KernelSpec:
    """All that a kernel depends on. Input and output widths are free.

    Attributes:
        router, params: the routing method and its settings.
        experts, rank, scaling: of each adapter.
        biased: for each layer, whether its base has a bias.
        shared: names of the routers' linear layers that the layers share.
        dtypes: of the token and of each weight.
    """

    router: str
    params: dict[str, Any]
    experts: int
    rank: int
    scaling: float
    biased: tuple[bool, ...]
    shared: tuple[str, ...]
    dtypes: tuple[str, ...]

    @property
    def text(self) -> str:
        """The spec as JSON; equal specs have equal texts."""
        return json.dumps(asdict(self), sort_keys=True)


class KernelOutput(NamedTuple):
    """What a kernel computes: each layer's output `(1, 1, out)`, base included, and the routing `(1, 1, L, E)`."""

    outputs: list[Tensor]
    routing: Routing


class DecodableAdapters(Protocol):
    """What a kernel computes: the adapters of one name in L layers that read the same input.

    Attributes:
        routers, downs, ups, bases: of each layer the router, A, B and the base layer.
        widths: the input width, and each layer's output width.
    """

    routers: list[Router[Any]]
    downs: list[nn.Linear]
    ups: list[nn.Linear]
    bases: list[nn.Module]
    widths: tuple[int, ...]

    @property
    def scaling(self) -> float:
        """alpha / r, which may be changed at any time."""


class DecodeCall:
    """Calls the kernel that fits some adapters, with the token and all weights, always in the same order.

    There must be no hooks of all modules, nor hooks of the adapters' own linear layers.
    """

    def __init__(self, adapters: DecodableAdapters) -> None:
        self.adapters, self.router = adapters, adapters.routers[0]
        routers, names = adapters.routers, self.router.linears
        own = [name for name in names if any(getattr(r, name) is not getattr(self.router, name) for r in routers)]
        self.shared = tuple(name for name in names if name not in own)
        others = [getattr(router, name) for router in routers[1:] for name in own]
        first = [getattr(self.router, name) for name in names]
        self.modules: list[Any] = [*first, *others, *adapters.downs, *adapters.ups, *adapters.bases]
        # Parameters are looked up at every call, since training or loading may replace them. Going through the modules'
        # dictionaries skips `nn.Module.__getattr__`, which would take longer than the kernel.
        self._parameters = [
            (module._parameters, name)
            for module in self.modules
            for name, value in module._parameters.items()
            if value is not None
        ]
        # The dtypes and settings, the spec for them, and its text; replaced as one, since threads may share the model.
        self._checked: tuple[tuple[Any, ...], KernelSpec | None, str] = ((), None, "")

    def inputs(self, x: Tensor) -> list[Tensor]:
        """The inputs of the kernel: the token `x (1, 1, in)` and the weights."""
        return [x, *(parameters[name] for parameters, name in self._parameters)]

    def settings(self) -> tuple[float, dict[str, Any]]:
        """What the result depends on besides weights and dtypes; it may be changed at any time."""
        return self.adapters.scaling, dict(vars(self.router.params))

    @property
    def spec(self) -> KernelSpec | None:
        """The spec of the kernel that the last token could have used; None without one, or if settings have changed."""
        checked, spec, _ = self._checked
        return spec if checked[1:] == self.settings() else None

    def __call__(self, x: Tensor) -> KernelOutput | None:
        """Compute the token `x (1, 1, in)`; None if there is no kernel for it."""
        inputs = self.inputs(x)
        dtypes = [value.dtype for value in inputs]
        wanted = (dtypes, *self.settings())
        checked, _, text = self._checked
        if checked != wanted:
            spec = self._make_spec(dtypes)
            text = "" if spec is None else spec.text
            self._checked = wanted, spec, text
        kernel = KERNELS.get(text)
        bases = self.adapters.bases
        if kernel is None or not all(map(is_plain_linear, bases)) or not all(map(Tensor.is_contiguous, inputs)):
            return None
        values = kernel(inputs)
        return KernelOutput(values[: len(bases)], Routing(*values[len(bases) :]))

    def _make_spec(self, dtypes: list[torch.dtype]) -> KernelSpec | None:
        """The spec for inputs of these dtypes; None where a kernel cannot be used or would not be the fastest way."""
        adapters, router, down = self.adapters, self.router, self.adapters.downs[0].weight
        token = torch.empty(1, 1, adapters.widths[0], dtype=dtypes[0])
        if not all(map(is_plain_linear, adapters.bases)):
            return None
        if grouped_is_faster(token, down, router.num_experts, router.max_active, adapters.widths):
            return None
        return KernelSpec(
            router=router.params.name,
            params=asdict(router.params),
            experts=router.num_experts,
            rank=len(down) // router.num_experts,
            scaling=adapters.scaling,
            biased=tuple(base.bias is not None for base in adapters.bases),
            shared=self.shared,
            dtypes=tuple(str(dtype).removeprefix("torch.") for dtype in dtypes),
        )


def is_plain_linear(base: nn.Module) -> bool:
    """Whether a base layer computes x Wᵀ + b and nothing else: not quantised, no hooks of its own."""
    return type(base) is nn.Linear and type(base._parameters["weight"]) is nn.Parameter and not has_own_hooks(base)


def is_decode_step(x: Tensor) -> bool:
    """Whether `x (…, in)` is a single token that a kernel may compute: on a CPU, without gradients or autocast."""
    return (
        x.dim() == 3
        and x.numel() == x.shape[-1]
        and x.device.type == "cpu"
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not is_transformed()
    )
