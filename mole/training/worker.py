"""The process of one run: `python -m mole.training.worker NAME [--resume]`, or `mole train` in the foreground.

It holds the run's lock, waits for the device (without having imported torch, so the process is small), trains, and
writes the reason to the events if that fails.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from mole import runs
from mole.core import files, processes
from mole.core.devices import restrict_to
from mole.core.errors import MoleError, RunError, TrainingError
from mole.core.redaction import redacted
from mole.core.text import explain, print_error
from mole.runs.job import device_turn
from mole.runs.run import WAITING, Run
from mole.training.lent import LentDevice

log = logging.getLogger("mole")


def perform(run: Run, *, resume: bool = False, progress: bool = False) -> None:
    """Train a queued run in this process: wait for its device, train, and log to its events and `train.log`.

    The first Ctrl-C, SIGTERM or SIGHUP (the terminal was closed) saves and stops, a second Ctrl-C aborts. `progress`
    shows progress on the terminal. Raises `BusyError` when another process holds the run, and `MoleError` when training
    failed, with the message of the `failed` event.
    """
    files.check_tree(run.path)
    with run.lock(), logging_to(run), stopping_on_signals(run, progress):
        check_waits(run)
        with failure_recorded(run):
            device, _ = runs.place_in_queue(run)
            report = print_error if progress else log.info
            with device_turn(device, run.stop_requested, report, lambda: runs.acquire_device(device, run)) as held:
                if not held:
                    if run.last_event["type"] != "stopped":
                        run.append_event("stopped", run.step)
                    return
                log.info("%s on %s, process %d", "resuming" if resume else "starting", device, os.getpid())
                run.append_event("starting", run.step, pid=os.getpid(), device=device)
                restrict_to(run.config.model.device)  # before PEFT is imported
                from mole.training.trainer import train

                train(run, resume=resume, progress=progress)
                log.info("%s at step %d", run.last_event["type"], run.step)


def perform_on(lent: LentDevice, run: Run) -> None:
    """Train a waiting run in this process at once, on a lent device that nobody else uses; errors as `perform`.

    It ends with its adapter, however early: no later process continues it.
    """
    files.check_tree(run.path)
    with run.lock(), logging_to(run):
        check_waits(run)
        with failure_recorded(run):
            log.info("starting on %s, process %d", lent.device, os.getpid())
            run.append_event("starting", run.step, pid=os.getpid(), device=lent.device)
            from mole.training.trainer import train

            train(run, lent=lent)
            log.info("%s at step %d", run.last_event["type"], run.step)


def check_waits(run: Run) -> None:
    """Raise `RunError` unless the run, which this process holds, waits to be trained."""
    last = run.last_event
    if last["type"] not in WAITING:  # another process started for it was faster
        raise RunError(f"The run {run.name} is {run.state_unheld(last)} and does not wait to be trained.")


@contextmanager
def failure_recorded(run: Run) -> Iterator[None]:
    """A block whose errors are written to the run's events and log, and raised as `MoleError`."""
    try:
        yield
    except MoleError as error:
        record_failure(run, error)
        raise
    except Exception as error:
        message, advice = record_failure(run, error)
        raise TrainingError(f"{message} {advice}") from error
    finally:
        run.clear_stop()


def record_failure(run: Run, error: Exception) -> tuple[str, str]:
    """Write the `failed` event, and the traceback to the log; returns the cause and the advice."""
    message, advice = explain(error)
    log.error("failed: %s %s", message, advice, exc_info=error)
    try:
        run.append_event("failed", run.step, error=message, advice=advice)
    except OSError as problem:  # a full disk: the run's state becomes `interrupted`, which can be resumed too
        log.error("the failure could not be written to the events: %s", problem)
    return message, advice


class LogFile(logging.FileHandler):
    """A log file whose write errors are ignored: on a full disk the run may go on, or fail with its own error."""

    def _open(self) -> Any:
        return open(self.baseFilename, self.mode, encoding=self.encoding, opener=files.unlinked)

    def emit(self, record: logging.LogRecord) -> None:
        with suppress(OSError):
            super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:
        pass

    def close(self) -> None:
        with suppress(OSError):
            super().close()


class RedactingFormatter(logging.Formatter):
    """Removes access tokens from log lines and tracebacks."""

    def format(self, record: logging.LogRecord) -> str:
        return redacted(super().format(record))


@contextmanager
def logging_to(run: Run) -> Iterator[None]:
    """Send the log of `mole` to the run's `train.log`."""
    handler = LogFile(run.log_path, encoding="utf-8", delay=True)
    handler.setFormatter(RedactingFormatter("%(asctime)s %(levelname)s %(message)s"))
    before = log.level, log.propagate
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.level, log.propagate = before
        handler.close()


@contextmanager
def stopping_on_signals(run: Run, progress: bool) -> Iterator[None]:
    """Turn the first Ctrl-C, SIGTERM or SIGHUP into a request to stop; does nothing outside the main thread.

    SIGHUP says that the terminal was closed. It stays ignored where it is (`nohup`).
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    terminals = [descriptor for descriptor in (0, 1, 2) if os.isatty(descriptor)]

    def on_signal(number: int, frame: Any) -> None:
        with suppress(OSError):  # the folder is gone: the next step finds out
            run.request_stop()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if number == signal.SIGHUP:
            # Every further write to that terminal fails with EIO, which must not keep the run from being saved.
            null = os.open(os.devnull, os.O_RDWR)
            for descriptor in terminals:
                os.dup2(null, descriptor)
            os.close(null)
        elif progress:
            os.write(2, b"\nStopping after this step and saving; Ctrl-C again aborts.\n")

    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, on_signal) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def main(arguments: list[str]) -> int:
    """`NAME [--resume]` → exit code: 0 finished or stopped, 1 failed, 2 bad input."""
    names = [argument for argument in arguments if argument != "--resume"]

    def train() -> None:
        if len(names) != 1:
            raise RunError("usage: python -m mole.training.worker NAME [--resume]")
        perform(runs.get(names[0]), resume="--resume" in arguments)

    return processes.exit_code(train)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
