"""How much of everything at the most: one place for the numbers, so that no single request takes the machine. No torch.

The bounds of settings are here too; `mole.config` declares them. What they bound says so in one line, by its field.
"""

from __future__ import annotations

QUEUE = 64
"""Runs that may wait at a time, on all devices together: each is a process. No grid may be larger."""
ROWS = 5_000_000
"""Rows of a data file."""
FILE_BYTES = 4 << 30
"""Bytes of a data file: it is read into memory."""
LENGTH = 131_072
"""Tokens of an example."""
RANK = 1024
EXPERTS = 256
RANK_TIMES_EXPERTS = 16_384
"""Rows of the stacked experts of one projection, above which an adapter outweighs its base."""
BATCH = 4096
NAME = 1024
"""Characters of a path or a hub id."""

UPLOAD_BYTES = 1 << 30
"""Bytes of an upload."""
UPLOADS = 200
"""Uploads that are kept."""
REQUEST_BYTES = 8 << 20
"""Bytes of any other request: a long conversation has some hundred thousand."""
PRESETS = 100
"""Presets of one's own."""
PRESET_BYTES = 64 << 10

NEW_TOKENS = 1024
"""Tokens of a reply in the studio. The command line's user is alone with their machine: there the model's context."""
MESSAGE = 100_000
"""Characters of a message, and of a system prompt."""
CHATS = 8
"""Replies of the page that may wait for their turn with the model; further ones wait in the server's line."""
LINE = 64
"""Requests in the server's line for each handler; more are refused."""
SESSIONS = 500
"""Open pages whose state is remembered."""

DEAD_SHARE = 0.01
"""Share of an even load below which an expert counts as dead in its layer."""
