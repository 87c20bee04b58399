"""Messages for people: one line of bounded length, without access tokens."""

from __future__ import annotations

from mole.core.redaction import redacted

MESSAGE_LENGTH = 600
"""Characters of a message that the page shows."""


def short_message(text: str, longest: int = MESSAGE_LENGTH) -> str:
    """The text on one line of at most `longest` characters and an ellipsis, without access tokens."""
    line = " ".join(redacted(text).split())
    return line if len(line) <= longest else f"{line[:longest]}…"
