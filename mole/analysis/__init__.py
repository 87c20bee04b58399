"""Analysis: the history of a run, alarms about its routing, and comparisons between runs.

`history` reads a run's events for the live view, `health` raises alarms from its routing statistics, `run_metrics`
collects its final numbers, `compare` compares runs and `tables` formats the comparison. Does not import torch.
"""

from typing import TYPE_CHECKING

from mole.core.lazy import lazy_exports

if TYPE_CHECKING:
    from mole.analysis.compare import Comparison
    from mole.analysis.health import Alarm, alarms
    from mole.analysis.history import History
    from mole.analysis.run_metrics import RunMetrics, read_metrics

__all__ = ["Alarm", "Comparison", "History", "RunMetrics", "alarms", "read_metrics"]

__getattr__ = lazy_exports(
    __name__,
    {
        "Alarm": "mole.analysis.health",
        "Comparison": "mole.analysis.compare",
        "History": "mole.analysis.history",
        "RunMetrics": "mole.analysis.run_metrics",
        "alarms": "mole.analysis.health",
        "read_metrics": "mole.analysis.run_metrics",
    },
)
