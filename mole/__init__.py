"""MoLE Studio's library: mixtures of LoRA experts for PEFT.

Importing it makes PEFT know the adapter type, so that `PeftModel.from_pretrained` and its kin load a mixture. It
does so the moment PEFT itself is imported, before or after: the command line and the studio's page must start
without waiting seconds for torch. The names below are loaded on first use for the same reason.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from wrapt import register_post_import_hook

if TYPE_CHECKING:
    from mole.routing import auxiliary_loss
    from mole.trace import record_routing
    from mole.tuner import MoleConfig

__all__ = ["MoleConfig", "auxiliary_loss", "record_routing"]
__version__ = "0.1.0"

_HOMES = {"MoleConfig": "mole.tuner", "auxiliary_loss": "mole.routing", "record_routing": "mole.trace"}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'mole' has no attribute {name!r}")


register_post_import_hook(lambda _: importlib.import_module("mole.tuner"), "peft")
