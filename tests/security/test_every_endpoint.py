"""Every handler of the page, public or not, called directly with what no page would send."""

from __future__ import annotations

import json
import math
import os
import random
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import pytest
from serving import Studio

from .conftest import API, PATIENCE, Stranger, everything_in, visiting

pytestmark = pytest.mark.slow
T = TypeVar("T")

LONG = "A" * 200_000
DEEP: Any = "x"
for _ in range(150):
    DEEP = [DEEP]
MARKUP = "<img src=x onerror=alert(1)>"

HOSTILE: dict[str, Any] = {
    "nothing": None,
    "another kind": {"name": ["x"], "settings": 3, "muted": "all"},
    "a number": -1e308,
    "not a number": math.nan,
    "no end": math.inf,
    "a path up": "../../../../etc/passwd",
    "an absolute path": "/etc/passwd",
    "a NUL": "a\0b",
    "a giant": LONG,
    "a nest": DEEP,
    "markup": MARKUP,
    "half a character": "\ud800",
    "a file of the server's": {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}},
    "a list of such": [{"role": "user", "content": {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}}],
}
"""What takes the place of every argument at once."""


sampled = pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.soak)], ids=["some", "all"])
"""On each handler a sample of the attacks; in `make soak` all of them."""


def drawn(attacks: Sequence[T], count: int, every: bool, *seed: Any) -> list[T]:
    """So many of the attacks, the same every time for the same seed, or all of them."""
    return list(attacks) if every else random.Random(repr(seed)).sample(attacks, count)


def wrong(answer: dict[str, Any], public: bool = False) -> str:
    """What is wrong with an answer: an error must be one readable line, and on the page (not `public`) no HTML."""
    error = answer.get("error")
    if error is None:
        return ""
    unclear = "\n" in error or len(error) > 1000 or "Traceback" in error or 'File "' in error
    unclear = unclear or (MARKUP in error and not public)
    return f"not one line: {error[:300]!r}" if unclear else ""


def fault(stranger: Stranger, endpoint: dict[str, Any], data: Any, event: Any = None) -> str:
    """What is wrong with the answer of one endpoint; empty when nothing is."""
    return wrong(stranger.call(endpoint, data, event), endpoint["api_visibility"] == "public")


@pytest.fixture(autouse=True)
def nothing_breaks(shared_studio: Studio) -> Any:
    """After each attack the studio lives, its log has no traceback, and its home nothing that was not asked for."""
    before = (shared_studio.home / "studio.log").stat().st_size
    yield
    urllib.request.urlopen(shared_studio.url, timeout=PATIENCE).read()
    told = (shared_studio.home / "studio.log").read_text(encoding="utf-8", errors="replace")[before:]
    assert "Traceback" not in told, told[-3000:]
    assert not (shared_studio.home / "runs").exists() or not os.listdir(shared_studio.home / "runs")


@sampled
def test_every_argument_replaced(stranger: Stranger, every: bool) -> None:
    wrongs = []
    assert len(stranger.endpoints) > 60, "the page's handlers were not found"
    for endpoint in stranger.endpoints:
        for kind in drawn([*HOSTILE], 4, every, endpoint["id"]):
            value = HOSTILE[kind]
            if told := fault(stranger, endpoint, [value] * len(endpoint["inputs"]), {"name": value}):
                wrongs.append((endpoint["id"], endpoint["api_name"], kind, told))
    assert not wrongs, wrongs


