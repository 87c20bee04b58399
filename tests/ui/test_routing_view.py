"""The routing view on its own: fast enough, complete, safe with any token text, usable without a mouse."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from playwright.sync_api import Locator, Page, expect
from serving import Studio, free_port, serve

from app.views import routing
from app.views.component import BASICS, CANVAS, read_texts

from .routing_page import HOSTILE, PROJECTIONS, PROMPT, recorded

pytestmark = pytest.mark.ui
TOKENS = 164
SMALL = 24
HUES = Path(routing.__file__).with_name("hues.js")
SHAPE = re.compile("16 experts × 32 layers")


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Studio]:
    port = free_port()
    command = [sys.executable, str(Path(__file__).with_name("routing_page.py")), str(port), str(TOKENS)]
    with serve(command, port, tmp_path_factory.mktemp("home")) as running:
        yield running


def play(scratch: Studio, page: Page, button: str, tokens: int) -> None:
    page.goto(scratch.url)
    page.click(button)
    expect(page.locator("#routing-view .strip span")).to_have_count(tokens)


def updates_per_second(page: Page) -> tuple[float, float]:
    """Of a streamed reply: updates a second, and the main thread's processor time for one, in seconds."""
    devtools = page.context.new_cdp_session(page)
    devtools.send("Performance.enable", {"timeDomain": "threadTicks"})

    def busy() -> float:
        return next(
            m["value"] for m in devtools.send("Performance.getMetrics")["metrics"] if m["name"] == "TaskDuration"
        )

    page.click("#play")
    count = "() => [performance.now(), +(document.querySelector('#routing-view .heatmap').dataset.draws || 0)]"
    page.wait_for_function(f"({count})()[1] > 3")
    (begun, before), idle = page.evaluate(count), busy()
    expect(page.locator("#routing-view .strip span")).to_have_count(TOKENS)
    (ended, after), spent = page.evaluate(count), busy()
    return (after - before) / ((ended - begun) / 1000), (spent - idle) / (after - before)


@pytest.mark.timed
def test_ten_updates_a_second_at_32_layers_of_16_experts(scratch: Studio, open_page: Callable[..., Page]) -> None:
    """Updates, and with them everything the page does for one: fetching, unpacking, three views, layout."""
    best, cost = 0.0, 1.0
    for _ in range(3):  # other work on the machine is not ours
        page = open_page()
        page.goto(scratch.url)
        updates, seconds = updates_per_second(page)
        best, cost = max(best, updates), min(cost, seconds)
        if best >= 10:
            break
    print(f"{best:.1f} updates a second, {1000 * cost:.1f} ms of the main thread each")
    assert best >= 10 or cost <= 0.05, (best, cost)


def test_tokens_whose_delta_was_lost_are_fetched(scratch: Studio, page: Page) -> None:
    play(scratch, page, "#lose", 40)
    shown = page.locator("#routing-view .strip span").all_text_contents()
    assert shown[PROMPT + 2 :] == [f" t{index}" for index in range(PROMPT + 2, 40)]


def test_the_text_of_a_token_is_never_html(scratch: Studio, page: Page) -> None:
    play(scratch, page, "#play", TOKENS)
    assert page.locator("#routing-view .strip span").nth(PROMPT + 1).text_content() == HOSTILE
    assert page.locator("#routing-view img").count() == 0


def test_arrow_keys_and_hovering_choose_the_token_that_is_drawn(scratch: Studio, page: Page) -> None:
    play(scratch, page, "#play", TOKENS)
    strip, summary = page.locator("#routing-view .strip"), page.locator("#routing-view .summary")
    picture = "document.querySelector('#routing-view .heatmap').toDataURL()"
    strip.focus()
    page.keyboard.press("Home")
    expect(summary).to_contain_text("Token 1 “t4”")
    first = page.evaluate(picture)
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    expect(summary).to_contain_text("Token 3 “t6”")
    assert page.evaluate(picture) != first
    strip.locator("span").nth(PROMPT + 6).hover()
    expect(summary).to_contain_text("Token 7")
    page.mouse.move(5, 5)
    expect(summary).to_contain_text("Token 3")
    page.get_by_role("button", name="Whole reply").first.click()
    expect(summary).to_contain_text(f"Whole reply, {TOKENS - PROMPT} tokens")
    expect(page.locator("#routing-view .heatmap")).to_have_attribute("aria-label", SHAPE)


