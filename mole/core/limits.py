"""Upper limits, in one place, so that no single request exhausts the machine. No torch.

The limits of settings are here too; `mole.config` applies them, and errors name the field and the limit.
"""

from __future__ import annotations

QUEUE = 64
"""Runs queued at a time, on all devices together: each is a process. Also the largest grid."""
ROWS = 5_000_000
"""Rows of a data file, and of all those of a run as often as their weights say."""
SOURCES = 64
"""Files and data sets that a run trains on."""
WEIGHT = 1000
"""How often a row may be seen in an epoch."""
FILE_BYTES = 4 << 30
"""Bytes of a data file, which is read into memory."""
DECODED_BYTES = 256 << 20
DECODED_TIMES = 64
"""Bytes of the rows of a Parquet file: so many, or so many times its size if that is more, but at most `FILE_BYTES`."""
ROW_BYTES = 16 << 20
"""Bytes of a line of JSONL and characters of a field of CSV: ten times what the longest example needs."""
COLUMNS = 4096
"""Columns of a data file: those of a table, or the different keys of JSON rows."""
LENGTH = 131_072
"""Tokens of an example."""
RANK = 1024
EXPERTS = 256
RANK_TIMES_EXPERTS = 16_384
"""Rank × experts of one projection; beyond this an adapter outweighs its base model."""
LAYERS = 1000
"""Layers of a base model that an adapter repeats."""
BATCH = 4096
HIDDEN = 4096
"""Hidden width of a router's network."""
STEPS = 10**9
"""Steps, epochs and checkpoints kept."""
FACTOR = 1e30
"""A coefficient, a weight decay, a gradient norm: float32 holds it."""
NAME = 1024
"""Characters of a path, a hub id or the name of a column or module."""
PATTERN = 1024
"""Characters of a pattern for names of modules."""
TARGETS = 10_000
"""Names of modules in one setting, and keys of a table of patterns."""
PATTERN_VALUES = 256
"""Different values of a table of patterns. Python keeps 512 compiled patterns; more it would compile for each name."""
PATTERN_WORK = 2_000_000
"""Names times the characters of all patterns in a table that they are compared with: seconds, for the worst ones."""

UPLOAD_BYTES = 1 << 30
"""Bytes of an upload."""
ARCHIVE_FILES = 10_000
ARCHIVE_BYTES = 64 << 30
"""Files of an exported run, and their bytes once unpacked."""
UPLOADS = 200
"""Uploads kept on disk."""
REQUEST_BYTES = 8 << 20
"""Bytes of any other request; a long conversation has a few hundred thousand."""
PRESETS = 100
"""Presets saved by the user."""
PRESET_BYTES = 64 << 10

EVENT_BYTES = 4 << 20
"""Bytes of events that one request to the studio's API reads; the next one continues."""
NEW_TOKENS = 1024
"""New tokens of a reply in the studio; on the command line the model's context is the limit."""
STOP_STRINGS = 16
"""Texts that end a reply."""
MESSAGE = 100_000
"""Characters of a message, and of a system prompt."""
CHATS = 8
"""Replies that may wait for the model; further ones wait in the server's queue."""
VISITORS = 16
"""Visitors whose training waits for a GPU or has one; further ones wait in the server's queue."""
LINE = 64
"""Requests in the server's queue for each handler; further ones are refused."""
SESSIONS = 500
"""Open pages whose state is kept."""

DEAD_SHARE = 0.01
"""Fraction of a uniform load below which an expert counts as dead in its layer."""
