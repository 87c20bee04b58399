"""What the attacks share: a real studio, and a client without manners.

def test_something(stranger):             # speaks HTTP to a studio with an empty home, as nobody's page would
    stranger.call(place, [...])           # any handler of the page, named or not, by its place in the config
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import httpx
import pytest
from serving import Studio, free_port, serve, studio_command

T = TypeVar("T")
API = "/gradio_api"
EVIL = "http://evil.example"
PATIENCE = 240.0
"""Seconds after which an answer hangs; a busy machine may take a while."""


@dataclass
class Stranger:
    """Somebody who reaches the studio's port and speaks HTTP."""

    studio: Studio
    http: httpx.Client
    session: str = "stranger"
    config: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        answer = self.http.get("/config")
        self.config = answer.json() if answer.status_code == 200 else {}

    @property
    def endpoints(self) -> list[dict[str, Any]]:
        """Every handler of the page that runs here and not in the browser."""
        return [entry for entry in self.config["dependencies"] if entry["backend_fn"]]

    def named(self, name: str) -> dict[str, Any]:
        """The endpoint of that public name."""
        return next(entry for entry in self.endpoints if entry["api_name"] == name)

    def initial(self, endpoint: dict[str, Any]) -> list[Any]:
        """What the page itself would send when it has just been opened."""
        values = {part["id"]: part["props"].get("value") for part in self.config["components"]}
        return [values.get(number) for number in endpoint["inputs"]]

    def call(
        self, endpoint: dict[str, Any], data: Any, event: Any = None, patience: float = PATIENCE
    ) -> dict[str, Any]:
        """Call it as its kind is called: at once, or through the line → its output, or `{"error": …}`."""
        body = {"fn_index": endpoint["id"], "data": data, "session_hash": self.session, "event_data": event}
        text = json.dumps(body)  # writes NaN, as a hostile client would
        headers = {"content-type": "application/json"}
        if not endpoint["queue"]:
            answer = self.http.post(f"{API}/run/predict", content=text, headers=headers, timeout=patience)
            return outcome(answer)
        answer = self.http.post(f"{API}/queue/join", content=text, headers=headers, timeout=patience)
        if answer.status_code != 200:
            return outcome(answer)
        return self.wait(answer.json()["event_id"], patience)

    def wait(self, event: str, patience: float = PATIENCE) -> dict[str, Any]:
        """The last word on an event in the line."""
        deadline = time.monotonic() + patience
        with self.http.stream("GET", f"{API}/queue/data?session_hash={self.session}", timeout=patience) as lines:
            for line in lines.iter_lines():
                assert time.monotonic() < deadline, f"no answer within {patience} s"
                if not line.startswith("data:"):
                    continue
                message = json.loads(line[5:])
                if message.get("event_id") == event and message["msg"] == "process_completed":
                    return message["output"] or {"error": "nothing"}
                if message["msg"] in ("unexpected_error", "server_stopped"):
                    return {"error": message.get("message") or message["msg"]}
        return {"error": "the stream ended"}

    def log(self) -> str:
        """What the studio printed."""
        return (self.studio.home / "studio.log").read_text(encoding="utf-8", errors="replace")


def outcome(answer: httpx.Response) -> dict[str, Any]:
    """An answer's JSON, or its text as an error."""
    try:
        found = answer.json()
    except ValueError:
        return {"error": answer.text}
    if isinstance(found, dict) and answer.status_code == 200:
        return found
    told = found.get("error") or found.get("detail") if isinstance(found, dict) else found
    return {"error": told if isinstance(told, str) else json.dumps(told)}


def visiting(studio: Studio, **options: Any) -> Stranger:
    """A stranger at the door of a studio."""
    return Stranger(studio, httpx.Client(base_url=studio.url, timeout=PATIENCE, trust_env=False, **options))


def run_async(what: Coroutine[Any, Any, T]) -> T:
    """What a coroutine returns, from a thread of its own: the browser of other tests has an event loop in this one."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, what).result()


@pytest.fixture
def stranger(shared_studio: Studio) -> Iterator[Stranger]:
    """A stranger at the open studio's port."""
    found = visiting(shared_studio)
    yield found
    found.http.close()


@pytest.fixture(scope="module")
def space(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Studio]:
    """A studio that believes to be on a Space."""
    port = free_port()
    with serve(studio_command(port), port, tmp_path_factory.mktemp("space"), SPACE_ID="someone/mole") as running:
        yield running


def everything_in(folder: Path) -> dict[str, bytes]:
    """The files below a folder with their content."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