# ---------------------------------------------------------------------------------------------------------
# A small reply, of which every number is known: 4 layers × 3 experts, 20 tokens after the prompt


@pytest.fixture
def view(scratch: Studio, page: Page) -> Locator:
    return opened(scratch, page)


def opened(scratch: Studio, page: Page) -> Locator:
    page.goto(scratch.url)
    page.click("#twice")
    expect(page.locator("#second-view .strip span")).to_have_count(SMALL)
    view = page.locator("#routing-view")
    expect(view.get_by_role("button", name="Reply − earlier")).to_be_visible()
    return view


def known(seed: int = 0) -> np.ndarray:
    """The weights `(tokens, layers, experts)` of the reply, or with seed 1 of the earlier one."""
    return np.frombuffer(recorded(SMALL, 4, 3, seed=seed).weights, np.uint8).reshape(SMALL, 4, 3) / 255


def drawn(view: Locator) -> np.ndarray:
    """What the heatmap draws, by layer and expert."""
    code = """canvas => Array.from({ length: 4 }, (_, layer) =>
        Array.from({ length: 3 }, (_, expert) => canvas.data.weight(layer, expert)))"""
    return np.array(view.locator(".heatmap").evaluate(code))


def choose(view: Locator, token: int) -> None:
    """Choose a token of the reply, from 0, with the keyboard."""
    view.locator(".strip").focus()
    view.page.keyboard.press("Home")
    for _ in range(token):
        view.page.keyboard.press("ArrowRight")
    expect(view.locator(".summary")).to_contain_text(f"Token {token + 1} ")


def settled(view: Locator) -> None:
    """Two frames later, everything asked for is drawn."""
    view.page.evaluate("() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")


def test_keys_in_the_heatmap_mark_a_cell_in_all_three_views(view: Locator) -> None:
    view.locator(".heatmap").focus()
    for key in ("ArrowRight", "ArrowRight", "ArrowRight", "ArrowDown"):  # the first shows where we are
        view.page.keyboard.press(key)
    expect(view.locator(".readout")).to_contain_text("Layer 3, expert 2")
    expect(view.locator(".readout")).to_contain_text("(even: 0.333)")
    settled(view)
    using = view.locator(".strip span.uses").evaluate_all("chips => chips.map(chip => Number(chip.dataset.index))")
    weights = known()[:, 2, 1]
    assert using == [index for index in range(SMALL) if weights[index] > 1 / 3 + 1 / 510]
    lane = view.locator(".timeline").evaluate("canvas => canvas.lanes[2]")
    assert lane["name"] == "Weight of expert 2 in layer 3" and lane["line"] == pytest.approx(1 / 3)
    np.testing.assert_allclose(lane["values"], weights[PROMPT:], atol=1e-9)


def test_keys_and_pointer_in_the_timeline_choose_in_all_three_views(view: Locator) -> None:
    timeline, chosen = view.locator(".timeline"), view.locator('.strip [aria-selected="true"]')
    timeline.focus()
    view.page.keyboard.press("Home")
    view.page.keyboard.press("ArrowRight")
    expect(chosen).to_have_attribute("data-index", str(PROMPT + 1))
    expect(timeline).to_have_attribute("aria-valuenow", "2")
    settled(view)
    np.testing.assert_allclose(drawn(view), known()[PROMPT + 1], atol=1e-9)
    box = timeline.bounding_box()
    assert box
    plot = box["width"] - 32
    timeline.hover(position={"x": 30 + plot * 7.5 / (SMALL - PROMPT), "y": 40})
    expect(chosen).to_have_attribute("data-index", str(PROMPT + 7))
    settled(view)
    np.testing.assert_allclose(drawn(view), known()[PROMPT + 7], atol=1e-9)


