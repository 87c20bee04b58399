"""The door: where the studio listens, its password, and the web pages that would drive it from elsewhere."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import selectors
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
from fastapi import HTTPException
from serving import ROOT, Studio, free_port, serve, studio_command

from app import guard, main
from app.guard import Login
from mole.cli.auth import check_access, is_loopback
from mole.core.errors import InputError

from .conftest import API, EVIL, PATIENCE, Stranger, visiting

USER, PASSWORD = "me", "correct horse: battery"


# ---------------------------------------------------------------------------------------------------------
# Where it listens


def test_it_listens_on_this_machine_only(shared_studio: Studio) -> None:
    port = int(shared_studio.url.rpartition(":")[2])
    listening = {
        found.laddr.ip
        for found in psutil.net_connections("tcp")
        if found.laddr and found.laddr.port == port and found.status == psutil.CONN_LISTEN
    }
    assert listening == {"127.0.0.1"}


@pytest.mark.parametrize(
    "given",
    [
        ["--host", "0.0.0.0"], ["--host", "::"], ["--host", "192.168.1.5"], ["--host", "studio.example"],
        ["--host", "localhost.evil.example"], ["--host", ""], ["--share"], ["--host", "127.0.0.1", "--share"],
    ],
)  # fmt: skip
def test_a_studio_others_can_reach_needs_a_password(home: Path, given: list[str]) -> None:
    """One line, exit code 2, and nothing was served: it says so before Gradio is even imported."""
    command = [sys.executable, "-m", "mole.cli", "studio", *given]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE, stdin=subprocess.DEVNULL)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"mole: --(host|share).* without --auth .*--allow-anyone.*\n", done.stderr), done.stderr


def test_unless_that_is_what_one_says(home: Path) -> None:
    check_access("0.0.0.0", auth=True, share=True, allow_anyone=False)
    check_access("0.0.0.0", auth=False, share=True, allow_anyone=True)
    for host in ("127.0.0.1", "127.8.8.8", "localhost", "LOCALHOST", "::1", "[::1]"):
        check_access(host, auth=False, share=False, allow_anyone=False)
    assert not any(map(is_loopback, ("", "0", "0.0.0.0", "::", "10.0.0.1", "127.0.0.1.evil.example", "1")))
    command = [sys.executable, "-m", "mole.cli", "studio", "--help"]
    told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE).stdout
    assert "--allow-anyone" in told and "$MOLE_AUTH" in told


def test_open_to_anyone_when_told_so_on_all_addresses(home: Path) -> None:
    port = free_port()
    with serve([*studio_command(port), "--host", "0.0.0.0", "--allow-anyone"], port, home) as studio:
        assert visiting(studio).http.get("/config", headers={"host": "studio.example"}).status_code == 200


@pytest.mark.parametrize("given", ["", ":", "me:", ":secret"])
def test_half_a_password_is_none(home: Path, given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from mole.cli import auth

    monkeypatch.setenv("MOLE_AUTH", "other:password")
    with pytest.raises(InputError, match="USER:PASS, neither of them empty"):
        auth.read_credentials(given)
    assert "MOLE_AUTH" not in os.environ, "what is started later does not inherit it"


# ---------------------------------------------------------------------------------------------------------
# The password


@pytest.fixture(scope="module", params=["argument", "environment"])
def locked(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Studio]:
    """A studio with a password, given both ways."""
    port, home = free_port(), tmp_path_factory.mktemp("locked")
    given = f"{USER}:{PASSWORD}"
    command = studio_command(port) + (["--auth", given] if request.param == "argument" else [])
    environment = {} if request.param == "argument" else {"MOLE_AUTH": given}
    with serve(command, port, home, **environment) as running:
        yield running


def test_the_password_is_not_in_the_list_of_processes(locked: Studio) -> None:
    port = locked.url.rpartition(":")[2]
    found = [process for process in psutil.process_iter(["cmdline"]) if port in (process.info["cmdline"] or [])]
    assert found
    assert not [process for process in found if PASSWORD in " ".join(process.info["cmdline"])]


def test_nothing_is_given_to_those_outside(locked: Studio) -> None:
    """Without the cookie no route that tells or does anything answers: no config, no handler, no file, no upload."""
    outside = visiting(locked)
    asked = {
        "GET": ["/config", f"{API}/info", f"{API}/openapi.json", f"{API}/queue/status", f"{API}/file=/etc/passwd",
                f"{API}/queue/data?session_hash=x", f"{API}/call/list_runs/x", f"{API}/dev/reload",
                "/monitoring/summary"],
        "POST": [f"{API}/run/predict", f"{API}/api/predict", f"{API}/call/list_runs", f"{API}/queue/join",
                 f"{API}/upload", f"{API}/component_server", f"{API}/call/v2/list_runs"],
    }  # fmt: skip
    for method, paths in asked.items():
        for path in paths:
            for cookie in ("", "access-token=x", "access-token-unsecure-=x; access-token-="):
                content = '{"fn_index": 0, "data": [], "session_hash": "x"}' if method == "POST" else None
                headers = {"cookie": cookie, "content-type": "application/json"}
                answer = outside.http.request(method, path, content=content, headers=headers)
                assert answer.status_code == 401, (method, path, answer.status_code, answer.text[:200])
    assert "backend_fn" not in outside.http.get("/").text


def test_the_right_password_opens(locked: Studio) -> None:
    outside = visiting(locked)
    for user, password in ((USER, "wrong"), (USER, ""), ("\ufeff", "\0")):
        answer = outside.http.post("/login", data={"username": user, "password": password})
        assert answer.status_code in (400, 422), answer.text
    answer = outside.http.post("/login", data={"username": USER, "password": PASSWORD})
    assert answer.json() == {"success": True}
    token = answer.cookies
    assert all("httponly" in value.lower() for name, value in answer.headers.multi_items() if name == "set-cookie")
    unsecure = {name: value for name, value in token.items() if "unsecure" in name}
    assert visiting(locked, cookies=unsecure).config["dependencies"]


class Clock:
    """Time that only `Jumping` moves on."""

    now = 1_000_000.0

    def monotonic(self) -> float:
        return self.now


class Jumping(selectors.DefaultSelector):
    """What an event loop waits with: as soon as nobody has anything to do, it is the time that is waited for."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock = clock

    def select(self, timeout: float | None = None) -> Any:
        self.clock.now += max(timeout or 0.0, 0.0)
        return super().select(timeout if timeout is None else 0.0)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock of the log-ins in a test: their waits are exact and take no time."""
    made = Clock()
    monkeypatch.setattr(guard, "time", made)
    return made


def tries(login: Login, clock: Clock, *attempts: tuple[str, str, str]) -> list[tuple[bool | int, float]]:
    """What a log-in answers to (address, user, password) asked all at once, and after how many seconds."""

    async def one(address: str, user: str, password: str) -> tuple[bool | int, float]:
        guard.CLIENT.set(address)
        begun = clock.now
        try:
            answer: bool | int = await login.check(user, password)
        except HTTPException as error:
            answer = error.status_code
        return answer, clock.now - begun

    async def together() -> list[Any]:
        return await asyncio.gather(*(asyncio.create_task(one(*attempt)) for attempt in attempts))

    def in_a_loop() -> list[Any]:
        loop = asyncio.SelectorEventLoop(Jumping(clock))
        loop.time = clock.monotonic  # type: ignore[method-assign]
        with contextlib.closing(loop):
            return loop.run_until_complete(together())

    with ThreadPoolExecutor(1) as thread:  # the browser of other tests has an event loop in this one
        return thread.submit(in_a_loop).result()


def test_guesses_wait_for_each_other_and_longer_each_time(clock: Clock) -> None:
    """Asked all at once, for nobody has to wait for an answer before guessing again."""
    guesses = [("6.6.6.6", USER, f"guess {number}") for number in range(300)]
    answers = tries(Login(USER, PASSWORD), clock, *guesses, ("6.6.6.6", USER, PASSWORD))
    waited = [seconds for answer, seconds in answers if answer is False]
    assert waited == pytest.approx([0, 0.5, 1.5, 3.5, 7.5, 15.5, 23.5])
    assert {answer for answer, _ in answers[len(waited) :]} == {429}, "the line is short: it takes no memory"
    assert answers[-1][0] == 429, "not even the right one, from there and now: or guessing at once would find it"


def test_who_guesses_locks_nobody_else_out(clock: Clock) -> None:
    login = Login(USER, PASSWORD)
    answers = tries(login, clock, *[("6.6.6.6", USER, "guess")] * 100, ("1.2.3.4", USER, PASSWORD))
    assert answers[-1] == (True, 0.0)
    clock.now += Login.PATIENCE + Login.LONGEST
    assert tries(login, clock, ("6.6.6.6", USER, PASSWORD)) == [(True, 0.0)], "who guessed gets in too, later"
    assert tries(login, clock, ("6.6.6.6", USER, "a slip")) == [(False, 0.0)]
    ((answer, seconds),) = tries(login, clock, ("6.6.6.6", USER, PASSWORD))
    assert answer is True and seconds == pytest.approx(Login.FIRST), "after which a slip is a first one again"


def test_the_table_of_addresses_is_bounded(clock: Clock) -> None:
    login = Login(USER, PASSWORD)
    login.ADDRESSES = 50  # type: ignore[misc]
    tries(login, clock, *[(f"2001:db8::{number:x}", USER, "guess") for number in range(500)])
    assert len(login._tries) == 50


def test_the_comparison_takes_as_long_for_a_near_miss(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not measured, which no machine under load could do: what is compared has one length, by `compare_digest`."""
    seen = []
    compare = guard.hmac.compare_digest
    monkeypatch.setattr(guard.hmac, "compare_digest", lambda a, b: seen.append((len(a), len(b))) or compare(a, b))
    misses = [
        (USER, "c"), (USER, PASSWORD[:-1]), ("m", PASSWORD), ("other", PASSWORD), (USER + PASSWORD, " "),
        ("\ufeff", "\0"), ("x" * 10_000, "y" * 10_000), ("\ud800", ""),
    ]  # fmt: skip
    login = Login(USER, PASSWORD)
    for number, (user, password) in enumerate(misses):
        assert tries(login, clock, (f"6.6.6.{number}", user, password)) == [(False, 0.0)]
    assert seen == [(64, 64)] * len(misses)


# ---------------------------------------------------------------------------------------------------------
# Other pages in the same browser


def test_the_page_answers_under_its_own_names_only(stranger: Stranger) -> None:
    """A name of the attacker's may be made to point to this machine: then its page would be the studio's own origin."""
    port = stranger.studio.url.rpartition(":")[2]
    for host in (
        "evil.example", f"evil.example:{port}", f"127.0.0.1.evil.example:{port}", f"localhost.evil.example:{port}",
        f"127.0.0.1@evil.example:{port}", f"[::ffff:6.6.6.6]:{port}", "", "0.0.0.0", f"192.168.0.1:{port}",
    ):  # fmt: skip
        for path in ("/", "/config", f"{API}/info", "/theme.css"):
            answer = stranger.http.get(path, headers={"host": host})
            assert answer.status_code in (400, 403), (host, path)
            assert "\n" not in answer.text.strip() and "dependencies" not in answer.text
    for host in (f"127.0.0.1:{port}", f"localhost:{port}", f"[::1]:{port}", "LOCALHOST"):
        assert stranger.http.get("/config", headers={"host": host}).status_code == 200


@pytest.mark.parametrize(
    "origin", [EVIL, "null", "file://", "http://127.0.0.1:1", "http://localhost.evil.example", "x", ""]
)
@pytest.mark.parametrize("kind", ["application/json", "text/plain", "application/x-www-form-urlencoded"])
def test_a_page_of_another_origin_does_nothing_here(stranger: Stranger, origin: str, kind: str) -> None:
    """A browser sends such requests without asking when they look like a form; a run would be started all the same."""
    headers = {"origin": origin, "content-type": kind}
    body = '{"fn_index": 0, "data": [], "session_hash": "x", "component_id": 1, "fn_name": "whole"}'
    for path in ("/run/predict", "/queue/join", "/call/list_runs", "/component_server", "/cancel", "/upload", "/reset"):
        answer = stranger.http.post(API + path, content=body, headers=headers)
        assert answer.status_code == 403 and "origin" in answer.text, (path, answer.text)
        assert "127.0.0.1" in origin or answer.headers.get("access-control-allow-origin") is None
    asked = {"access-control-request-method": "POST", "access-control-request-headers": "content-type"}
    before = stranger.http.options(f"{API}/queue/join", headers={"origin": origin, **asked})
    assert "127.0.0.1" in origin or before.headers.get("access-control-allow-origin") is None


def test_also_with_a_cookie(locked: Studio) -> None:
    """Who is logged in, and opens a hostile page beside the studio, has it drive nothing."""
    inside = visiting(locked)
    assert inside.http.post("/login", data={"username": USER, "password": PASSWORD}).status_code == 200
    cookies = {name: value for name, value in inside.http.cookies.items() if "unsecure" in name}
    for path in ("/queue/join", "/component_server", "/upload"):
        headers = {"origin": EVIL, "content-type": "text/plain"}
        answer = visiting(locked, cookies=cookies).http.post(API + path, content="{}", headers=headers)
        assert answer.status_code == 403
    own = {"origin": locked.url, "content-type": "application/json"}
    answer = visiting(locked, cookies=cookies).http.get("/config", headers=own)
    assert answer.status_code == 200, "the studio's own page says where it is from, too"


NO_ADDRESS = [
    b"http://[", b"http://[::1", b"http://]", b"[::1", b"http://[v1.x]", b"http://127.0.0.1:abc", b"127.0.0.1:99999",
    b"http://[::1]:99999", "http://\u00fc".encode(), b"a\xe2\x84\x80b", b"\xff\xfe", b"http://x,[", b"\t", b"", b"//",
    b"http://user:secret@evil.example", b"a" * 7000, b"http://" + b"a." * 3000, b"%00", b"localhost:-1",
]  # fmt: skip
NO_VALUE = [
    b"", b"\xff", b"9" * 400, b"-1", b"1e3", b"bytes=9-1", b"bytes=" + b"0-0," * 900, b"=;=;", b'access-token="',
    b"a=b; " * 900, b"multipart/form-data", b"multipart/form-data; boundary=\xff", b"text/\x80; charset=nonsense",
]  # fmt: skip
ADDRESSES = ("Host", "Origin", "Referer", "X-Forwarded-Host", "X-Gradio-Server", "Forwarded")
VALUES = (
    "Content-Length", "Content-Type", "Cookie", "Range", "If-Range", "X-Forwarded-For", "X-Forwarded-Proto",
    "X-Gradio-User", "Sec-Fetch-Site", "Accept-Encoding", "Accept-Language", "Authorization", "Transfer-Encoding",
)  # fmt: skip


def status_line(port: int, first: str, lines: list[bytes]) -> str:
    """The first line of the answer to a request of these very bytes; httpx would not send some of them."""
    text = b"".join(line + b"\r\n" for line in [f"{first} HTTP/1.1".encode(), *lines, b"Connection: close", b""])
    with socket.create_connection(("127.0.0.1", port), PATIENCE) as connection:
        connection.sendall(text)
        return connection.makefile("rb").readline().decode()


@pytest.mark.parametrize("inside", [False, True], ids=["before log-in", "after log-in"])
def test_no_header_ends_in_a_traceback(locked: Studio, inside: bool) -> None:
    """Headers that are no address, number, range or cookie, once and twice: refused or ignored, one line each."""
    port, cookie = int(locked.url.rpartition(":")[2]), b""
    if inside:
        answer = visiting(locked).http.post("/login", data={"username": USER, "password": PASSWORD})
        cookie = "; ".join(f"{name}={value}" for name, value in answer.cookies.items()).encode()
    asked = [(name, value) for name in ADDRESSES for value in NO_ADDRESS]
    asked += [(name, value) for name in VALUES for value in NO_VALUE]
    for first in ("GET /", "GET /theme.css", f"POST {API}/upload"):
        for name, value in asked if first != "GET /" else asked[: len(ADDRESSES) * len(NO_ADDRESS)]:
            for again in ([], [f"{name}: http://x".encode()]) if first != "GET /" else ([],):
                lines = [f"{name}: ".encode() + value, *again]
                lines += [b"Host: 127.0.0.1"] if name != "Host" else []
                lines += [b"Cookie: " + cookie] if name != "Cookie" else []
                lines += [b"Content-Length: 0"] if name not in ("Content-Length", "Transfer-Encoding") else []
                if name in ("Content-Length", "Transfer-Encoding") and first.startswith("POST") and not again:
                    continue  # the studio would wait for the body
                status = status_line(port, first, lines)
                assert re.match(r"HTTP/1.1 [1-4]\d\d ", status), (first, name, value, status)
    log = (locked.home / "studio.log").read_text(errors="replace")
    assert "Traceback" not in log and "InvalidURL" not in log, log[-2000:]


def test_a_proxy_s_name_can_be_given(monkeypatch: pytest.MonkeyPatch) -> None:
    from starlette.datastructures import Headers

    monkeypatch.setenv("MOLE_HOSTS", "Studio.example, other.example")
    rules = guard.AccessRules(local=True, names=main.settings.names())
    assert not rules.refusal(Headers({"host": "studio.example", "origin": "https://studio.example"}))
    assert rules.refusal(Headers({"host": "third.example"})) and rules.refusal(
        Headers({"host": "127.0.0.1", "origin": EVIL})
    )


def test_the_page_may_load_nothing_from_elsewhere_and_be_framed_by_nobody(stranger: Stranger) -> None:
    for path in ("/", "/config", f"{API}/file=/etc/passwd", "/nothing"):
        policy = stranger.http.get(path).headers["content-security-policy"]
        assert policy.startswith("default-src 'self'") and "frame-ancestors 'self'" in policy
        assert not re.search(r"https?:|\*", policy)
