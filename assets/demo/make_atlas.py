"""Compute the atlas of the demo adapter over the held-out rows of its sample data, which the Atlas tab shows at once.

    python assets/demo/make_atlas.py

Run it from the repository's root; it takes about four minutes of a CPU core. Writes `atlas.json` beside this file.
"""

from __future__ import annotations

from pathlib import Path

from mole.analysis.atlas import build_atlas, read_corpus
from mole.analysis.atlas.stored import write_atlas
from mole.core import checkpoint
from mole.models.adapter_files import WEIGHTS
from mole.runs.targets import load_target

HERE = Path(__file__).resolve().parent
HELD_OUT = "assets/data/skills_heldout.jsonl"


def main() -> None:
    """Compute, name the adapter that it is of, and write."""
    atlas = build_atlas(load_target(str(HERE)), read_corpus(HELD_OUT, by=["skill"]), report=print)
    atlas |= {"target": "demo", "adapter": checkpoint.sha256(HERE / "adapter" / WEIGHTS)}
    write_atlas(HERE / "atlas.json", atlas)


if __name__ == "__main__":
    main()
