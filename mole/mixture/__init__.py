"""The adapter: a mixture of LoRA experts beside each adapted projection, as a PEFT method.

`model` is the tuner and its `MoleConfig`, `layer` the adapted projection. A projection adds
`s · Σ_i w_i(x) · B_i A_i x` to its base: `routers` computes the weights w, one file for each method; `experts`,
`grouped` and `decode_kernel` are three ways to compute the sum, from which `fused_adapters` chooses; `shared_input`
lets projections that read the same input do it together. `routing_log` collects what the routers did, for `losses` and
`trace`; `steering` overrides them. The public names below load torch on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mole.core.lazy import lazy_exports

if TYPE_CHECKING:
    from mole.mixture.layer import MoleLinear
    from mole.mixture.model import MoleConfig
    from mole.mixture.routers import Routing, build_router
    from mole.mixture.routing_log import auxiliary_loss
    from mole.mixture.steering import Steering, steer
    from mole.mixture.trace import record_routing

__all__ = [
    "MoleConfig", "MoleLinear", "Routing", "Steering", "auxiliary_loss", "build_router", "record_routing", "steer",
]  # fmt: skip

__getattr__ = lazy_exports(
    __name__,
    {
        "MoleConfig": "mole.mixture.model",
        "MoleLinear": "mole.mixture.model",  # not `layer`, which PEFT's first import must not meet half-imported
        "Routing": "mole.mixture.routers",
        "Steering": "mole.mixture.steering",
        "auxiliary_loss": "mole.mixture.routing_log",
        "build_router": "mole.mixture.routers",
        "record_routing": "mole.mixture.trace",
        "steer": "mole.mixture.steering",
    },
)
