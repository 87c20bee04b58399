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
    from mole.mixture import MoleConfig, Routing, auxiliary_loss, build_router, record_routing, steer

__all__ = ["MoleConfig", "Routing", "auxiliary_loss", "build_router", "record_routing", "steer"]
__version__ = "0.1.0"

__getattr__ = lazy_exports(__name__, dict.fromkeys(__all__, "mole.mixture"))

register_post_import_hook(lambda _: importlib.import_module("mole.mixture.model"), "peft")

# PEFT imports bitsandbytes, which on a CPU with AVX512-BF16 warns that an optional kernel is not installed. Without a
# handler, Python would print the record to stderr in the middle of a command's output; handlers of the application
# still receive it.
logging.getLogger("bitsandbytes").addHandler(logging.NullHandler())
