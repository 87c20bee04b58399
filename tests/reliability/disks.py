"""A small disk of one's own to fill and to write-protect: a tmpfs where mounting is allowed, else a limit on files.

Mounting needs root with CAP_SYS_ADMIN, or else a user namespace (the mount is then reached through `/proc/PID/root`).
Where a container forbids both, `RLIMIT_FSIZE` takes the full disk's place (a real EFBIG), and a folder without write
permission, looked at without root's privilege, the read-only one's.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

SIZE, INODES = 4 << 20, 400
PR_CAPBSET_DROP, CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH = 24, 1, 2


@dataclass
class Disk:
    """A disk with a `$MOLE_HOME`; `mounted` is None where a limit on files takes its place."""

    home: Path
    mounted: Callable[[str], list[str]] | None
    """The command that mounts it again with other options."""
    limits: list[Callable[[], None]] = field(default_factory=list)

    @property
    def ballast(self) -> Path:
        return self.home / "ballast"

    def fill(self) -> Callable[[], None]:
        """What fills it, for this process or (it can be pickled) another one."""
        return partial(fill, self.ballast) if self.mounted else no_more_bytes

    def fill_with_files(self) -> Callable[[], None]:
        """What uses up its inodes, for this process or (it can be pickled) another one; only where it is mounted."""
        return partial(fill_with_files, self.home / "small")

    def free(self) -> None:
        """Make room again."""
        self.ballast.unlink(missing_ok=True)
        shutil.rmtree(self.home / "small", ignore_errors=True)
        self.limits.clear()

    @contextlib.contextmanager
    def full(self) -> Iterator[None]:
        """Full for the commands in this block."""
        if self.mounted:
            fill(self.ballast)
        else:
            self.limits.append(no_more_bytes)
        try:
            yield
        finally:
            self.free()

    @contextlib.contextmanager
    def read_only(self) -> Iterator[None]:
        """Read-only for the commands in this block."""
        if self.mounted:
            subprocess.run(self.mounted("ro"), check=True)
        else:
            modes = {path: path.stat().st_mode for path in (self.home, *self.home.rglob("*"))}
            for path, mode in modes.items():
                path.chmod(mode & ~0o222)
            self.limits += [without_privilege] if os.getuid() == 0 else []
        try:
            yield
        finally:
            if self.mounted:
                subprocess.run(self.mounted("rw"), check=True)
            else:
                self.limits.clear()
                for path, mode in modes.items():
                    path.chmod(mode)

    def mole(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """The command `mole`, on this disk."""

        def limit() -> None:
            for apply in self.limits:
                apply()

        command = [sys.executable, "-m", "mole.cli", *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=240, preexec_fn=limit)


def fill(ballast: Path) -> None:
    """Take every free byte of a disk."""
    with ballast.open("ab", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(1 << 16))
    with ballast.open("ab", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(b"0")


def fill_with_files(folder: Path) -> None:
    """Take every free inode of a disk."""
    folder.mkdir(exist_ok=True)
    with contextlib.suppress(OSError):
        for number in itertools.count():
            (folder / str(number)).touch()


def no_more_bytes() -> None:
    """Let this process add nothing to any file."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))


def without_privilege() -> None:
    """Let the program that is executed next mind the permissions of files, though it is root's."""
    libc = ctypes.CDLL(None, use_errno=True)
    for capability in (CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH):
        if libc.prctl(PR_CAPBSET_DROP, capability) != 0:
            raise OSError(ctypes.get_errno(), "prctl")


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[Disk]:
    """A disk of 4 MiB in `folder`, in the best way that is allowed here."""
    for way in (mounted_by_root, mounted_in_a_namespace):
        with contextlib.ExitStack() as stack:
            try:
                disk = stack.enter_context(way(folder))
            except (OSError, subprocess.CalledProcessError):
                continue
            yield disk
            return
    folder.chmod(0o755)
    yield Disk(folder, None)


@contextlib.contextmanager
def mounted_by_root(folder: Path) -> Iterator[Disk]:
    mount = ["mount", "-t", "tmpfs", "-o", f"size={SIZE},nr_inodes={INODES}", "none", str(folder)]
    subprocess.run(mount, check=True, stderr=subprocess.DEVNULL)
    try:
        yield Disk(folder, lambda option: ["mount", "-o", f"remount,{option}", str(folder)])
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@contextlib.contextmanager
def mounted_in_a_namespace(folder: Path) -> Iterator[Disk]:
    script = f"mount -t tmpfs -o size={SIZE},nr_inodes={INODES} none '{folder}' && echo ready && exec sleep 3600"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    keeper = subprocess.Popen(["unshare", "--map-root-user", "--mount", "sh", "-c", script], text=True, **pipes)  # type: ignore[call-overload]
    try:
        if keeper.stdout.readline() != "ready\n":
            raise OSError("user namespaces are not allowed here")
        enter = ["nsenter", "--target", str(keeper.pid), "--user", "--mount"]
        home = Path(f"/proc/{keeper.pid}/root{folder}")
        yield Disk(home, lambda option: [*enter, "mount", "-o", f"remount,{option}", str(folder)])
    finally:
        keeper.kill()
        keeper.wait()
