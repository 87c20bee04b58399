"""Preflight: checks before a run starts, so that it neither runs out of memory nor trains on the wrong data.

`estimate` tells memory, time and suggestions without running a step (built on `plan`, `memory_profile` and
`suggestions`), `dry_run` measures real steps, `job` runs both in the background, and `preview` shows the rows as the
model will see them. Importing the names below does not load torch.
"""

from typing import TYPE_CHECKING

from mole.core.lazy import lazy_exports

if TYPE_CHECKING:
    from mole.preflight.estimate import Estimate
    from mole.preflight.preview import Preview
    from mole.preflight.suggestions import MemorySuggestion

__all__ = ["Estimate", "MemorySuggestion", "Preview"]

__getattr__ = lazy_exports(
    __name__,
    {
        "Estimate": "mole.preflight.estimate",
        "MemorySuggestion": "mole.preflight.suggestions",
        "Preview": "mole.preflight.preview",
    },
)
