"""Multiple choice with the prompt read once for all its choices, beside a reading choice by choice.

Questions of the sample data with the right answer and three of other questions, scored by a base with a mixture.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator
from pathlib import Path

from common import Figure, awake, base, figure, in_turns, main, ratio, timed, with_experts
from transformers import AutoTokenizer

from mole import models
from mole.data import Example, read_examples
from mole.evaluation.scoring import score_families
from mole.models.loading import Loaded

DATA = Path(__file__).parents[1] / "assets" / "data" / "skills_heldout.jsonl"


def questions(count: int) -> list[list[Example]]:
    """Families of four: one prompt, four answers."""
    rows = read_examples(str(DATA), None, None).examples
    draw = random.Random(0)
    picked = draw.sample(rows, count)
    return [
        [row, *(row.with_target(other.target) for other in draw.sample([r for r in rows if r.target != row.target], 3))]
        for row in picked
    ]


def measure(options: argparse.Namespace) -> Iterator[Figure]:
    """Both ways on the same questions, and how far their scores are apart."""
    model = awake(with_experts(base(layers=options.layers), options.router)).eval()
    tokenizer = AutoTokenizer.from_pretrained(models.models_dir() / models.EMBEDDED)
    loaded = Loaded(model, tokenizer, "mixture", models.EMBEDDED, options.router)
    families = questions(options.questions)
    found: dict[str, list[list[float]]] = {}

    def together() -> None:
        scores = dict(score_families(loaded, families))
        found["together"] = [one.log_probs for place in range(len(families)) for one in scores[place] if one]

    def apart() -> None:
        scores = [dict(score_families(loaded, [[example]]))[0] for family in families for example in family]
        found["apart"] = [one.log_probs for (one,) in scores if one]

    seconds = in_turns({"together": timed(together), "apart": timed(apart)}, options.rounds, warm=0)
    about = f"{sorted(seconds['together'])[options.rounds // 2]:.1f} s for {len(families)} questions of 4 choices"
    yield ratio("choice by choice / prompt once", seconds["apart"], seconds["together"], ">= 2.50", about)
    gaps = [abs(sum(one) - sum(other)) for one, other in zip(found["together"], found["apart"], strict=True)]
    yield figure("largest difference of a score", [max(gaps)], "<= 1e-4")


if __name__ == "__main__":
    main(__doc__ or "", measure, router="dynmole", layers=30, questions=24, rounds=1)
