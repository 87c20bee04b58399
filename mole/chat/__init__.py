"""Chat: streamed replies with the routing of every token, and the cache of models that generate them.

`stream` generates one reply with a loaded model. `ModelCache` keeps several chat targets in memory, so that switching
between adapters of one base model does not load it again. The names below load torch on first use.
"""

from typing import TYPE_CHECKING

from mole.core.lazy import lazy_exports

if TYPE_CHECKING:
    from mole.chat.generate import Step, stream
    from mole.chat.model_cache import ModelCache
    from mole.chat.settings import ChatSettings

__all__ = ["ChatSettings", "ModelCache", "Step", "stream"]

__getattr__ = lazy_exports(
    __name__,
    {
        "ChatSettings": "mole.chat.settings",
        "ModelCache": "mole.chat.model_cache",
        "Step": "mole.chat.generate",
        "stream": "mole.chat.generate",
    },
)