def test_differences_from_the_replys_mean_sum_to_zero_over_the_reply(view: Locator) -> None:
    view.get_by_role("button", name="Token − reply").click()
    mean, total = known()[PROMPT:].mean(0), np.zeros((4, 3))
    for token in range(SMALL - PROMPT):
        choose(view, token)
        settled(view)
        np.testing.assert_allclose(drawn(view), known()[PROMPT + token] - mean, atol=1e-5)
        total += drawn(view)
    assert np.abs(total).max() < 1e-4


def test_zero_is_in_the_middle_of_the_diverging_scale(view: Locator) -> None:
    view.get_by_role("button", name="Token − reply").click()
    settled(view)
    pixels = """canvas => [0.02, 0.5, 0.98].map(share => Array.from(
        canvas.getContext("2d").getImageData(Math.round(share * (canvas.width - 1)), 2, 1, 1).data).slice(0, 3))"""
    less, none, more = view.locator(".scale").evaluate(pixels)
    assert less[2] > less[0] and more[0] > more[2]  # blue, orange
    assert max(none) - min(none) < 130 and max(less) - min(less) > 60 and max(more) - min(more) > 60


def test_the_difference_from_an_earlier_reply_is_that_of_the_means(view: Locator) -> None:
    view.get_by_role("button", name="Reply − earlier").click()
    expect(view.locator(".heat-title")).to_contain_text("difference from the first try")
    settled(view)
    np.testing.assert_allclose(drawn(view), known()[PROMPT:].mean(0) - known(1)[PROMPT:].mean(0), atol=1e-5)


def test_an_opened_layer_shows_its_projections_and_one_of_them_in_every_layer(view: Locator) -> None:
    record = recorded(SMALL, 4, 3)
    parts = np.frombuffer(record.projections, np.uint8).reshape(SMALL, 4, len(PROJECTIONS), 3) / 255
    choose(view, 5)
    view.locator(".heatmap").focus()
    view.page.keyboard.press("End")
    view.page.keyboard.press("End")
    view.page.keyboard.press("Enter")
    layer = view.locator(".layer")
    expect(layer.locator(".layer-title")).to_contain_text("Layer 4: Token 6")
    expect(layer.locator("tbody td").last).to_have_text(f"{parts[PROMPT + 5, 3, -1, -1]:.2f}")
    values = layer.locator("tbody td").evaluate_all("cells => cells.map(cell => Number(cell.dataset.value))")
    np.testing.assert_allclose(np.reshape(values, (len(PROJECTIONS), 3)), parts[PROMPT + 5, 3], atol=1e-6)
    layer.get_by_role("button", name="k_proj").click()
    expect(view.locator(".heat-title")).to_contain_text("k_proj")
    settled(view)
    np.testing.assert_allclose(drawn(view), parts[PROMPT + 5, :, 1], atol=1e-6)
    layer.get_by_role("button", name="Close the layer").click()
    settled(view)
    np.testing.assert_allclose(drawn(view), known()[PROMPT + 5], atol=1e-9)


def test_the_tables_say_what_the_pictures_show(view: Locator) -> None:
    choose(view, 2)
    view.get_by_role("button", name="Show as table").click()
    rows = "rows => rows.map(row => [...row.cells].map(cell => cell.textContent))"
    expect(view.locator(".cells tbody tr")).to_have_count(4)
    cells = view.locator(".cells tbody tr").evaluate_all(rows)
    assert [row[1:4] for row in cells] == [[f"{value:.3f}" for value in layer] for layer in known()[PROMPT + 2]]
    tokens = view.locator(".tokens tbody tr").evaluate_all(rows)
    strongest = np.frombuffer(recorded(SMALL, 4, 3).strongest, np.uint8)[PROMPT:] / 255
    assert [row[1] for row in tokens] == recorded(SMALL, 4, 3).tokens[PROMPT:]
    np.testing.assert_allclose([float(row[2]) for row in tokens], strongest, atol=6e-4)


