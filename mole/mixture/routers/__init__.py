"""Routers: from a token's input to its weights over the experts, one file and one class for each method.

Notation in the docstrings: E experts, `p = softmax(x Wᵀ)` with the gate's weight `W (E, in)`. The settings of a method
are the fields of its dataclass in `mole.config.router_params`, where its title and paper are too.
"""

from __future__ import annotations

from typing import Any

from mole.config import build_settings, params_class
from mole.core.errors import ConfigError
from mole.mixture.routers.adamole import AdaMoLERouter
from mole.mixture.routers.base import Choice, Router, Routing, entropies_of, entropy_of, shannon_entropy
from mole.mixture.routers.dense import DenseRouter
from mole.mixture.routers.dynmole import DynMoLERouter
from mole.mixture.routers.lora import LoraRouter
from mole.mixture.routers.sparsegen import SparsegenRouter
from mole.mixture.routers.threshold import ThresholdRouter
from mole.mixture.routers.topk import TopKRouter
from mole.mixture.routers.topp import TopPRouter

__all__ = [
    "LINEARS", "ROUTER_CLASSES", "Choice", "Router", "Routing", "build_router", "entropies_of", "entropy_of",
    "shannon_entropy",
]  # fmt: skip

ROUTER_CLASSES: dict[str, type[Router[Any]]] = {
    "dynmole": DynMoLERouter,
    "adamole": AdaMoLERouter,
    "topk": TopKRouter,
    "topp": TopPRouter,
    "threshold": ThresholdRouter,
    "dense": DenseRouter,
    "sparsegen": SparsegenRouter,
    "lora": LoraRouter,
}

LINEARS = tuple(sorted({name for router in ROUTER_CLASSES.values() for name in router.linears}))
"""Names of the linear layers of all routers."""


def build_router(name: str, in_features: int, num_experts: int, **params: Any) -> Router[Any]:
    """Create the router `name`, a module that maps `x (…, in_features)` to a `Routing` of `(…, num_experts)`.

    Args:
        name: one of `ROUTER_CLASSES`.
        in_features: width of the input.
        num_experts: number of experts, at least 1.
        params: the method's settings; its defaults for those not given.

    Raises:
        ConfigError: the name is unknown, `num_experts` is below 1, or a setting is outside its bounds.
        InputError: the router has no such setting.
    """
    if isinstance(num_experts, bool) or not isinstance(num_experts, int) or num_experts < 1:
        raise ConfigError("adapter.num_experts", num_experts, "a whole number of at least 1")
    settings = build_settings(params_class(name), params, "adapter")
    return ROUTER_CLASSES[name](in_features, num_experts, settings)
