"""Protects the studio: requests from its own page only, under its own host names, and of bounded size; slow log-ins.

A browser lets any web page send requests to this machine. That page cannot read the answers, but a request that starts
a run has started it. A host name that is made to point to this machine (DNS rebinding) could even read them.
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
from urllib.parse import SplitResult, urlsplit

import httpx
from fastapi import HTTPException
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse

from app import settings
from app.services.messages import short_message
from mole.cli.auth import is_loopback
from mole.core import limits

CLIENT: ContextVar[str] = ContextVar("client", default="")
"""The address that the current request came from."""
POLICY = (
    "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:{more}; "
    "object-src 'none'; base-uri 'self'; form-action 'self'{frame}"
)
"""The page loads nothing from other hosts, whatever a model writes into it: an address could carry a secret away."""
ADDRESS_HEADERS = ("origin", "host", "x-forwarded-host", "x-gradio-server")
"""The request headers that are read as addresses: by `AccessRules`, and by Gradio for the page's own address."""
UPLOAD_PATH = "/gradio_api/upload"


@dataclass
class AccessRules:
    """Which requests the studio answers.

    Attributes:
        local: it listens on this machine only, so requests must be for a loopback host.
        names: further host names: of a proxy in front of it, or of a public link.
        anywhere: pages of any origin may use it: on a Space, where everything is public.
    """

    local: bool = True
    names: set[str] = field(default_factory=set)
    anywhere: bool = False

    def refusal(self, headers: Headers) -> str:
        """Why a request is rejected; empty if it is not."""
        host = headers.get("host", "")
        name = hostname(f"//{host}")
        if self.local and not is_loopback(name) and name not in self.names:
            return "This studio answers on this machine only: open it as http://127.0.0.1 or http://localhost."
        for header in ADDRESS_HEADERS:
            if not all(map(is_address, headers.getlist(header))):
                return f"Request rejected: its header {header} holds no valid address."
        for origin in [] if self.anywhere else headers.getlist("origin"):
            if split(origin).netloc != host and hostname(origin) not in self.names:
                return "Cross-origin request rejected: only the studio's own page may send it."
        return ""


def is_address(value: str) -> bool:
    """Whether a header can be read as an address, or as a list of them: `host`, `host:port`, `scheme://host:port`.

    Gradio builds the page's own address from some headers with httpx, and starlette from `Host` with urllib; each
    rejects what the other accepts.
    """
    first = value.partition(",")[0].strip()
    text = first if "://" in first else f"http://{first}"
    try:
        return value.isascii() and str(httpx.URL(text)) != "" and (urlsplit(text).port or 0) >= 0
    except (httpx.InvalidURL, ValueError):
        return False


def hostname(address: str) -> str:
    """The host name in an address, in lower case; empty if there is none."""
    return split(address).hostname or ""


def split(address: str) -> SplitResult:
    """The parts of an address; all empty if it is none."""
    try:
        return urlsplit(address)
    except ValueError:
        return urlsplit("")


class Guard:
    """ASGI middleware: rejects cross-origin and oversized requests, and reports internal errors in one line."""

    def __init__(self, app: Any, rules: AccessRules) -> None:
        self.app, self.rules = app, rules
        self.policy = POLICY.format(
            more=" https://huggingface.co" if rules.anywhere else "",
            frame="" if rules.anywhere else "; frame-ancestors 'self'",
        )

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        started = False

        async def send_protected(message: Any) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                out = MutableHeaders(scope=message)
                out["Content-Security-Policy"] = self.policy
                out["X-Content-Type-Options"] = "nosniff"
                out["Referrer-Policy"] = "same-origin"
            await send(message)

        refusal, most = self.rules.refusal(headers), max_bytes(scope["path"])
        if refusal or header_number(headers.get("content-length")) > most:
            text, status = (refusal, 403) if refusal else (f"This request is larger than {most >> 20} MB.", 413)
            await PlainTextResponse(text, status)(scope, receive, send_protected)
            return
        CLIENT.set((scope.get("client") or ("",))[0])
        try:
            await self.app(scope, limited_body(receive, most), send_protected)
        except Exception as error:
            log_error(error, scope["path"])
            if not started:
                failed = PlainTextResponse("The studio cannot handle this request.", 500)
                await failed(scope, receive, send_protected)


def max_bytes(path: str) -> int:
    """The maximum size of a request to this path."""
    return limits.UPLOAD_BYTES + (1 << 20) if path.rstrip("/").endswith(UPLOAD_PATH) else limits.REQUEST_BYTES


def header_number(text: str | None) -> int:
    """A header's value as a whole number; 0 if it is none."""
    return int(text) if text and text.isascii() and text.isdigit() and len(text) < 20 else 0


def limited_body(receive: Any, most: int) -> Any:
    """ASGI's `receive`, which raises once a request without a length has sent more than `most` bytes."""
    read = 0

    async def receive_limited() -> Any:
        nonlocal read
        message = await receive()
        read += len(message.get("body", b""))
        if read > most:
            raise HTTPException(413, f"This request is larger than {most >> 20} MB.")
        return message

    return receive_limited


def log_error(error: BaseException, where: str) -> None:
    """Write an error to the studio's log in one line, with `--debug` also its traceback."""
    text = short_message(str(error), 300)
    print(f"mole studio: {where[:80]!r}: {type(error).__name__}: {text}", file=sys.stderr, flush=True)
    if settings.debug():
        traceback.print_exception(error)


class Login:
    """Checks name and password in constant time; after a failure the next check from that address is delayed.

    The delays are kept by address: guessing slows down neither other addresses nor users who are logged in. No thread
    is blocked while an attempt waits.
    """

    FIRST, LONGEST, PATIENCE, FORGET = 0.5, 8.0, 30.0, 900.0
    """Seconds: delay after the first failure, longest delay, longest queue of one address before attempts are rejected
    unchecked, and time after which failures are forgotten."""
    ADDRESSES = 4096

    def __init__(self, user: str, password: str) -> None:
        self._right = digest(user) + digest(password)
        self._tries: OrderedDict[str, tuple[int, float]] = OrderedDict()

    async def check(self, user: str, password: str) -> bool:
        """Whether they are right, after this address's delay. Raises `HTTPException` when too many attempts wait."""
        address, now = CLIENT.get(), time.monotonic()
        failed, free = self._tries.pop(address, (0, now))
        if now - free > self.FORGET:
            failed, free = 0, now
        begins = max(now, free)
        late = begins - now > self.PATIENCE
        # The delay is booked before the result is known, so that simultaneous guesses wait for each other.
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
    """A text as bytes of a fixed length, to be compared in constant time."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
