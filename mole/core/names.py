"""Names of folders that people choose: letters and digits of any language, one spelling each, safe on every system."""

from __future__ import annotations

import re
import unicodedata
from itertools import groupby

from mole.core.errors import RunError, brief

WINDOWS_DEVICES = r"(?i:con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?"
MAX_CHARACTERS, MAX_BYTES = 64, 192
"""File systems take 255 bytes; temporary folders add a prefix and a number to a name."""
PUNCTUATION = "._-"
MOST_MARKS = 3
"""Combining marks on one letter."""
UNSEEN = re.compile("[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]")
"""Letters and marks that are not drawn; most other such characters are of the category Cf."""
ALIKE = ("LATIN", "CYRILLIC", "GREEK", "ARMENIAN", "COPTIC", "CHEROKEE")
"""Scripts that share the shapes of letters: a word of two of them could be the twin of another."""


def check_name(name: str, what: str = "run", field: str = "name") -> str:
    """The name of a run (or `what`) in its one spelling (NFC). Raises `RunError` for `field` if it is not allowed."""
    if not isinstance(name, str) or (why := objection(name := unicodedata.normalize("NFC", name[: 4 * MAX_BYTES]))):
        why = why if isinstance(name, str) else "it is not text"
        raise RunError(
            f"The {what} name {brief(name)} is not allowed: {why}. Use up to {MAX_CHARACTERS} letters and digits of "
            "any language, '.', '_' and '-', starting with a letter, digit or '_'.",
            field=field,
        )
    return name


def objection(name: str) -> str | None:
    """Why a name in NFC is not allowed, in a clause; None if it is."""
    if not name:
        return "it is empty"
    odd = next((character for character in name if not is_allowed(character)), None)
    if odd is not None:
        return f"{brief(odd)} is no letter, no digit and none of '.', '_' and '-'"
    if name[0] in ".-" or unicodedata.category(name[0])[0] == "M":
        return f"it starts with {brief(name[0])}"
    if name.endswith("."):
        return "it ends with '.'"
    if len(name) > MAX_CHARACTERS or len(name.encode()) > MAX_BYTES:
        return f"it has {len(name)} characters ({len(name.encode())} bytes; {MAX_BYTES} are allowed)"
    if re.fullmatch(WINDOWS_DEVICES, name):
        return "Windows reserves it for a device"
    if max((len(list(marks)) for on, marks in groupby(name, is_mark) if on), default=0) > MOST_MARKS:
        return f"it has more than {MOST_MARKS} marks on one letter"
    mixed = next((scripts for scripts in map(scripts_of, re.split(r"[\d._-]+", name)) if len(scripts) > 1), None)
    return f"a word in it mixes {' and '.join(sorted(mixed)).title()} letters, which look alike" if mixed else None


def is_mark(character: str) -> bool:
    """Whether a character is drawn on the one before it."""
    return unicodedata.category(character) in ("Mn", "Me")


def is_allowed(character: str) -> bool:
    """Whether a character may be in a name: visible, and no other form of another one (wide, bold, superscript)."""
    if character in PUNCTUATION:
        return True
    return (
        (unicodedata.category(character)[0] in "LM" or unicodedata.category(character) == "Nd")
        and unicodedata.normalize("NFKC", character) == character
        and not UNSEEN.match(character)
    )


def scripts_of(word: str) -> set[str]:
    """Those of `ALIKE` that a word's letters are of."""
    return {unicodedata.name(letter, "").split(" ")[0] for letter in word} & set(ALIKE)
