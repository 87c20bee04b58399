"""Texts for people: counts, sizes and durations in their units, errors on one line."""

from __future__ import annotations

import pytest

from mole.core import text


@pytest.mark.parametrize(
    ("count", "words"), [(134_515_008, "135 M"), (999_885_952, "1.0 B"), (8_190_735_360, "8.2 B"), (33_216, "33,216")]
)
def test_parameters_are_said_in_the_unit_that_suits_them(count: int, words: str) -> None:
    assert text.count_text(count) == words