@sampled
def test_one_argument_replaced_and_the_page_s_own_beside_it(stranger: Stranger, every: bool) -> None:
    """The first, the middle and the last argument in turn: most handlers look at these before they refuse others."""
    wrongs = []
    for endpoint in stranger.endpoints:
        own = stranger.initial(endpoint)
        if begins_something(endpoint, stranger):
            continue
        for place in sorted({0, len(own) // 2, len(own) - 1}) if own else ():
            for kind in drawn(["nothing", "another kind", "a path up"], 1, every, endpoint["id"], place):
                data = [*own[:place], HOSTILE[kind], *own[place + 1 :]]
                if told := fault(stranger, endpoint, data):
                    wrongs.append((endpoint["id"], endpoint["api_name"], place, kind, told))
    assert not wrongs, wrongs


def begins_something(endpoint: dict[str, Any], stranger: Stranger) -> bool:
    """Whether it is wired to a button that starts work: half-right arguments may rightly start it."""
    ids = {part["id"]: part["props"].get("elem_id") for part in stranger.config["components"]}
    starting = {"start", "grid-start", "preview", "preset-keep-yes", "preset-name", "preflight"}
    starting |= {"preflight-check", "preflight-measure", "preflight-wait"}
    return any(ids.get(target[0]) in starting for target in endpoint["targets"])


@sampled
def test_too_few_and_too_many_arguments(stranger: Stranger, every: bool) -> None:
    wrongs = []
    for endpoint in stranger.endpoints:
        for data in drawn([[], [None] * 200, "text", {"a": 1}, None], 1, every, endpoint["id"]):
            if told := fault(stranger, endpoint, data):
                wrongs.append((endpoint["id"], data, told))
    assert not wrongs, wrongs


@sampled
def test_events_that_no_click_makes(stranger: Stranger, every: bool) -> None:
    """What a click tells beside the arguments: which row, which button."""
    events = [None, {}, "x", {"name": "../x", "action": "up", "number": "../1", "compare": 3, "at": "x"}]
    wrongs = []
    for endpoint in stranger.endpoints:
        if begins_something(endpoint, stranger):
            continue
        for event in drawn(events, 1, every, endpoint["id"]):
            if told := fault(stranger, endpoint, stranger.initial(endpoint), event):
                wrongs.append((endpoint["id"], endpoint["targets"], event, told))
    assert not wrongs, wrongs


@pytest.mark.parametrize("data", [*HOSTILE.values(), ["../x", 1], ["x", math.inf], [["x"], -1]], ids=lambda _: "")
def test_the_functions_of_the_page_s_own_components(stranger: Stranger, data: Any) -> None:
    functions = [
        (part["id"], name) for part in stranger.config["components"] for name in part["props"].get("server_fns", ())
    ]
    assert functions
    for component, name in [*functions, (functions[0][0], "__class__"), (-1, functions[0][1]), ("x", "y")]:
        body = {"data": data, "component_id": component, "session_hash": "s", "fn_name": name}
        content = json.dumps(body)
        for kind in ("application/json", "text/plain"):
            answer = stranger.http.post(f"{API}/component_server", content=content, headers={"content-type": kind})
            assert answer.status_code < 600 and "Traceback" not in answer.text and "/etc/passwd:" not in answer.text


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("POST", "/run/predict", "{"),
        ("POST", "/run/predict", "[" * 100_000),
        ("POST", "/run/nothing", "{}"),
        ("POST", "/run/predict", '{"fn_index": 99999, "data": []}'),
        ("POST", "/run/predict", '{"fn_index": -1, "data": [], "session_hash": "../x"}'),
        ("POST", "/queue/join", '{"fn_index": 99999, "data": [], "session_hash": "s"}'),
        ("POST", "/queue/join", '{"fn_index": "x", "data": 3, "session_hash": ["s"]}'),
        ("POST", "/call/nothing", '{"data": []}'),
        ("POST", "/call/chat", '{"data": [1, 2, 3]}'),
        ("POST", "/cancel", '{"session_hash": "x", "fn_index": 1, "event_id": "../x"}'),
        ("POST", "/reset", "{}"),
        ("POST", "/stream/x", "{}"),
        ("POST", "/component_server", "null"),
        ("POST", "/vibe-edit", '{"prompt": "x"}'),
        ("POST", "/vibe-code", '{"code": "import os"}'),
        ("POST", "/undo-vibe-edit", '{"hash": "../../x"}'),
        ("GET", "/vibe-code", ""),
        ("GET", "/monitoring/summary", ""),
        ("GET", "/proxy=http://127.0.0.1:1/", ""),
        ("GET", "/queue/data?session_hash=nobody", ""),
        ("GET", "/call/chat/nothing", ""),
        ("GET", "/heartbeat/..%2f..%2fx", ""),
        ("GET", "/dev/reload", ""),
        ("GET", "/custom_component/../../x", ""),
    ],
)
def test_the_server_s_own_routes(stranger: Stranger, method: str, path: str, body: str) -> None:
    headers = {"content-type": "application/json"}
    with stranger.http.stream(method, API + path, content=body, headers=headers) as answer:
        if "event-stream" in answer.headers.get("content-type", ""):
            return  # it would go on for ever; that the studio lives is seen afterwards
        text = answer.read().decode("utf-8", errors="replace")
    assert "Traceback" not in text and 'File "' not in text
    assert not ("vibe" in path or "monitoring" in path or "proxy" in path) or answer.status_code >= 400


