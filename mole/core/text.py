"""Text for people: exceptions on one line, and bytes, counts and durations with units."""

from __future__ import annotations

import re
import sys
from contextlib import suppress
from typing import Any

from mole.core.errors import MoleError, MoleNotice
from mole.core.paths import HOME_GONE, home, is_home_gone
from mole.core.redaction import redacted

NO_MEMORY = (
    r"out of memory|(can ?not|can't) allocate memory|MemoryError|bad_alloc|cudaErrorMemoryAllocation"
    r"|CU(BLAS|DNN|SOLVER)_STATUS_(ALLOC_FAILED|NOT_INITIALIZED)"
)
"""Pattern for the type and text of an error when memory ran out. CUDA's libraries say it in their own ways: they fail
to start when nothing is left for their workspace."""
FAILURES = (
    (
        NO_MEMORY,
        "Out of memory.",
        "Use a smaller training.per_device_train_batch_size or data.max_length, or set "
        "training.gradient_checkpointing=true.",
    ),
    (
        r"no space left|(errno|os error) 28\b|disk quota",
        "The disk is full.",
        "Free some space (df -h), or remove files (df -i), then resume the run: its last checkpoint is kept.",
    ),
    (
        r"file too large|(errno|os error) 27\b",
        "A file would be larger than this process may write.",
        "Raise the limit (ulimit -f), then resume the run: its last checkpoint is kept.",
    ),
    (
        r"read-only file system|permission denied",
        "A file cannot be written.",
        "Make the folder of $MOLE_HOME writable, then resume the run.",
    ),
    (
        r"\bnan\b|not finite|non-?finite",
        "The numbers are not finite any more.",
        "Use a lower training.learning_rate or a longer training.warmup_steps, and start again.",
    ),
)
"""Pattern for an error's type and text, cause, and advice."""


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error says that memory ran out."""
    return re.search(NO_MEMORY, f"{type(error).__name__}: {error}", re.IGNORECASE) is not None


def one_line(error: Exception, longest: int = 200) -> str:
    """An exception's message in at most `longest` characters on one line, without final full stop, tokens hidden."""
    text = redacted(" ".join(str(error).split())) or type(error).__name__
    return (text if len(text) <= longest else text[: longest - 1] + "…").rstrip(".")


def full_stop(line: str) -> str:
    """A line that ends as a sentence does: with a full stop, if it ends with none of `.!?…`."""
    return line if not line or line.endswith((".", "!", "?", "…")) else f"{line}."


def print_error(message: str) -> None:
    """Print a line to stderr; does nothing if the terminal is gone or the disk behind it full."""
    with suppress(OSError):
        print(message, file=sys.stderr, flush=True)


def notices_in_one_line(show: Any, kept: list[str] | None = None) -> Any:
    """A `warnings.showwarning` that prints each `MoleNotice` as one line, and leaves other warnings to `show`.

    The notices are also added to `kept`.
    """

    def shown(message: Warning | str, category: type[Warning], *rest: Any) -> None:
        if issubclass(category, MoleNotice):
            print_error(f"Note: {message}")
            if kept is not None:
                kept.append(str(message))
        else:
            show(message, category, *rest)

    return shown


def explain(error: Exception) -> tuple[str, str]:
    """An error's cause and advice, one line each; the advice is empty if the cause says it all."""
    text = redacted(" ".join(str(error).split()))
    if isinstance(error, MoleError):
        return full_stop(text), ""
    if isinstance(error, FileNotFoundError) and is_home_gone():
        return HOME_GONE.format(home=home()), ""
    kind = type(error).__name__
    for pattern, cause, advice in FAILURES:
        if re.search(pattern, f"{kind}: {text}", re.IGNORECASE):
            return f"{cause} ({text[:300] or kind})", advice
    return f"{kind}: {text[:500]}", "The full traceback is in the run's train.log."


def bytes_text(size: float) -> str:
    """Bytes in a suitable unit: `84 kB`, `270 MB`, `16.4 GB`."""
    for unit, name in ((1e9, "GB"), (1e6, "MB")):
        if size >= 0.9995 * unit:
            return f"{size / unit:.{1 if name == 'GB' else 0}f} {name}"
    return f"{size / 1e3:.0f} kB"


def count_text(count: int) -> str:
    """A number of parameters: `135 M`, `1.7 B`; empty for 0."""
    if not count:
        return ""
    for unit, name in ((1e9, "B"), (1e6, "M")):
        if count >= 0.9995 * unit:
            return f"{count / unit:.{1 if name == 'B' else 0}f} {name}"
    return f"{count:,}"


def duration_text(seconds: float) -> str:
    """Seconds in a suitable unit: `0.31 s`, `45 s`, `12 min`, `1.6 h`."""
    if seconds < 100:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
