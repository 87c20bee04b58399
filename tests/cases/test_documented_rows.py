"""Every row in `docs/data.md` is read as it stands there, in the shape under which it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mole.data import read_examples

PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
ROWS = [line for block in re.findall(r"```jsonl\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines()]
HEADINGS = {
    "multiple choice": "Multiple choice", "messages": "Messages", "prompt/completion": "Prompt and completion",
    "instruction/input/output": "Instruction", "text": "Text",
}  # fmt: skip


@pytest.mark.parametrize("number", range(len(ROWS)))
def test_a_documented_row_is_read(number: int, tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text(ROWS[number], encoding="utf-8")
    found = read_examples(str(tmp_path / "d.jsonl"))
    assert (len(found.examples), found.rejected, found.ignored_columns) == (1, [], [])
    if "tools" not in ROWS[number]:
        before = PAGE[: PAGE.index(ROWS[number])]
        assert re.findall(r"^\*\*(.+?)\*\*:", before, re.MULTILINE)[-1] == HEADINGS[found.shape]


def test_every_shape_has_an_example() -> None:
    assert len(ROWS) >= 2 * len(HEADINGS)