@sampled
def test_the_public_endpoints_by_their_names(stranger: Stranger, every: bool) -> None:
    """What programs call, one hostile argument after another beside sensible ones."""
    sensible = {
        "show_run": ["nobody"], "read_events": ["nobody", 0], "start_run": [{}], "stop_run": ["nobody"],
        "resume_run": ["nobody"], "continue_run": ["nobody", 4, "restart"], "list_runs": [], "list_targets": [],
        "chat": ["nobody", "hello", 1, 0.0, 1.0, 0, "", None],
    }  # fmt: skip
    public = [entry["api_name"] for entry in stranger.endpoints if entry["api_visibility"] == "public"]
    assert set(public) == set(sensible), "a new public endpoint is attacked here too"
    told = {}
    for name, own in sensible.items():
        for place in range(len(own)):
            for kind in drawn([*HOSTILE], 5, every, name, place):
                data = [*own[:place], HOSTILE[kind], *own[place + 1 :]]
                answer = stranger.call(stranger.named(name), data)
                told[name, place, kind] = wrong(answer, public=True) or ("" if "error" in answer else "no error")
    allowed = {
        key for key, text in told.items() if text == "no error" and (key[0] == "read_events" or key[0] == "chat")
    }
    assert not {key: text for key, text in told.items() if text and key not in allowed}


def test_on_a_space_nothing_of_the_page_starts_keeps_or_deletes_anything(space: Studio) -> None:
    """Each handler gets exactly what its own page would send, names and groups filled in: training would begin."""
    visitor = visiting(space)
    (space.home / "presets").mkdir()
    (space.home / "presets" / "theirs.yaml").write_text("training: {seed: 1}\n", encoding="utf-8")
    before = everything_in(space.home / "presets")
    names = {part["id"]: part["props"].get("elem_id") for part in visitor.config["components"]}
    given = {"preset-name": "mine", "preset": "theirs", "field-name": "mine", "grid-seeds": "0,1", "grid-group": "g"}
    for endpoint in visitor.endpoints:
        if endpoint["api_name"] == "chat" or "preview" in {names.get(target[0]) for target in endpoint["targets"]}:
            continue  # what a Space is for
        own = [
            given.get(names.get(number, ""), value)
            for number, value in zip(endpoint["inputs"], visitor.initial(endpoint), strict=True)
        ]
        assert not wrong(visitor.call(endpoint, own, {"name": "mine", "action": "up", "number": 1, "at": 0}))
    for name, data in (
        ("start_run", [{"data": {"path": "x"}}]),
        ("stop_run", ["x"]),
        ("resume_run", ["x"]),
        ("continue_run", ["x", 4, "restart"]),
    ):
        assert "switched off" in visitor.call(visitor.named(name), data)["error"]
    made = {path.name for path in space.home.iterdir()} - {"studio.log", "presets", "uploads", "models", "tmp"}
    assert not made, made
    assert everything_in(space.home / "presets") == before
    assert "Traceback" not in visitor.log()


@pytest.mark.parametrize("path", ["/etc/hostname.json", "{secret}"])
def test_on_a_space_nobody_reads_the_machine_s_data_files(space: Studio, tmp_path: Path, path: str) -> None:
    """The preview shows rows of the samples and of uploads only, and of no model but the default."""
    secret = tmp_path / "secret.jsonl"
    secret.write_text('{"prompt": "the password is", "completion": "swordfish"}\n' * 5, encoding="utf-8")
    visitor = visiting(space)
    names = {part["id"]: part["props"].get("elem_id") for part in visitor.config["components"]}
    for endpoint in visitor.endpoints:
        if "field-data-path" not in {names.get(number) for number in endpoint["inputs"]}:
            continue
        own = [
            path.format(secret=secret) if names.get(number) in ("field-data-path", "field-data-eval_path") else value
            for number, value in zip(endpoint["inputs"], visitor.initial(endpoint), strict=True)
        ]
        answer = visitor.call(endpoint, own)
        assert "swordfish" not in str(answer) and "prompt" not in str(answer.get("data", [{}])[0])
