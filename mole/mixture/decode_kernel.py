"""One token on a CPU: an input group, base layers and adapters, as one compiled function, where this process has one.

So little is computed for one token that starting the operations takes most of the time, some sixty of them a layer. A
compiled function starts once. It takes the weights as inputs, so that one serves every layer of every model whose
adapters are of one `Recipe`. `aot_compile` makes the functions; nothing here does, and nothing waits for one.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from mole.mixture.grouped import pays
from mole.mixture.routers import Routing

if TYPE_CHECKING:
    from mole.mixture.shared_input import Stack

FUNCTIONS: dict[str, Callable[[list[Tensor]], list[Tensor]]] = {}
"""The functions of this process by their recipe: a token `(1, 1, in)` and the weights → outputs and routing."""


@dataclass(frozen=True)
class Recipe:
    """All that a function depends on; widths are free.

    Attributes:
        router, params: the method and its settings.
        experts, rank, scaling: of each adapter.
        biased: of each layer that reads the same input, whether its base has a bias.
        shared: names of the routers' linears that are one for all layers.
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
        """The recipe as JSON, always the same for the same recipe."""
        return json.dumps(asdict(self), sort_keys=True)


class Made(NamedTuple):
    """What a function gives: each layer's output `(1, 1, out)`, and the routing of `(1, 1, layers, E)`."""

    outputs: list[Tensor]
    routing: Routing


class OneToken:
    """What a stack gives to its function: the token and all weights, always in the same order."""

    def __init__(self, stack: Stack) -> None:
        self.stack = stack
        first, names = stack.router, stack.router.linears
        alone = [name for name in names if any(getattr(r, name) is not getattr(first, name) for r in stack.routers)]
        self.shared = tuple(name for name in names if name not in alone)
        others = [getattr(router, name) for router in stack.routers[1:] for name in alone]
        ups = [layer.experts[stack.adapter][1] for layer in stack.layers]
        self.linears = [*(getattr(first, name) for name in names), *others, *stack.downs, *ups, *stack.bases]
        self._held = [
            (module._parameters, name)
            for module in self.linears
            for name, value in module._parameters.items()
            if value is not None
        ]
        self._layer, self._router = stack.layers[0], stack.router
        self._recipe: Recipe | None = None
        self._noted: tuple[Any, ...] = ()
        self._text = ""

    def inputs(self, x: Tensor) -> list[Tensor]:
        """The token and the weights."""
        return [x, *(held[name] for held, name in self._held)]

    def settings(self) -> tuple[float, dict[str, Any]]:
        """What the answer depends on besides weights and dtypes, and what may be changed at any time."""
        return self._layer.scaling[self.stack.adapter], dict(vars(self._router.params))

    @property
    def recipe(self) -> Recipe | None:
        """Of the function there was use for; None before the first token, or when the settings are others now."""
        return self._recipe if self._noted[1:] == self.settings() else None

    def note(self, dtypes: list[torch.dtype]) -> None:
        """Take up the recipe for inputs of these dtypes; none where computing the chosen experts alone is quicker."""
        first, router, down = self._layer, self._router, self.stack.downs[0].weight
        self._recipe, self._text = None, ""
        token = torch.empty(1, 1, self.stack.sizes[0], dtype=dtypes[0])
        if not all(map(is_plain, self.stack.bases)) or pays(
            token, down, router.num_experts, router.max_active, self.stack.sizes
        ):
            return
        self._recipe = Recipe(
            router=router.params.name,
            params=asdict(router.params),
            experts=router.num_experts,
            rank=first.r[self.stack.adapter],
            scaling=first.scaling[self.stack.adapter],
            biased=tuple(base.bias is not None for base in self.stack.bases),
            shared=self.shared,
            dtypes=tuple(str(dtype).removeprefix("torch.") for dtype in dtypes),
        )
        self._text = self._recipe.text

    def __call__(self, x: Tensor) -> Made | None:
        """What the function makes of the token `x (1, 1, in)`; None where there is no function for it."""
        if self._layer.training or self._router.allowed is not None or len(self._layer.active_adapters) > 1:
            return None
        inputs = self.inputs(x)
        dtypes = [value.dtype for value in inputs]
        noted = (dtypes, *self.settings())
        if noted != self._noted:
            self._noted = noted
            self.note(dtypes)
        function = FUNCTIONS.get(self._text)
        if function is None or not all(map(is_plain, self.stack.bases)) or not all(map(Tensor.is_contiguous, inputs)):
            return None
        made = function(inputs)
        return Made(made[: self.stack.count], Routing(*made[self.stack.count :]))


def is_plain(base: nn.Module) -> bool:
    """Whether a base layer is a linear and nothing more: not quantised, with no hooks, not called in another way."""
    hooked = base._forward_hooks or base._forward_pre_hooks or "forward" in base.__dict__
    return type(base) is nn.Linear and type(base._parameters["weight"]) is nn.Parameter and not hooked


def applies(x: Tensor) -> bool:
    """Whether `x (…, in)` is one token that a compiled function may take."""
    return (
        x.dim() == 3
        and x.numel() == x.shape[-1]
        and x.device.type == "cpu"
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )
