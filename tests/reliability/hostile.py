"""What the tests of bad input share: how hard they attack, junk to attack with, and what a good answer is.

`MOLE_CASES=20` multiplies the cases of every attack. They are derandomised: the same cases on every machine, and
Hypothesis prints the smallest one that fails.
"""

from __future__ import annotations

import contextlib
import copy
import datetime
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

from mole.cli import parser
from mole.core.errors import InputError, MoleError

TIMES = int(os.environ.get("MOLE_CASES", "1"))
PATIENCE = 600
"""Seconds after which a case hangs; it takes milliseconds, the largest ones a second."""
LONGEST_LINE = 2_000


def attack(cases: int) -> Any:
    """The settings of an attack with so many cases."""
    return settings(
        max_examples=cases * TIMES,
        derandomize=True,
        database=None,
        deadline=None,
        print_blob=True,
        phases=[Phase.explicit, Phase.generate],  # a hang takes ages to shrink, and the cases are small
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )


# ---------------------------------------------------------------------------------------------------------
# A good answer


@contextlib.contextmanager
def in_time(seconds: int = PATIENCE) -> Iterator[None]:
    """Fail, rather than wait, when what is within hangs."""

    def hung(number: int, frame: Any) -> None:
        pytest.fail(f"it hung for {seconds} s")

    begun, before = time.monotonic(), signal.signal(signal.SIGALRM, hung)
    left, _ = signal.setitimer(signal.ITIMER_REAL, seconds)  # pytest's own time limit runs on this clock, too
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        if left:
            signal.setitimer(signal.ITIMER_REAL, max(left - (time.monotonic() - begun), 0.01))


def answer(action: Callable[[], Any], kind: type[MoleError] = InputError) -> Any:
    """What the action gives, or the one clear line it refuses with; anything else fails."""
    with in_time():
        try:
            return action()
        except kind as error:
            check_line(str(error))
            return error


def refusal(action: Callable[[], Any], kind: type[MoleError] = InputError) -> MoleError:
    """The error the action must refuse with."""
    found = answer(action, kind)
    assert isinstance(found, kind), f"it was taken: {found!r:.300}"
    return found


def check_line(text: str) -> None:
    """One line, short enough to be read, that says something."""
    assert len(text.splitlines()) == 1, text[:500]
    assert 10 < len(text) <= LONGEST_LINE, f"{len(text)} characters: {text[:300]}"
    assert "Traceback" not in text


def mole(capsys: pytest.CaptureFixture[str], *arguments: str) -> int:
    """`mole …` in this process → its exit code; what it says of bad input is one line on stderr, nothing on stdout."""
    with in_time():
        try:
            code = parser.main(arguments)
        except SystemExit as exit:
            code = int(exit.code or 0)
    out, err = capsys.readouterr()
    assert code in (0, 2), err[:2000]
    if code == 2:
        assert out == ""
        check_line(err.rstrip("\n"))
    return code


def for_the_page(value: Any) -> None:
    """The value can be sent to a page: it is JSON as Gradio writes it."""
    orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_PASSTHROUGH_DATETIME | orjson.OPT_NON_STR_KEYS)


def tree(folder: Path) -> set[tuple[str, int]]:
    """Every path below a folder with its size."""
    return {(str(path.relative_to(folder)), path.lstat().st_size) for path in folder.rglob("*")}


@contextlib.contextmanager
def nothing_written(*folders: Path) -> Iterator[None]:
    """Fail when anything below the folders is new or other afterwards."""
    before = [tree(folder) for folder in folders]
    yield
    assert [tree(folder) for folder in folders] == before


# ---------------------------------------------------------------------------------------------------------
# Junk

TEXTS = [
    "", " ", "\x00", "a\x00b", "\ud800", "\n", "a\nb", "\u2028", "\u202ereversed", "null", "~", "true", "nan", "inf",
    "-inf", "1e999", "-1", "0x10", "1_000", "[", "[1,", "{a: b", "]", "[2001-99-99]", "2001-99-99", "[!!int x]",
    "[!!python/object/apply:os.system ['true']]", "&a [*a]", "[&a [1], *a]", "../../etc", "/etc/passwd",
    "~nobody-here/x", "~", "/dev/zero", "C:\\nul", "١٢",
    "<script>alert(1)</script>", "%s%n", "a: b: c", "- - -", "\ufeff", "cuda:١",
    "cuda:300", "cuda:99999999999999999999", "auto\n",
]  # fmt: skip
NUMBERS = [
    0, -1, 1, 2, 2**31, 2**32, 2**53, 2**63, 2**64, -(2**63) - 1, 0.5, -0.0, 1e308, -1e308, 5e-324, 1e39,
    float("nan"), float("inf"), float("-inf"), True, False,
]  # fmt: skip


def bomb(levels: int = 9, width: int = 9) -> list[Any]:
    """A list that shares its parts: small in memory, endless when it is written out."""
    found: list[Any] = ["lol"] * width
    for _ in range(levels):
        found = [found] * width
    return found


