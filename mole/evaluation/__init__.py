"""Evaluation: metrics of a base model, a run or an adapter on a data file.

`evaluate` computes accuracy, exact match and perplexity from the log-likelihoods of `scoring`; `job` evaluates a run in
the background and keeps the results in its folder. The names below load torch on first use.
"""

from typing import TYPE_CHECKING

from mole.core.lazy import lazy_exports

if TYPE_CHECKING:
    from mole.evaluation.evaluate import evaluate_examples, evaluate_file

__all__ = ["evaluate_examples", "evaluate_file"]

__getattr__ = lazy_exports(
    __name__, {"evaluate_examples": "mole.evaluation.evaluate", "evaluate_file": "mole.evaluation.evaluate"}
)
