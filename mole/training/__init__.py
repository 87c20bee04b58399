"""Training: one run from its settings to its adapter, in a process of its own.

`worker` is that process: it waits for the device and calls `trainer.train`, which logs through `callbacks`, keeps what
a checkpoint needs in `state`, and only continues a run that `resume` finds unchanged. The names below load torch on
first use, except `count_steps`.
"""

from typing import TYPE_CHECKING

from mole.core.lazy import lazy_exports

if TYPE_CHECKING:
    from mole.training.steps import count_steps
    from mole.training.trainer import MoleTrainer, build_trainer, train

__all__ = ["MoleTrainer", "build_trainer", "count_steps", "train"]

__getattr__ = lazy_exports(
    __name__,
    {
        "MoleTrainer": "mole.training.trainer",
        "build_trainer": "mole.training.trainer",
        "count_steps": "mole.training.steps",
        "train": "mole.training.trainer",
    },
)
