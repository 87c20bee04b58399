"""Two visitors of a Space with ZeroGPU train at once, and each sees, chats with and downloads their own run only."""

from __future__ import annotations

import re
import shutil
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pytest
from gradio_client import Client
from gradio_client.exceptions import AppError
from playwright.sync_api import Page, Request, expect
from serving import Studio, free_port, serve, until
from zerogpu import DeviceApi, space, space_command

from mole import runs
from mole.core import checkpoint
from mole.models import EMBEDDED

pytestmark = [pytest.mark.ui, pytest.mark.soak]
NAME = re.compile("visitor-[0-9a-f]{32}")


@pytest.fixture
def api() -> Iterator[DeviceApi]:
    with DeviceApi(gpus=2) as running:
        yield running


@pytest.fixture
def zero_space(api: DeviceApi, home: Path, tiny_folder: Path) -> Iterator[Studio]:
    """A Space with ZeroGPU whose default model is tiny."""
    (home / "models").mkdir()
    copy = partial(shutil.copytree, tiny_folder, dirs_exist_ok=True)
    checkpoint.write_folder(home / "models" / EMBEDDED, copy, step=0)
    port = free_port()
    with serve(space_command(), port, home, **space(api, port, home)) as running:
        yield running


@dataclass
class Visitor:
    """A visitor's page, and all that it has received."""

    page: Page
    studio: Studio
    answered: list[Request] = field(default_factory=list)
    """The requests whose answers are complete."""

    def __post_init__(self) -> None:
        self.page.on("requestfinished", lambda request: self.answered.append(request))
        self.open("tab=train")

    def open(self, query: str) -> None:
        """Open the page again; what the one before has received can no longer be read."""
        self.page.goto("about:blank")
        self.answered.clear()
        self.studio.open(self.page, query)

    def start(self) -> None:
        """Train for as many steps as allowed: a test stops that."""
        self.page.locator("#field-training-max_steps input").fill("170")
        self.page.locator("#field-training-max_steps input").blur()
        self.page.locator("#start").click()

    def run(self) -> str:
        """The name of the run that Train shows."""
        expect(self.page.locator("#train-run")).to_contain_text(NAME)
        found = NAME.search(self.page.locator("#train-run").inner_text())
        assert found
        return found[0]

    def received(self) -> str:
        """Everything that the page got, and what it shows of it."""
        texts = [self.page.content()]
        for request in list(self.answered):
            answer = request.response()
            if answer and answer.headers.get("content-type", "").startswith(("text/", "application/json")):
                texts.append(answer.text())
        return "\n".join(texts)


def test_two_visitors_train_at_once_and_see_only_their_own_run(
    zero_space: Studio, api: DeviceApi, open_page: Callable[..., Page], tmp_path: Path
) -> None:
    first, second = Visitor(open_page(), zero_space), Visitor(open_page(), zero_space)
    first.start(), second.start()
    names = [first.run(), second.run()]
    until(lambda: api.busy() == 2, 60)
    for visitor in (first, second):
        expect(visitor.page.locator("#train-run")).to_contain_text(re.compile(r"Step [1-9]\d* of 170"))
    for name in names:
        runs.get(name).request_stop()
    for visitor in (first, second):
        expect(visitor.page.locator("#start-status")).to_contain_text("Your run has ended")
        visitor.page.get_by_role("tab", name="Runs").click()
        expect(visitor.page.locator("#run-list .rows > *")).to_have_count(1)
    assert all(20 < call.seconds <= 120 and not call.failed for call in api.calls)
    assert NAME.findall(first.received()).count(names[1]) == 0 < first.received().count(names[0])
    assert NAME.findall(second.received()).count(names[0]) == 0 < second.received().count(names[1])

    with first.page.expect_download() as downloaded:
        first.page.locator("#runs-export").click()
    downloaded.value.save_as(tmp_path / "run.zip")
    assert "adapter/adapter_model.safetensors" in zipfile.ZipFile(tmp_path / "run.zip").namelist()

    first.open("tab=chat")  # the browser remembers the run
    expect(first.page.locator("#target input")).to_have_value(re.compile(names[0][8:14]))
    first.page.locator("#message textarea").fill("Hello")
    first.page.keyboard.press("Enter")
    expect(first.page.locator("#routing-view")).to_contain_text("dynmole on smollm2-135m · 8 experts")  # a reply's

    second.open(f"tab=runs&run={names[0][:-1]}&compare={names[0][:20]},visitor-,*,../runs")
    expect(second.page.locator("#run-list .rows > *")).to_have_count(1)
    assert names[0] not in second.received()
    stranger = Client(zero_space.url, verbose=False)
    told = [stranger.predict(api_name=name) for name in ("/list_runs", "/list_targets")]
    assert not NAME.search(str(told))
    for guess in ("visitor-", names[0][:-1], f"{names[0][:-1]}@170", f"../runs/{names[0]}", f"{names[0]}/adapter"):
        with pytest.raises(AppError) as refused:
            stranger.predict(guess, "Hello", api_name="/chat")
        assert not NAME.search(str(refused.value))
