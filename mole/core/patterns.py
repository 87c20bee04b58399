"""Patterns that come from a file or a form, matched in linear time by RE2.

Python's own `re` backtracks: a pattern such as `(.+)+!` takes it hours, during which it holds the interpreter's lock.
No pattern from outside is handed to it, nor to a library that would. No torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any

from mole.core import limits
from mole.core.errors import ConfigError

ALLOWED = f"a pattern of at most {limits.PATTERN} characters in RE2's syntax, with no lookahead and no backreference"
PLAIN_NAMES = f"names of at most {limits.NAME} letters, digits, dots, hyphens and underscores"
MEMORY = 1 << 17
"""Bytes for a compiled pattern; RE2 refuses larger ones. The worst that fits takes 3 ms for a module's name."""
NOTHING = "(?!)"
"""A pattern, for Python's `re`, that matches no text."""


@cache
def _options() -> Any:
    import re2

    options = re2.Options()
    options.log_errors = False  # to stderr
    options.never_capture = True  # with groups to fill in it would not use its automaton
    options.max_mem = MEMORY
    return options


def compile_pattern(pattern: str, field: str, within: str = "{}") -> Any:
    """A compiled pattern with `fullmatch`, `match` and `search`, each linear in the text.

    Args:
        pattern: the pattern.
        field: the setting's name, for the error.
        within: the expression that the pattern is a part of, with `{}` in its place.

    Raises:
        ConfigError: it is too long, or not in RE2's syntax.
    """
    import re2

    if len(pattern) > limits.PATTERN:
        raise ConfigError(field, pattern, ALLOWED)
    if "{," in pattern:  # up to n times in Python, three characters in RE2
        raise ConfigError(field, pattern, ALLOWED, "Write {0,n} for {,n}.")
    try:
        re2.compile(pattern, _options())  # alone too: `a)|(b` is none, but would become one within another
        return re2.compile(within.replace("{}", pattern), _options())
    except (re2.error, UnicodeEncodeError) as error:
        cause = error.args[0] if isinstance(error, re2.error) and error.args else "not valid Unicode"
        cause = cause.decode(errors="replace") if isinstance(cause, bytes) else str(cause)
        raise ConfigError(field, pattern, ALLOWED, f"RE2 says: {cause}.") from None


def check_names(names: Iterable[Any], field: str) -> None:
    """Check a list of names that are compared as they are: each is text, and all are bounded. Raises `ConfigError`."""
    names = list(names)
    if len(names) > limits.TARGETS:
        raise ConfigError(field, f"a list of {len(names):,}", f"at most {limits.TARGETS:,} names")
    for name in names:
        if not isinstance(name, str) or not 0 < len(name) <= limits.NAME:
            raise ConfigError(field, name, f"a name of 1 to {limits.NAME} characters")


def check_plain(names: Iterable[Any], field: str) -> None:
    """Check names that a library puts into a pattern: none may act as one. Raises `ConfigError`.

    A dot is left as it is: any character in a pattern, and harmless.
    """
    names = list(names)
    check_names(names, field)
    for name in names:
        if not is_plain(name):
            raise ConfigError(field, name, PLAIN_NAMES)


def is_plain(name: str) -> bool:
    """Whether a name has no character that acts in a pattern, but for dots."""
    return re.fullmatch(r"[\w.:/-]+", name) is not None


def suffixes(name: str) -> Iterator[str]:
    """A full name and what follows each of its dots: `a.b.c`, `b.c`, `c`. PEFT takes any of them for the module."""
    while name:
        yield name
        name = name.partition(".")[2]


def any_of(names: Iterable[str]) -> str:
    """A pattern, for Python's `re`, that matches these names and no others, with no work to take back.

    The names are a tree of their parts between dots: `a.b`, `a.c` → `(?:a\\.(?:b|c))`. No two branches of a node begin
    alike up to a dot or the end, so that each part of a text is compared with the branches of one node.
    """
    root: dict[str, Any] = {}
    for name in names:
        node = root
        for part in name.split("."):
            node = node.setdefault(part, {})
        node[END] = {}
    return _branches(root) if root else NOTHING


END = "\n"
"""Marks in a tree of names that one ends here; no part of a name."""


def _branches(node: dict[str, Any]) -> str:
    """The alternatives of a node, each with what may follow it."""
    found = []
    for part, inner in sorted(node.items()):
        longer = {key: value for key, value in inner.items() if key != END}
        rest = rf"\.{_branches(longer)}" if longer else ""
        if END in inner and rest:
            rest = f"(?:{rest})?"
        found.append(re.escape(part) + rest)
    return f"(?:{'|'.join(found)})"
