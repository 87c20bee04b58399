"""The documents: their code blocks, and shells and interpreters that run them as a reader would.

for block in blocks(ROOT / "docs" / "first-run.md"):
    Reader(folder).run(block)             # `folder` is where the reader stands, as at the root of the repository

A block is run unless the line before it is a comment that says why not:

<!-- not run by the tests: it needs a GPU -->
<!-- run by `make soak` only: it needs the embedded model -->
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shlex
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from mole.cli import parser

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NOT_RUN = re.compile(r"<!-- not run by the tests: (.+?) -->\n\Z")
IN_SOAK = re.compile(r"<!-- run by `make soak` only: (.+?) -->\n\Z")
SHIM = """#!{python} -IS
import json, os, socket, sys
with socket.create_connection(("127.0.0.1", {port})) as line, line.makefile("rw", encoding="utf-8") as both:
    both.write(json.dumps([sys.argv[1:], os.getcwd()]) + "\\n")
    both.flush()
    code, out, err = json.loads(both.readline())
sys.stdout.write(out)
sys.stderr.write(err)
sys.exit(code)
"""
"""The command `mole` of a reader's shell: it asks the process of the test, which has imported torch already."""


class Block(NamedTuple):
    """A code block of a page.

    Attributes:
        page: the page's path within the repository.
        line: where the block begins.
        language: as behind the opening fence; empty for none.
        not_run, soak: why it is not run, or only by `make soak`; empty if it is.
    """

    page: str
    line: int
    language: str
    code: str
    not_run: str
    soak: str


def blocks(path: Path) -> list[Block]:
    """The code blocks of a page, in order."""
    text = path.read_text(encoding="utf-8")
    found = []
    for match in FENCE.finditer(text):
        before = text[: match.start()]
        reasons = [rule[1] if (rule := marker.search(before)) else "" for marker in (NOT_RUN, IN_SOAK)]
        name = str(path.relative_to(ROOT))
        found.append(Block(name, before.count("\n") + 1, match[1], match[2], reasons[0], reasons[1]))
    return found


def prose(path: Path) -> str:
    """A page without its code blocks."""
    return FENCE.sub("", path.read_text(encoding="utf-8"))


def mole_commands(block: Block) -> list[list[str]]:
    """The arguments of each `mole …` in a bash block."""
    found = []
    for line in block.code.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            del words[0]
        if words and words[0] == "mole":
            found.append(words[1 : words.index("|")] if "|" in words else words[1:])
    return found


class Reader:
    """Someone who copies the blocks of a page, one after the other, into one shell and one interpreter.

    Attributes:
        folder: where they stand.
        names: the names that the Python blocks have made.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.names: dict[str, Any] = {"__name__": "__main__"}

    def run(self, block: Block) -> str:
        """Run a block, and return what it prints; fails if it does."""
        return self.python(block) if block.language == "python" else self.bash(block)

    def python(self, block: Block) -> str:
        """Run a Python block."""
        code = compile("\n" * block.line + block.code, str(ROOT / block.page), "exec", dont_inherit=True)
        with contextlib.redirect_stdout(io.StringIO()) as out, standing_in(self.folder):
            exec(code, self.names)
        return out.getvalue()

    def bash(self, block: Block) -> str:
        """Run a bash block in a real shell; a command that fails ends it."""
        where = f"{block.page}, line {block.line}"
        with socket.create_server(("127.0.0.1", 0)) as server, tempfile.TemporaryDirectory() as scratch:
            shim = Path(scratch) / "mole"
            shim.write_text(SHIM.format(python=sys.executable, port=server.getsockname()[1]), encoding="utf-8")
            shim.chmod(0o755)
            environment = {**os.environ, "PATH": f"{scratch}{os.pathsep}{os.environ['PATH']}"}
            with (Path(scratch) / "out").open("w+", encoding="utf-8") as out:
                command = ["bash", "-euo", "pipefail", "-c", block.code]
                shell = subprocess.Popen(command, cwd=self.folder, env=environment, stdout=out, stderr=out)
                server.settimeout(0.05)
                while shell.poll() is None:
                    with contextlib.suppress(TimeoutError):
                        answer(server)
                out.seek(0)
                printed = out.read()
        assert shell.returncode == 0, f"{where}: {printed}"
        return printed


def answer(server: socket.socket) -> None:
    """Do what one call of the shell's `mole` asks for."""
    connection, _ = server.accept()
    connection.settimeout(None)
    with connection, connection.makefile("rw", encoding="utf-8") as both:
        arguments, folder = json.loads(both.readline())
        with standing_in(Path(folder)):
            both.write(json.dumps(mole(arguments)) + "\n")
            both.flush()


def mole(arguments: list[str]) -> tuple[int, str, str]:
    """`mole …` in this process → exit code, stdout and stderr."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            code = parser.main(arguments)
        except SystemExit as exit:
            code = int(exit.code or 0)
    return code, out.getvalue(), err.getvalue()


@contextlib.contextmanager
def standing_in(folder: Path) -> Iterator[None]:
    """Work in another folder for a while."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)
