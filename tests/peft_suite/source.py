"""PEFT's source distribution: downloaded by pip, checked and unpacked once for each version."""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

SHA256 = {"0.21.2": "b803ccfb3f3f316004d850284306687833a2235ea278fb56abc856203456142e"}
"""Of the archive, by version: when constraints.txt names another PEFT, add it here and see what its tests say."""


def pinned_version(constraints: Path) -> str:
    """The version of PEFT in a constraints file."""
    pin = re.search(r"^peft==(\S+)$", constraints.read_text(encoding="utf-8"), re.M)
    assert pin, f"{constraints} does not pin PEFT"
    return pin[1]


def fetch_tests(version: str, folder: Path) -> Path:
    """PEFT's tests, unmodified, as the package `peft_tests` in a folder that is returned; made in `folder` if missing.

    Raises `SystemExit` where pip cannot download the archive, or its hash is not the known one.
    """
    target = folder / f"peft-{version}"
    if not target.is_dir():
        archive = download(version, folder)
        part = folder / f"peft-{version}.part"
        shutil.rmtree(part, ignore_errors=True)
        unpack(archive, part / "peft_tests")
        part.rename(target)
    return target


def download(version: str, folder: Path) -> Path:
    """The archive, downloaded by pip from where pip is configured to download."""
    archive = folder / f"peft-{version}.tar.gz"
    if not archive.is_file():
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "-q", "--no-deps"]
        what = ["--no-binary=peft", "--no-build-isolation", f"--dest={folder}", f"peft=={version}"]
        if subprocess.run([*pip, *what], check=False).returncode != 0:
            raise SystemExit(f"pip could not download the source distribution of PEFT {version}; its reason is above.")
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    if found != SHA256.get(version):
        archive.unlink()
        raise SystemExit(f"The sha256 of {archive.name} is {found}, not {SHA256.get(version)} as in {__file__}.")
    return archive


def unpack(archive: Path, target: Path) -> None:
    """Unpack the archive's tests into a package. Its `__init__.py` is in PEFT's repository, but not in the archive."""
    with tarfile.open(archive) as opened:
        for member in opened.getmembers():
            parts = Path(member.name).parts
            if member.isfile() and parts[1:2] == ("tests",):
                member.name = str(Path(*parts[2:]))
                opened.extract(member, target, filter="data")
    (target / "__init__.py").touch()
