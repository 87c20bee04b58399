"""What stands before the studio: only its own page may drive it, under names it has, in requests of bounded size.

A browser lets any web page send requests to this machine; that page reads no answer, but a request that starts a run
has started it. And a name that is made to point here (DNS rebinding) would even read.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import sys
import time
import traceback
from collections import OrderedDict
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from fastapi import HTTPException
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse

from app import settings
from app.services.messages import short_message
from mole.cli.auth import is_loopback
from mole.core import limits

CLIENT: ContextVar[str] = ContextVar("client", default="")
"""The address the present request came from."""
POLICY = (
    "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:{more}; "
    "object-src 'none'; base-uri 'self'; form-action 'self'{frame}"
)
"""The page loads nothing from elsewhere, whatever a model writes into it: an address can carry a secret away."""
UPLOAD_PATH = "/gradio_api/upload"


@dataclass
class Doors:
    """Under which names the studio answers.

    Attributes:
        local: it listens on this machine only, so no other name can be meant.
        names: further names, of a proxy before it or a public link.
        anywhere: any page may drive it: a Space, where there is nothing to be had that is not public.
    """

    local: bool = True
    names: set[str] = field(default_factory=set)
    anywhere: bool = False

    def refusal(self, headers: Headers) -> str:
        """Why a request is not answered; empty when it is."""
        host, origin = headers.get("host", ""), headers.get("origin")
        name = hostname(f"//{host}")
        if self.local and not is_loopback(name) and name not in self.names:
            return "This studio answers on this machine only: open it as http://127.0.0.1 or http://localhost."
        if origin is None or self.anywhere or urlsplit(origin).netloc == host or hostname(origin) in self.names:
            return ""
        return "Only the studio's own page may ask this; the request came from a page of another origin."


def hostname(address: str) -> str:
    """The host in an address, in lower case; empty when it is none."""
    try:
        return urlsplit(address).hostname or ""
    except ValueError:
        return ""


class Guard:
    """ASGI middleware: refuses strangers and giants, and says in one line what went wrong inside."""

    def __init__(self, app: Any, doors: Doors) -> None:
        self.app, self.doors = app, doors
        self.policy = POLICY.format(
            more=" https://huggingface.co" if doors.anywhere else "",
            frame="" if doors.anywhere else "; frame-ancestors 'self'",
        )

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        begun = False

        async def answer(message: Any) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                out = MutableHeaders(scope=message)
                out["Content-Security-Policy"] = self.policy
                out["X-Content-Type-Options"] = "nosniff"
                out["Referrer-Policy"] = "same-origin"
            await send(message)

        refusal, most = self.doors.refusal(headers), largest(scope["path"])
        if refusal or int_of(headers.get("content-length")) > most:
            text, status = (refusal, 403) if refusal else (f"This request is larger than {most >> 20} MB.", 413)
            await PlainTextResponse(text, status)(scope, receive, answer)
            return
        CLIENT.set((scope.get("client") or ("",))[0])
        try:
            await self.app(scope, bounded(receive, most), answer)
        except Exception as error:
            log_error(error, scope["path"])
            if not begun:
                await PlainTextResponse("The studio cannot do anything with this request.", 500)(scope, receive, answer)


def largest(path: str) -> int:
    """The most bytes a request to this path may have."""
    return limits.UPLOAD_BYTES + (1 << 20) if path.rstrip("/").endswith(UPLOAD_PATH) else limits.REQUEST_BYTES


def int_of(text: str | None) -> int:
    """The whole number a header holds; 0 when it holds none."""
    return int(text) if text and text.isascii() and text.isdigit() and len(text) < 20 else 0


def bounded(receive: Any, most: int) -> Any:
    """The body of a request that does not tell its length, refused when it becomes too long."""
    read = 0

    async def part() -> Any:
        nonlocal read
        message = await receive()
        read += len(message.get("body", b""))
        if read > most:
            raise HTTPException(413, f"This request is larger than {most >> 20} MB.")
        return message

    return part


def log_error(error: BaseException, where: str) -> None:
    """Tell the studio's log in one line what went wrong; with `--debug` where."""
    text = short_message(str(error), 300)
    print(f"mole studio: {where[:80]!r}: {type(error).__name__}: {text}", file=sys.stderr, flush=True)
    if settings.debug():
        traceback.print_exception(error)


class Login:
    """Whether a name and a password are right, in constant time; who has failed waits before the next answer.

    The waits are kept by address: whoever guesses slows down themselves, not those at other addresses, nor anybody who
    is logged in. Nothing waits in a thread.
    """

    FIRST, LONGEST, PATIENCE, FORGET = 0.5, 8.0, 30.0, 900.0
    """Seconds: after the first failure, at most, until one address's next try is refused unseen, until all is well."""
    ADDRESSES = 4096

    def __init__(self, user: str, password: str) -> None:
        self._right = digest(user) + digest(password)
        self._tries: OrderedDict[str, tuple[int, float]] = OrderedDict()

    async def check(self, user: str, password: str) -> bool:
        """Whether they are right, once it is this address's turn. Raises `HTTPException` when too many wait."""
        address, now = CLIENT.get(), time.monotonic()
        failed, free = self._tries.pop(address, (0, now))
        if now - free > self.FORGET:
            failed, free = 0, now
        begins = max(now, free)
        late = begins - now > self.PATIENCE
        # The place in line is taken before the answer is known, so that guesses at the same time wait for each other.
        wait = 0.0 if late else min(self.FIRST * 2 ** min(failed, 10), self.LONGEST)
        self._tries[address] = (failed + (not late), begins + wait)
        while len(self._tries) > self.ADDRESSES:
            self._tries.popitem(last=False)
        if late:
            raise HTTPException(429, "Too many log-ins were tried from this address; wait half a minute.")
        await asyncio.sleep(begins - now)
        right = hmac.compare_digest(digest(user) + digest(password), self._right)
        if right:
            self._tries.pop(address, None)
        return right


def digest(text: str) -> bytes:
    """A text as bytes of one length."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
