"""A Space on ZeroGPU: the real package `spaces`, started as a Space starts it; `zerogpu.py` says what stands in.

The default model is a tiny one that never ends a reply, in the place of the embedded one, and "put on the GPU" at the
start; a run's adapter is loaded by the call that needs it. With the embedded model and the demo: `pytest -m soak`.
"""

from __future__ import annotations

import base64
import json
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from math import ceil
from pathlib import Path
from typing import Any

import pytest
from architectures import with_room
from browsing import LOGS, PATIENCE, quiet
from gradio_client import Client
from gradio_client.exceptions import AppError
from playwright.sync_api import Page, expect
from serving import Studio, free_port, serve, until
from zerogpu import LONGEST, Call, DeviceApi, space, space_command

from app.services.chat_targets import DEFAULT_TARGET
from mole.core import limits

pytestmark = [pytest.mark.ui, pytest.mark.soak]

VISITORS, GPUS, TOKENS = 20, 4, 12


@pytest.fixture(scope="module")
def devices() -> Iterator[DeviceApi]:
    with DeviceApi(gpus=GPUS, slower=20) as api:
        yield api


@pytest.fixture(scope="module")
def on_space(
    devices: DeviceApi, tmp_path_factory: pytest.TempPathFactory, tiny_adapter: Path, tiny_folder: Path
) -> Iterator[Studio]:
    """A Space whose default model is `tiny_folder`, with a finished run `tiny`."""
    from mole import models, runs
    from mole.config import AdapterConfig, RunConfig
    from mole.core import checkpoint

    home = tmp_path_factory.mktemp("space") / "home"
    base = with_room(tiny_folder, tmp_path_factory.mktemp("long") / "tiny")
    checkpoint.write_folder(home / "models" / models.EMBEDDED, lambda aside: copy(base, aside), step=0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOLE_HOME", str(home))
        run = runs.create(RunConfig(name="tiny", adapter=AdapterConfig(num_experts=3, r=2)))
        checkpoint.write_folder(run.adapter_dir, lambda aside: adapt(tiny_adapter, aside), step=4)
        run.append_event("finished", 4, metrics={})
    port = free_port()
    with serve(space_command(), port, home, **space(devices, port, home)) as running:
        yield running


def copy(source: Path, folder: Path) -> None:
    shutil.copytree(source, folder, dirs_exist_ok=True)


def adapt(adapter: Path, folder: Path) -> None:
    """A copy of an adapter, on the default model."""
    from mole import models

    copy(adapter, folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = models.EMBEDDED
    (folder / "adapter_config.json").write_text(json.dumps(config))


def visitor_token(number: int) -> str:
    """The token that the platform adds to a visitor's requests."""
    payload = base64.urlsafe_b64encode(json.dumps({"visitor": number}).encode()).decode().rstrip("=")
    return f"e30.{payload}.signature"


def visit(studio: Studio, number: int = 0) -> Client:
    patient = {"timeout": PATIENCE / 1000}
    return Client(studio.url, verbose=False, headers={"X-IP-Token": visitor_token(number)}, httpx_kwargs=patient)


def open_chat(studio: Studio, page: Page, target: str) -> None:
    """The Space's page, which shows the chat first, with a target chosen."""
    studio.open(page)
    page.click("#target input")
    page.locator("[role=option]:visible").filter(has_text=target).first.click()
    quiet(page)


def ask(page: Page, text: str) -> None:
    page.fill("#message textarea", text)
    page.keyboard.press("Enter")


def since(devices: DeviceApi, number: int) -> list[Call]:
    """The calls after so many, once each has given its GPU back."""
    until(lambda: not devices.busy())
    return devices.calls[number:]


def server_pid(studio: Studio) -> int:
    """Whose port it is."""
    import psutil

    port = int(studio.url.rpartition(":")[2])
    found = [c.pid for c in psutil.net_connections("tcp") if c.laddr and c.laddr.port == port and c.status == "LISTEN"]
    return int(found[0] or 0)


def test_each_of_twenty_visitors_gets_the_reply_to_their_own_message(on_space: Studio, devices: DeviceApi) -> None:
    alone = visit(on_space).predict(DEFAULT_TARGET, "visitor number 3", TOKENS, api_name="/chat")
    before = len(devices.calls)

    def chat(number: int) -> dict[str, Any]:
        target = "tiny" if number % 5 == 0 else DEFAULT_TARGET
        return dict(visit(on_space, number).predict(target, f"visitor number {number}", TOKENS, api_name="/chat"))

    with ThreadPoolExecutor(VISITORS) as pool:
        replies = list(pool.map(chat, range(VISITORS)))
    for number, reply in enumerate(replies):
        trace = reply["trace"]
        prompt = "".join(trace["tokens"][: trace["prompt_tokens"]])
        assert re.findall(r"visitor number (\d+)", prompt) == [str(number)]
        assert trace["router"] == ("dynmole" if number % 5 == 0 else "none")
    assert replies[3] == alone, "what others ask at the same time changes nothing"

    calls = since(devices, before)
    assert sorted(call.visitor for call in calls) == sorted(map(visitor_token, range(VISITORS)))
    assert len({call.pid for call in calls} - {server_pid(on_space)}) == VISITORS, "a fork of its own for each"
    assert {call.seconds for call in calls} == {ceil(10 + 0.05 * TOKENS), ceil(40 + 0.05 * TOKENS)}
    assert not any(call.failed for call in calls)
    most = max(sum(other.begun <= call.begun < other.ended for other in calls) for call in calls)
    assert 2 <= most <= GPUS


def test_two_visitors_chat_at_the_same_time_each_with_their_own_routing(
    on_space: Studio, devices: DeviceApi, windows: Any
) -> None:
    before, pages = len(devices.calls), [windows.open(), windows.open(width=390)]
    words = ("sort pear apple fig", "what is the capital of France")
    for page in pages:
        open_chat(on_space, page, "tiny")
        expect(page.locator("#not-kept")).to_contain_text("runs and uploads are gone when it restarts")
        expect(page.locator("#chat-unload")).to_have_count(0)
    for page, text in zip(pages, words, strict=True):
        ask(page, text)
    for page, text in zip(pages, words, strict=True):
        expect(page.locator("#chat-status")).to_contain_text("tokens/s")
        quiet(page)
        expect(page.locator("#chatbot .user")).to_contain_text(text)
        other = next(word for word in words if word != text)
        assert other not in page.content()
    assert len({call.pid for call in since(devices, before)}) == 2


def test_stopping_gives_the_gpu_back_before_the_reply_is_complete(
    on_space: Studio, devices: DeviceApi, page: Page
) -> None:
    before = len(devices.calls)
    open_chat(on_space, page, "Base model")
    page.locator("#chat-options button").first.click()
    page.locator("#chat-options input[type=number]").first.fill(str(limits.NEW_TOKENS))
    page.keyboard.press("Tab")
    ask(page, "the quick brown fox")
    status = page.locator("#chat-status")
    expect(status).to_contain_text("tokens/s")
    page.click("#chat-stop")
    expect(page.locator("#chat-stop")).to_be_hidden()
    (call,) = since(devices, before)
    assert not call.failed and not call.killed
    assert call.seconds == ceil(10 + 0.05 * limits.NEW_TOKENS) <= LONGEST
    assert 0 < int(status.inner_text().split()[0]) < limits.NEW_TOKENS


def test_a_used_up_quota_is_told_in_a_line(
    on_space: Studio, devices: DeviceApi, page: Page, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "quota", 5)
    open_chat(on_space, page, "Base model")
    ask(page, "hello")
    status = page.locator("#chat-status")
    expect(status).to_contain_text("ZeroGPU quota exceeded")
    assert status.inner_text().startswith("Not answered. ZeroGPU quota exceeded: ")
    assert "<" not in status.inner_text() and "\n" not in status.inner_text().strip()
    with pytest.raises(AppError, match="ZeroGPU quota exceeded: You have exceeded your ZeroGPU quota"):
        visit(on_space).predict(DEFAULT_TARGET, "hello", 4, api_name="/chat")


def test_a_call_that_takes_too_long_is_told_in_a_line(
    on_space: Studio, devices: DeviceApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "slower", 0.01)
    with pytest.raises(AppError, match=r"The GPU was taken away before the reply was complete: it took more than 11 s"):
        visit(on_space).predict(DEFAULT_TARGET, "pear", TOKENS, api_name="/chat")
    monkeypatch.undo()
    assert visit(on_space).predict(DEFAULT_TARGET, "pear", TOKENS, api_name="/chat")["text"]


def test_nothing_of_cuda_was_used_outside_a_call(on_space: Studio, devices: DeviceApi) -> None:
    assert devices.started == 1
    log = LOGS[on_space.url].read_text()
    assert "Low-level CUDA init" not in log and "Traceback" not in log


@pytest.mark.soak
@pytest.mark.model
def test_twenty_visitors_chat_with_the_demo(embedded_home: Path) -> None:
    """The embedded model and the demo are on the GPU from the start; on a CPU this takes minutes."""
    from app import settings

    demo, port = str(settings.demo()), free_port()
    with (
        DeviceApi(gpus=2, slower=60) as devices,
        serve(space_command(), port, embedded_home, **space(devices, port, embedded_home)) as running,
    ):

        def chat(number: int) -> dict[str, Any]:
            return dict(visit(running, number).predict(demo, f"Convert {number} km.", TOKENS, api_name="/chat"))

        with ThreadPoolExecutor(VISITORS) as pool:
            replies = list(pool.map(chat, range(VISITORS)))
        calls = since(devices, 0)
    assert all(f"Convert {number} km." in "".join(reply["trace"]["tokens"]) for number, reply in enumerate(replies))
    assert {call.seconds for call in calls} == {ceil(10 + 0.05 * TOKENS)}
    assert len({call.pid for call in calls}) == VISITORS
