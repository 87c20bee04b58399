"""A saved conversation: one file that opens without a server, answers as the studio does, and runs nobody's HTML."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from playwright.sync_api import Page, expect

from app.services.conversation import Turn
from app.services.routing_stream import RoutingRecord
from app.views.replay import ReplayedReply, replay_page

from .routing_page import HOSTILE, PROMPT, recorded

pytestmark = pytest.mark.ui
OVERRIDES = "Routing overrides: top p 0.5"
TURNS = [Turn("What is 2 + 2?", "4."), Turn("And 3?", f"6, {HOSTILE}.", thought="Add.", note=OVERRIDES)]


def saved(folder: Path, *replies: ReplayedReply) -> str:
    path = folder / "replay.html"
    path.write_text(replay_page(replies), encoding="utf-8")
    return path.as_uri()


@pytest.fixture
def record() -> RoutingRecord:
    return recorded(24, layers=4, experts=5)


def test_it_shows_the_conversation_and_the_routing_of_its_last_reply(
    page: Page, tmp_path: Path, record: RoutingRecord
) -> None:
    requests: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    address = saved(tmp_path, ReplayedReply("my run", TURNS, record, "Be brief."))
    page.goto(address)
    card = page.get_by_role("region", name="Conversation")
    assert card.locator(".message").all_text_contents() == [
        "Be brief.", "What is 2 + 2?", "4.", "And 3?", "Add.", f"6, {HOSTILE}.",
    ]  # fmt: skip
    expect(card.locator(".note")).to_have_text(OVERRIDES)
    expect(page.locator(".strip span")).to_have_count(24)
    expect(page.locator(".heat-title")).to_have_text("5 experts × 4 layers, mean of projections")
    page.locator(".strip span").nth(10).click()
    expect(page.locator(".summary")).to_contain_text(f"Token {10 - PROMPT + 1}")
    expect(page.locator(".alike")).to_contain_text("Routed most alike")
    page.locator(".by-layer").select_option("2")
    page.locator(".by-projection").select_option("k_proj")
    expect(page.locator(".key-text")).to_contain_text("layer 3, k_proj; fainter")
    page.locator(".heatmap").press("Enter")
    expect(page.locator(".layer tbody tr")).to_have_count(3)
    assert requests == [address]


def test_it_answers_the_view_as_the_studio_does(page: Page, tmp_path: Path, record: RoutingRecord) -> None:
    page.goto(saved(tmp_path, ReplayedReply("my run", TURNS, record)))
    asked = """async ([name, request]) => {
      const [reply] = JSON.parse(document.getElementById("data").textContent);
      return answersOf(reply)[name](["", ...request]);
    }"""

    def weights(found: dict[str, Any], kind: str) -> np.ndarray:
        return np.frombuffer(base64.b64decode(found["weights"]), kind)

    for token in (None, 0, 7, 23):
        mine, studio = page.evaluate(asked, ["fetch_projections", [token]]), record.projection_weights(token)
        assert studio is not None
        assert (mine["names"], mine["layers"]) == (studio["names"], studio["layers"])
        np.testing.assert_allclose(weights(mine, "<f4"), weights(studio, "<f4"), atol=1e-6)
    for start in (0, 9):
        assert page.evaluate(asked, ["fetch_router", [3, "v_proj", start]]) == record.router_weights(3, "v_proj", start)
    for token in (0, 12):
        mine, studio = page.evaluate(asked, ["fetch_similar", [token]]), record.similar(token)
        assert [other for other, _ in mine] == [other for other, _ in studio or []]
        np.testing.assert_allclose(mine, studio, atol=1e-4)


def test_a_reply_of_500_tokens_takes_at_most_2_mb(page: Page, tmp_path: Path) -> None:
    """As of the demo: 30 layers, seven projections, 8 experts. Of larger ones the single projections are left out."""
    for experts, complete in ((8, True), (64, False)):
        rows, random = 210, np.random.default_rng(0)
        meta = {"id": "a", "layers": 30, "experts": experts, "counts": [experts] * 30, "prompt": PROMPT}
        record = RoutingRecord(meta, [f"p{n % 7}" for n in range(rows)], [n // 7 for n in range(rows)])
        meta["routers"] = record.names_by_layer()
        whole = [random.integers(0, 256, 500 * size, np.uint8).tobytes() for size in (30 * experts, 30, 30, 30, 1, 2)]
        record.extend([" word"] * 500, *whole, projections=random.bytes(500 * rows * experts))
        text = replay_page([ReplayedReply("large", TURNS, record)])
        assert len(text) < 2_000_000
        [value] = json.loads(re.search(r'id="data">(.*?)</script>', text, re.S)[1])  # type: ignore[index]
        assert bool(value["projections"]) == complete
    page.goto(saved(tmp_path, ReplayedReply("large", TURNS, record)))
    page.locator(".heatmap").press("Enter")
    page.locator(".heatmap").press("Enter")
    expect(page.locator(".layer-title")).to_contain_text("the projections of this reply are no longer kept")


def test_whatever_is_said_in_it_stays_text(page: Page, tmp_path: Path) -> None:
    evil = "</script></template></title><img src=x onerror='document.title = 1'><!--<script>document.title = 2</script>"
    record = recorded(8, layers=2, experts=2, against_label=evil)
    record.tokens = [evil] * 8
    record.meta |= {"about": evil, "note": evil}
    turns = [Turn(evil, evil, note=evil, thought=evil)]
    page.goto(saved(tmp_path, ReplayedReply(evil, turns, record, evil), ReplayedReply(evil, turns, record)))
    expect(page.locator(".strip span")).to_have_count(16)
    assert page.title() == f"Routing replay: {evil}, {evil}"
    assert page.locator("img, main script, .message *").count() == 0


@pytest.mark.parametrize("width", [390, 1280])
def test_it_fits_its_window(open_page: Any, tmp_path: Path, record: RoutingRecord, width: int) -> None:
    page = open_page(width=width)
    page.goto(saved(tmp_path, ReplayedReply("my run", TURNS, record), ReplayedReply("base", TURNS, record)))
    expect(page.locator(".strip span")).to_have_count(48)
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_a_reply_without_routing_says_why(page: Page, tmp_path: Path) -> None:
    record = RoutingRecord({"id": "a", "layers": 0, "experts": 0, "counts": [], "prompt": 3, "note": "A base model."})
    page.goto(saved(tmp_path, ReplayedReply("base", TURNS, record)))
    expect(page.locator(".empty")).to_have_text("A base model.")