def test_tokens_are_coloured_by_their_place_on_the_map_or_by_one_routers_experts(view: Locator) -> None:
    """Also the legend, the lane and the table: no number of an expert is averaged over layers."""
    colours = "chips => chips.slice(4).map(chip => chip.style.backgroundColor)"
    chips, legend = view.locator(".strip span"), view.locator(".key-text")
    expect(legend).to_contain_text("like hue: routed alike in all layers")
    expect(view.locator(".experts")).to_be_hidden()
    hues = chips.evaluate_all("chips => chips.slice(4, 12).map(chip => chip.title)")
    assert hues == ["teal", "blue", "violet", "purple", "pink", "orange", "yellow", "green"]  # the colour in words
    before = chips.evaluate_all(colours)

    view.get_by_label("Layer whose experts").select_option("Layer 3")
    view.get_by_label("Projection whose experts").select_option("k_proj")
    expect(legend).to_contain_text("the strongest expert of layer 3, k_proj")
    kept = np.frombuffer(recorded(SMALL, 4, 3).projections, np.uint8).reshape(SMALL, 4, len(PROJECTIONS), 3)
    router = kept[:, 2, PROJECTIONS.index("k_proj")]
    words = [f"expert {row.argmax() + 1}, weight " for row in router]
    expect(chips.nth(SMALL - 1)).to_have_attribute("title", re.compile(words[-1]))
    titles = chips.evaluate_all("chips => chips.map(chip => chip.title)")
    assert all(title.startswith(word) for title, word in zip(titles, words, strict=True))
    assert chips.evaluate_all(colours) != before
    choose(view, 3)
    settled(view)
    assert view.locator(".experts b").all_text_contents() == [
        f"{expert + 1} · {round(100 * value / 255)} %" for expert, value in enumerate(router[PROMPT + 3].tolist())
    ]
    lane = view.locator(".timeline").evaluate("canvas => canvas.lanes[2]")
    assert lane["name"] == "Strongest expert of layer 3, k_proj"
    np.testing.assert_allclose(lane["values"], router[PROMPT:].max(1) / 255, atol=1e-9)

    view.get_by_label("Layer whose experts").select_option("Routing in all layers")
    settled(view)
    assert chips.evaluate_all(colours) == before


def test_hovering_and_choosing_name_the_tokens_that_were_routed_most_alike(view: Locator) -> None:
    record = recorded(SMALL, 4, 3)
    found = record.similar(PROMPT + 7) or []
    first = [record.tokens[int(other)].strip() for other, _ in found]
    view.locator(".strip span").nth(PROMPT + 7).hover()
    expect(view.locator(".alike")).to_contain_text(f"Routed most alike: “{first[0]}”")
    shown = view.locator(".strip span.like").evaluate_all("chips => chips.map(chip => Number(chip.dataset.index))")
    assert shown == sorted(int(other) for other, _ in found)
    view.page.mouse.move(5, 5)
    choose(view, 7)
    expect(view.locator('[aria-live="polite"]')).to_contain_text(f"Routed most alike: “{first[0]}”")


def test_three_views_on_one_page_are_independent(view: Locator) -> None:
    twice = "() => [...document.querySelectorAll('[id]')].map(e => e.id).filter((id, i, all) => all.indexOf(id) !== i)"
    assert view.page.evaluate(twice) == []
    second, small = view.page.locator("#second-view"), view.page.locator("#small-view")
    choose(view, 3)
    expect(second.locator(".summary")).to_contain_text(f"Token {SMALL - PROMPT} ")
    expect(small.locator(".summary")).to_contain_text("Whole reply, 20 tokens")
    expect(small.locator(".heatmap")).to_be_visible()
    for part in (".strip", ".timeline", ".scope"):
        expect(small.locator(part)).to_be_hidden()


def test_a_screen_reader_hears_a_choice_and_the_end_but_not_every_token(view: Locator) -> None:
    said = view.locator('[aria-live="polite"]')
    expect(said).to_contain_text(f"Reply of {SMALL - PROMPT} tokens. Weight of the strongest expert")
    expect(view.locator(".summary")).not_to_have_attribute("aria-live", "polite")
    choose(view, 1)
    expect(said).to_contain_text("Token 2")


