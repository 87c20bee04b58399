"""MoLE Studio's library: mixtures of LoRA experts for PEFT.

Importing it registers the adapter type with PEFT, so that `PeftModel.from_pretrained` and its kin load a mixture. The
registration waits until PEFT itself is imported, before or after: the command line and the studio's page must start
without waiting seconds for torch. The names below are loaded on first use for the same reason.
"""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING

from wrapt import register_post_import_hook

from mole.core.lazy import lazy_exports

if TYPE_CHECKING:
    from mole.mixture.model import MoleConfig
    from mole.mixture.routers import Routing, build_router
    from mole.mixture.routing_log import auxiliary_loss
    from mole.mixture.steering import steer
    from mole.mixture.trace import record_routing

__all__ = ["MoleConfig", "Routing", "auxiliary_loss", "build_router", "record_routing", "steer"]
__version__ = "0.1.0"

__getattr__ = lazy_exports(
    __name__,
    {
        "MoleConfig": "mole.mixture.model",
        "Routing": "mole.mixture.routers",
        "auxiliary_loss": "mole.mixture.routing_log",
        "build_router": "mole.mixture.routers",
        "record_routing": "mole.mixture.trace",
        "steer": "mole.mixture.steering",
    },
)

register_post_import_hook(lambda _: importlib.import_module("mole.mixture.model"), "peft")

# PEFT imports bitsandbytes, which on a CPU with AVX512-BF16 warns that an optional kernel is not installed. Without a
# handler, Python would print the record to stderr in the middle of a command's output; handlers of the application
# still receive it.
logging.getLogger("bitsandbytes").addHandler(logging.NullHandler())