def deep(levels: int, leaf: Any = 1) -> Any:
    """Lists in lists."""
    for _ in range(levels):
        leaf = [leaf]
    return leaf


def cyclic() -> list[Any]:
    """A list that holds itself."""
    found: list[Any] = []
    found.append(found)
    return found


LONG: dict[str, Callable[[], Any]] = {
    "@400 digits": lambda: 10**400,
    "@minus 400 digits": lambda: -(10**400),
    "@5000 digits": lambda: 10**5000,
    "@5000 digits as text": lambda: "9" * 5000,
    "@long text": lambda: "x" * 10_000,
    "@many brackets": lambda: "[" * 3000,
    "@many braces": lambda: "{" * 3000,
}
"""What cannot be printed, by a name: `real` puts it in its place, so that a failing case stays readable."""
LONG_TEXTS = [name for name in LONG if isinstance(LONG[name](), str)]
ODD: dict[str, Callable[[], Any]] = {
    "@bomb": bomb,
    "@deep": lambda: deep(90),
    "@deeper": lambda: deep(50_000),
    "@cyclic": cyclic,
    "@bytes": lambda: b"bytes",
    "@date": lambda: datetime.date(2001, 1, 1),
    "@tuple": lambda: (1, 2),
    "@set": lambda: {3},
    "@other keys": lambda: {1: 2, None: None},
}
"""The same for what only Python or YAML can say, not JSON."""


def real(value: Any) -> Any:
    """A drawn tree with the things themselves in the place of their names."""
    if isinstance(value, str) and value.startswith("@"):
        return {**LONG, **ODD}.get(value, lambda: value)()
    if isinstance(value, dict):
        return {
            key if not isinstance(key, str) or key in ODD else real(key): real(entry) for key, entry in value.items()
        }
    return [real(entry) for entry in value] if isinstance(value, list) else value


text = st.one_of(
    st.sampled_from(TEXTS),
    st.sampled_from(LONG_TEXTS),
    st.text(st.characters(), max_size=20),
)
number = st.one_of(st.sampled_from(NUMBERS), st.integers(), st.floats())
leaf = st.one_of(st.none(), number, text, st.sampled_from([*LONG]))
json_tree = st.recursive(
    leaf, lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(text, inner, max_size=4)), max_leaves=8
)
junk = st.one_of(json_tree, json_tree, st.sampled_from([*ODD]))


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every part of a tree, its root left out."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path for key, entry in inner for path in [(*at, key), *places(entry, (*at, key))]]


@st.composite
def mutated(draw: st.DrawFn, valid: Any, values: st.SearchStrategy[Any] = junk, most: int = 3) -> Any:
    """A valid tree with one to three parts replaced, gone, added, or put in another's place."""
    found = copy.deepcopy(valid)
    for _ in range(draw(st.integers(1, most))):
        known = places(found)
        if not known:
            break
        *parents, last = draw(st.sampled_from(known))
        parent = found
        for key in parents:
            parent = parent[key]
        change = draw(st.sampled_from(["replace"] * 5 + ["remove", "add", "swap", "wrap", "spell"]))
        if change == "replace":
            parent[last] = draw(values)
        elif change == "remove":
            del parent[last]
        elif change == "add" and isinstance(parent, dict):
            parent[draw(text)] = draw(values)
        elif change == "add":
            parent.append(draw(values))
        elif change == "swap":
            source: Any = found
            for key in draw(st.sampled_from(known)):
                source = source[key] if isinstance(source, dict) or isinstance(key, int) else source
            parent[last] = copy.deepcopy(source)
        elif change == "wrap":
            parent[last] = [parent[last]]
        else:
            parent[last] = f"{parent[last]}"
    return found


YAML_BITS = [
    b": ", b"- ", b"[", b"]", b"{", b"}", b"&a ", b"*a", b"!!int ", b"!x ", b"|", b">", b"\n", b"\t", b"'", b'"', b"%",
    b"---\n", b"...\n", b"<<: ", b"? ", b"\xff", b"\x00", b"\xe2\x80\xa8", b"2001-99-99", b"0x", b"#",
]  # fmt: skip
BITS = [
    b"\xff", b"\x00", b'"', b"'", b",", b"\n", b"\r", b"\\", b"\\ud800", b"\\u0000", b"[", b"]", b"{", b"}", b":",
    b"NaN", b"1e999", b"-", b"null", b"\xef\xbb\xbf", b"\xff\xfe", b"\xe2\x80\xa8", b"\x7f" * 8, b"\xff" * 8,
    b"\x00" * 8,
]  # fmt: skip


@st.composite
def damaged(draw: st.DrawFn, data: bytes, bits: list[bytes] = BITS) -> bytes:
    """A file's bytes with some lost, changed, put in or doubled, or cut off."""
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        end = min(len(data), at + draw(st.integers(0, 30)))
        put = draw(st.one_of(st.just(b""), st.binary(max_size=4), st.sampled_from(bits), st.just(data[at:end] * 2)))
        data = data[:at] + put + data[end:]
    return data[: draw(st.integers(0, len(data)))] if draw(st.integers(0, 5)) == 0 else data
