"""Patterns from outside: RE2 matches as Python would, and what is left for Python to match is literal."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mole.core import limits
from mole.core.errors import ConfigError
from mole.core.patterns import any_of, check_names, check_plain, compile_pattern

NAMES = [
    "model", "lm_head", "model.embed_tokens", "model.norm",
    *(f"model.layers.{layer}" for layer in (0, 1, 2, 10, 11, 20)),
    *(f"model.layers.{layer}.self_attn.{name}_proj" for layer in (0, 1, 2, 10, 11, 20) for name in "qkvo"),
    *(f"model.layers.{layer}.mlp.{name}_proj" for layer in (0, 1, 2, 10, 11, 20) for name in ("up", "down", "gate")),
]  # fmt: skip
PIECES = st.sampled_from(
    [
        ".*", r"\.", r"\d+", "[0-9]", "(q|k|v|o)_proj", "(?:up|down)_proj", "model", "layers", "self_attn", "mlp",
        ".", ".+?", "(.*\\.)?", "[a-z_]+", "1[0-9]", r"\w*", "(?P<layer>[12])", "x?", "[^.]*", "_proj$", "^model",
        "proj", "lm_head", "(0|1)", r"[01]\b", "(?:10|20)", "l{0,2}", "a{1,3}", "",
    ]
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(st.one_of(st.lists(PIECES, max_size=6), st.lists(PIECES, max_size=3).map(lambda parts: [*parts, "|", *parts])))
def test_re2_matches_the_names_that_python_matches(pieces: list[str]) -> None:
    pattern = "".join(pieces)
    if pattern.count("(?P<layer>") > 1:
        return
    theirs, ours = re.compile(pattern), compile_pattern(pattern, "x")
    for name in NAMES:
        assert bool(ours.fullmatch(name)) == bool(theirs.fullmatch(name)), (pattern, name)
        assert bool(ours.match(name)) == bool(theirs.match(name)), (pattern, name)
        assert bool(ours.search(name)) == bool(theirs.search(name)), (pattern, name)


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        (r"(?=.*q)a", "no lookahead and no backreference"), (r"(a)\1", "no lookahead and no backreference"),
        (r"(?<!a)b", "no lookahead"), ("[", "missing ]"), ("*", "repetition"), ("(a", "missing )"),
        ("a)|(b", "RE2 says"),
        ("a{,3}", "{0,n}"), ("a" * (limits.PATTERN + 1), str(limits.PATTERN)), ("(.?){1000}", "too large"),
        ("((a{99}){99}){99}", "repetition"), ("\ud800", "Unicode"),
    ],
)  # fmt: skip
def test_what_is_not_re2_is_refused_in_one_line_with_what_is_allowed(
    pattern: str, said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError, match="adapter.target_modules is .* must be a pattern") as caught:
        compile_pattern(pattern, "adapter.target_modules")
    assert said in str(caught.value) and "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")  # RE2 logs to stderr by itself


def test_a_key_that_is_a_pattern_only_within_another_is_refused() -> None:
    with pytest.raises(ConfigError):
        compile_pattern("a)|(b", "rank_pattern", r"(.*\.)?({})$")
    assert compile_pattern("a|b", "rank_pattern", r"(.*\.)?({})$").match("model.b")


@settings(max_examples=300, deadline=None)
@given(st.sets(st.text("ab.1*+(|[\\", max_size=5), max_size=8), st.lists(st.text("ab.1*+(|[\\", max_size=5)))
def test_a_pattern_of_names_matches_these_names_only(names: set[str], others: list[str]) -> None:
    pattern = any_of(names)
    for name in [*names, *others, *(f"{name}." for name in names), *(name[:-1] for name in names)]:
        assert bool(re.fullmatch(pattern, name)) == (name in names)


@pytest.mark.parametrize("names", [[""], [5], [None], ["x" * (limits.NAME + 1)], ["a"] * (limits.TARGETS + 1)])
def test_lists_of_names_are_bounded(names: list[Any]) -> None:
    with pytest.raises(ConfigError, match="^x is "):
        check_names(names, "x")


@pytest.mark.parametrize("name", ["(a)", "a|b", "a*", "a+", "a?", "a{2}", "[a]", "^a", "a$", "\\w", "a b"])
def test_a_plain_name_has_nothing_of_a_pattern(name: str) -> None:
    check_plain(["lm_head", "model.embed_tokens", "a-b_c.0"], "x")
    with pytest.raises(ConfigError, match="^modules_to_save is .* names of"):
        check_plain([name], "modules_to_save")
