"""Whether a waiting run was queued in this home: only such a run is started without being asked for.

A run folder can be handed on by anyone, and its events may say that it waits for its device. So each `created` and
`queued` event carries a message authentication code (HMAC-SHA256) of the run's name and what the event says, made with
a secret that never leaves `$MOLE_HOME/key`. Moving the whole home keeps it valid. No torch.
"""

from __future__ import annotations

import errno
import hashlib
import hmac
import json
import math
import os
import secrets
from pathlib import Path
from typing import Any

from mole.core import checkpoint, files, locks
from mole.core.paths import home

FIELD = "origin"
KEY_BYTES = 32
SIGNED = ("type", "step", "device", "resume", "position", "moved")
"""The values of an event that decide how a waiting run is started, and when."""


def sign(name: str, event: dict[str, Any]) -> str:
    """The code for an event of the run `name`; makes the home's key if there is none. Raises `OSError`."""
    return _code(_key(make=True), name, event)


def is_from_here(name: str, event: dict[str, Any]) -> bool:
    """Whether an event of the run `name` was written in this home."""
    try:
        expected = _code(_key(), name, event)
    except OSError:
        return False
    return hmac.compare_digest(expected, str(event.get(FIELD)).encode(errors="replace").decode())


def _code(key: bytes, name: str, event: dict[str, Any]) -> str:
    text = json.dumps([name, [event.get(field) for field in SIGNED]])
    return hmac.new(key, text.encode(), hashlib.sha256).hexdigest()


def _key(make: bool = False) -> bytes:
    path = home() / "key"
    if make and not os.path.lexists(path):
        lock = locks.acquire(home() / ".key.lock", patience=math.inf)
        assert lock is not None
        with lock:  # of two processes at once, the first one's key is kept
            if not os.path.lexists(path):
                checkpoint.write_file(path, _write_key)
    with open(path, "rb", opener=files.unlinked) as file:
        key = file.read(KEY_BYTES + 1)
    if len(key) != KEY_BYTES:  # anyone could sign with an empty one
        raise OSError(errno.EIO, f"Not a key of {KEY_BYTES} bytes; delete it to get a new one", str(path))
    return key


def _write_key(path: Path) -> None:
    path.touch(0o600)
    path.write_bytes(secrets.token_bytes(KEY_BYTES))