@pytest.mark.timed
def test_a_reply_of_1500_tokens_stays_quick(scratch: Studio, page: Page) -> None:
    page.goto(scratch.url)
    page.click("#long")
    expect(page.locator("#routing-view .strip span")).to_have_count(1500)
    view = page.locator("#routing-view")
    view.locator(".strip").focus()
    page.keyboard.press("Home")
    expect(view.locator(".summary")).to_contain_text("Token 1 ")
    devtools = page.context.new_cdp_session(page)
    devtools.send("Performance.enable", {"timeDomain": "threadTicks"})
    spent = []
    for _ in range(2):
        metrics = devtools.send("Performance.getMetrics")["metrics"]
        spent.append(next(metric["value"] for metric in metrics if metric["name"] == "TaskDuration"))
        for _ in range(20):
            page.keyboard.press("ArrowRight")
            settled(view)
    assert (spent[1] - spent[0]) / 20 < 0.05, spent


def test_it_fits_a_telephone(scratch: Studio, open_page: Callable[..., Page]) -> None:
    page = open_page(390, 844)
    view = opened(scratch, page)
    view.locator(".heatmap").click(position={"x": 100, "y": 20})
    expect(view.locator(".layer tbody tr")).to_have_count(len(PROJECTIONS))
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


# ---------------------------------------------------------------------------------------------------------
# Colours


def in_kit(page: Page, expression: str) -> Any:
    """The value of an expression inside the drawing kit, without a page around it."""
    return page.evaluate("code => new Function(code)()", f"{read_texts(*BASICS, *CANVAS, HUES)}\nreturn {expression};")


def luminance(colours: np.ndarray) -> np.ndarray:
    """WCAG's relative luminance of `(…, 3)` 0…255."""
    share = colours / 255
    linear = np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)
    return linear @ np.array([0.2126, 0.7152, 0.0722])


@pytest.mark.parametrize("dark", [False, True])
def test_token_text_reads_at_every_hue_and_lightness(dark: bool, page: Page) -> None:
    theme = str(dark).lower()
    entropies, hues = "[...Array(101).keys()]", "[...Array(8).keys()]"
    experts = f"{hues}.flatMap(e => {entropies}.map(h => chipFill(e, h / 100, {theme})))"
    places = f"[0.2, 1].flatMap(d => {hues}.map(turn => mapColour([turn / 8, d], {theme})))"
    fills = f"[...{experts}, ...{places}.flatMap(colour => {entropies}.map(h => faded(colour, h / 100, {theme})))]"
    inks = in_kit(page, f"{fills}.map(fill => rgb(ink(fill)))")
    behind, front = luminance(np.round(in_kit(page, fills))), luminance(np.array(inks))
    ratio = (np.maximum(behind, front) + 0.05) / (np.minimum(behind, front) + 0.05)
    assert ratio.shape == (3 * 808,) and ratio.min() >= 4.5


# Machado, Oliveira, Fernandes 2009: full protanopia, deuteranopia and tritanopia, on linear RGB
SIGHT = {
    "all cones": np.eye(3),
    "no red": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "no green": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "no blue": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
}


def lab(linear: np.ndarray) -> np.ndarray:
    """CIELAB under D65 of linear RGB."""
    to_xyz = np.array([[0.4125, 0.3576, 0.1804], [0.2127, 0.7152, 0.0722], [0.0193, 0.1192, 0.9503]])
    xyz = np.clip(linear, 0, 1) @ to_xyz.T / [0.9505, 1, 1.0888]
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.stack([116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], -1)


@pytest.mark.parametrize("sight", SIGHT)
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_every_two_of_the_eight_hues_differ_for_every_eye(theme: str, sight: str, page: Page) -> None:
    share = np.array(in_kit(page, f"HUES.{theme}")) / 255
    linear = np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)
    seen = lab(linear @ np.array(SIGHT[sight]).T)
    apart = [np.linalg.norm(seen[i] - seen[j]) for i in range(8) for j in range(i)]
    assert len(apart) == 28 and min(apart) > 17, min(apart)
