"""Whatever a text says, on the page it is a text: in a real browser, with a home and a model made to attack.

The model is real, and poisoned: whatever it is asked, it answers with the attacks, token by token.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from browsing import quiet
from playwright.sync_api import Page, expect
from serving import ROOT, Studio, free_port, serve, studio_command

from mole import runs
from mole.analysis.atlas.stored import FORMAT, read_atlas, write_atlas
from mole.config import RunConfig
from mole.core import checkpoint
from mole.training import worker

pytestmark = [pytest.mark.ui, pytest.mark.slow]

PORT = free_port()
ELSEWHERE = f"http://127.0.0.1:{PORT}"
"""Another origin, which counts who comes."""
ATTACKS = [
    f'<img src="{ELSEWHERE}/img" onerror="alert(1)" class=taken>',
    "<script class=taken>alert(2)</script>",
    f'<svg class=taken onload="alert(3)"><image href="{ELSEWHERE}/svg"/></svg>',
    f'<iframe class=taken src="{ELSEWHERE}/frame"></iframe><object class=taken data="{ELSEWHERE}/object"></object>',
    "<style class=taken>body { display: none }</style>",
    f'<link class=taken rel=stylesheet href="{ELSEWHERE}/style.css"><meta class=taken http-equiv=refresh content=0>',
    '<form class=taken action="javascript:alert(4)"><button autofocus onfocus="alert(5)">x</button></form>',
]
MARKDOWN = [
    f"![x]({ELSEWHERE}/image)",
    f"![x][1]\n\n[1]: {ELSEWHERE}/reference\n\n",
    "[click me](javascript:alert(6))",
    "[click me](data:text/html,<script>alert(7)</script>)",
    f"\n\n1. a\n   ```\n<img src='{ELSEWHERE}/fence' class=taken onerror=alert(8)>\n\n",
    f"\n\n```a`b\n<img src='{ELSEWHERE}/info' class=taken onerror=alert(9)>\n```\n\n",
    f"\n\n```mermaid\nflowchart LR\n  A@{{ img: '{ELSEWHERE}/mermaid' }}\n  click A call alert(10)\n```\n\n",
    f"$$\\includegraphics{{{ELSEWHERE}/katex}} \\href{{javascript:alert(11)}}{{x}}$$",
    f"\n\n> ```\n<img src={ELSEWHERE}/quote class=taken>\n\n",
]
HOSTILE = " ".join(ATTACKS)
WATCH = """window.alert = window.confirm = window.prompt = (text) => { window.attacked = String(text); };"""


@pytest.fixture(scope="module")
def visits() -> Iterator[list[str]]:
    """What was asked of the other origin."""
    seen: list[str] = []

    class Counter(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append(self.path)
            self.send_response(404)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", PORT), Counter)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield seen
    server.shutdown()


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Path:
    """A base model that says the attacks one after the other, whatever it has read."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("base") / "poisoned"
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    said = [*MARKDOWN, *ATTACKS]
    tokenizer.add_tokens(said)
    model.resize_token_embeddings(len(tokenizer))
    line = [tokenizer.convert_tokens_to_ids(text) for text in said] + [tokenizer.eos_token_id]
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight.zero_()  # the next token depends on the last one alone
        inward, outward = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        inward.zero_()
        outward.zero_()
        inward[:, 0] = 1
        for place, token in enumerate(line[:-1]):
            inward[token] = 0
            inward[token, place + 1] = 1
        for place, token in enumerate(line):
            outward[token, place] = 10
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, poisoned: Path) -> Iterator[Studio]:
    """A studio whose home was written by somebody hostile, as far as files can carry it there."""
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    from mole import MoleConfig

    home = tmp_path_factory.mktemp("home")
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(poisoned), MoleConfig(num_experts=3, r=2, task_type="CAUSAL_LM")
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOLE_HOME", str(home))
        for name in ("finished", "failed", "other"):
            make_run(name, poisoned, model)
        (home / "presets").mkdir()
        preset = {"model": {"name": HOSTILE}, "adapter": {"router": "topk"}}
        (home / "presets" / "theirs.yaml").write_text(json.dumps(preset), encoding="utf-8")
        (home / "presets" / f"{'<b class=taken>b<b>'}.yaml").write_text(json.dumps(preset), encoding="utf-8")
    port = free_port()
    with serve(studio_command(port), port, home) as running:
        yield running


def make_run(name: str, base: Path, model: Any) -> None:
    """A run whose every text is hostile, with an adapter that can be chatted with."""
    run = runs.create(
        RunConfig.from_dict(
            {
                "name": name,
                "model": {"name": str(base), "device": "cpu"},
                "data": {"path": f"{HOSTILE}.jsonl", "eval_path": f"{HOSTILE} {name}", "columns": {"prompt": HOSTILE}},
                "adapter": {"target_modules": ["q_proj", HOSTILE]},
            }
        )
    )
    run.append_event("created", 0, router=HOSTILE, model=HOSTILE, group=HOSTILE, total_steps=9)
    run.append_event("started", 0, total_steps=9, resumed_from=HOSTILE, device=HOSTILE, note=HOSTILE)
    for step in range(1, 4):
        routing = {HOSTILE: {"load": [0.2, 0.8], "entropy": 0.5, "active": 1.0}}
        run.append_event("step", step, loss=1.0 / step, learning_rate=HOSTILE, routing=routing, **{HOSTILE: HOSTILE})
    with worker.logging_to(run):
        if name == "failed":
            worker.record_failure(run, RuntimeError(HOSTILE))
        worker.log.info("%s", HOSTILE)
    with run.log_path.open("a", encoding="utf-8") as log:
        log.write(f"{HOSTILE}\r{HOSTILE}\n\x1b[31m{HOSTILE}\x1b[0m\n")
    (run.path / "evaluations").mkdir()
    record = {"target": HOSTILE, "checkpoint": HOSTILE, "data": HOSTILE, "date": HOSTILE, "sha256": HOSTILE, "rows": 3}
    for number, more in enumerate(({"metrics": {HOSTILE: 0.5}}, {"error": HOSTILE}), start=1):
        text = json.dumps({**record, **more}, ensure_ascii=False)
        (run.path / "evaluations" / f"{number}.json").write_text(text, encoding="utf-8")
    (run.path / "atlas").mkdir()
    atlas = {**hostile(read_atlas(ROOT / "assets" / "demo" / "atlas.json")), "format": FORMAT}
    write_atlas(run.path / "atlas" / "1.atlas.json", atlas if name == "finished" else {"format": FORMAT})
    (run.path / "atlas" / "1.json").write_text(json.dumps({**record, "by": [HOSTILE], "tokens": 9}), encoding="utf-8")
    if name != "failed":
        checkpoint.write_folder(run.adapter_dir, lambda aside: model.save_pretrained(str(aside)), step=3)
        run.append_event("finished", 3, metrics={"loss": 0.1, HOSTILE: 1.0})


def hostile(value: Any) -> Any:
    """Lists and objects with every text in them replaced."""
    if isinstance(value, dict):
        return {key: hostile(one) for key, one in value.items()}
    if isinstance(value, list):
        return [hostile(one) for one in value]
    return HOSTILE if isinstance(value, str) else value


@pytest.fixture
def watched(open_page: Callable[..., Page], site: Studio, visits: list[str]) -> Page:
    """A page; afterwards nothing was asked of elsewhere, no attack ran, and none of its elements was made."""
    dialogs: list[str] = []

    def leave(page: Page) -> None:
        untouched(page)
        assert not dialogs and not visits, (dialogs, visits)

    page = open_page(strict=False, leave=leave)
    page.add_init_script(WATCH)
    page.on("dialog", lambda dialog: (dialogs.append(dialog.message), dialog.dismiss()))
    visits.clear()
    return page


LATER = """() => new Promise((come) => {
  const image = new Image();
  image.onload = image.onerror = come;
  image.src = `/static/img/logo.svg?${Math.random()}`;
})"""
"""What is asked of a host now comes after whatever an attack has asked for before."""


def untouched(page: Page) -> None:
    """The page is only what it was made to be."""
    quiet(page)
    page.evaluate(LATER)
    made = page.evaluate("[...document.querySelectorAll('.taken')].map((item) => item.outerHTML.slice(0, 200))")
    assert not made, made
    assert page.evaluate("window.attacked ?? null") is None
    outside = page.evaluate(
        """() => [...document.querySelectorAll('img, iframe, object, embed, script[src], link[href], image, form')].map(
        (item) => item.src || item.href?.baseVal || item.href || item.data || item.action || '').filter(
        (address) => typeof address === 'string' && address && !address.startsWith(location.origin)
          && !/^(data|blob):/.test(address))"""
    )
    assert not outside, outside
    links = page.evaluate("[...document.links].map((link) => link.href)")
    assert not [link for link in links if link.startswith(("javascript:", "data:", "vbscript:"))], links


def test_what_the_policy_stops_is_really_tried(watched: Page, site: Studio, visits: list[str]) -> None:
    """The page itself could not fetch from elsewhere even if a text got through: the browser refuses."""
    site.open(watched)
    watched.evaluate(
        """(address) => {
        window.refused = [];
        document.addEventListener('securitypolicyviolation', ({ blockedURI }) => refused.push(blockedURI));
        const items = ['img', 'iframe', 'video', 'script', 'link'].map((tag) => {
          const item = document.createElement(tag);
          if (tag === 'link') item.rel = 'stylesheet';
          item[tag === 'link' ? 'href' : 'src'] = `${address}/policy-${tag}`;
          document.head.append(item);
          return item;
        });
        fetch(`${address}/policy-fetch`).catch(() => 0);
        navigator.sendBeacon(`${address}/policy-beacon`, 'x');
        window.tidy = () => items.forEach((item) => item.remove());
      }""",
        ELSEWHERE,
    )
    watched.wait_for_function("new Set(refused).size === 7")
    watched.evaluate("tidy()")
    assert visits == []


def test_the_list_of_runs_the_chosen_one_its_error_and_its_log(watched: Page, site: Studio) -> None:
    for name in ("failed", "finished"):
        site.open(watched, f"tab=runs&run={name}")
        expect(watched.locator("#runs-run .name")).to_have_text(name)
        for part in ("runs-log", "runs-config", "evaluate"):
            fold = watched.locator(f"#{part} button.label-wrap")
            if fold.count():
                fold.first.click()
        expect(watched.locator("#runs-config textarea")).to_have_value(re.compile("onerror"))
        expect(watched.locator("#runs-log textarea")).to_have_value(re.compile("onerror"))
        untouched(watched)
    site.open(watched, "tab=runs&run=failed")
    expect(watched.locator("#runs-run .cause")).to_contain_text("<img src=")
    expect(watched.locator("#run-list")).to_contain_text("<img src=")


def test_the_comparison(watched: Page, site: Studio) -> None:
    site.open(watched, "tab=runs&compare=finished,other,failed")
    expect(watched.locator("#compare")).to_contain_text("<img src=")


def test_an_atlas_that_somebody_made(watched: Page, site: Studio) -> None:
    site.open(watched, "tab=atlas")
    for name, line in (("finished", "<img src="), ("other", "This atlas cannot be shown: it is damaged.")):
        watched.click("#atlas-first input")
        watched.get_by_role("option", name=re.compile("no. 1")).nth(["other", "failed", "finished"].index(name)).click()
        expect(watched.locator("#atlas-view")).to_contain_text(line)
        untouched(watched)


def test_an_address_made_by_somebody_else(watched: Page, site: Studio) -> None:
    """A link to the studio may say anything."""
    from urllib.parse import quote

    for query in ("tab={}&__theme={}", "tab=runs&run={}&compare={},{}", "tab=chat&target={}&{}={}"):
        site.open(watched, query.replace("{}", quote(HOSTILE)))
        untouched(watched)


def test_what_the_model_sees(watched: Page, site: Studio, tmp_path: Path, poisoned: Path) -> None:
    rows = [{"prompt": f"{HOSTILE} {n}", "completion": f"{text} {n}"} for n, text in enumerate([*ATTACKS, *MARKDOWN])]
    rows += [{"prompt": HOSTILE, "completion": None}, {"prompt": "x", HOSTILE: 1}]  # type: ignore[dict-item]
    data = tmp_path / "<img src=x class=taken onerror=alert(1)>.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    site.open(watched)
    for field, value in (("model-name", poisoned), ("data-path", data)):
        watched.fill(f"#field-{field} input", str(value))
        watched.keyboard.press("Enter")
        watched.keyboard.press("Tab")
    watched.click("#preview")
    expect(watched.locator("#preview-view .seen")).to_be_visible()
    for _ in range(3):
        watched.click("#preview-view .next")
    expect(watched.locator("#preview-view .tokens")).to_contain_text("onerror")


def test_fields_errors_and_presets(watched: Page, site: Studio) -> None:
    """What is wrong with a field quotes it; a preset has a name and a summary."""
    site.open(watched)
    for field in ("name", "adapter-num_experts"):
        watched.fill(f"#field-{field} textarea", HOSTILE)
    for field in ("model-name", "data-path"):
        watched.fill(f"#field-{field} input", HOSTILE)
        watched.keyboard.press("Enter")
        watched.keyboard.press("Tab")
    expect(watched.locator("#problem p")).to_contain_text("<img src=")
    watched.click("#start")
    untouched(watched)
    watched.click("#preset input")
    watched.get_by_role("option", name="Yours: theirs").click()
    expect(watched.locator("#preset-summary")).to_contain_text("<img src=")
    untouched(watched)


def test_a_config_file_with_a_hostile_name(watched: Page, site: Studio, tmp_path: Path) -> None:
    hostile = tmp_path / "<img src=x class=taken onerror=alert(1)>.yaml"
    hostile.write_text("model: {name: '<b class=taken>', dtype: '<i class=taken>'}\n", encoding="utf-8")
    site.open(watched)
    with watched.expect_file_chooser() as chooser:
        watched.click("#preset-load")
    chooser.value.set_files(str(hostile))
    expect(watched.locator("#problem p")).to_contain_text("<i class=taken>")


@pytest.mark.parametrize("target", ["finished", "base"])
def test_the_chat_and_the_routing_of_every_token(watched: Page, site: Studio, poisoned: Path, target: str) -> None:
    """The question and the answer are full of attacks, and so are the tokens beside them."""
    talk_to(watched, site, "finished" if target == "finished" else f"base:{poisoned}")
    watched.fill("#message textarea", HOSTILE + "\n".join(MARKDOWN))
    watched.keyboard.press("Enter")
    bot = watched.locator("#chatbot .bot.message").last
    expect(bot).to_contain_text("click me")
    expect(watched.locator("#chat-stop")).to_be_hidden()
    untouched(watched)
    for link in bot.get_by_text("click me").all():
        link.click(modifiers=["Control"])
    if target == "finished":
        expect(watched.locator("#routing-view")).to_contain_text("onerror")


def talk_to(page: Page, site: Studio, target: str) -> None:
    """The Chat tab with a target typed in, once the page has made its own choice."""
    site.open(page, "tab=chat")
    expect(page.locator("#target input")).not_to_have_value("Base model")
    page.fill("#target input", target)
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")


def test_an_error_in_the_chat(watched: Page, site: Studio) -> None:
    for text in (f"![x]({ELSEWHERE}/target)", f"base:{HOSTILE}"):
        talk_to(watched, site, text)
        watched.fill("#message textarea", "hello")
        watched.keyboard.press("Enter")
        expect(watched.locator("#chat-status")).to_contain_text("Not answered")
        expect(watched.locator("#chat-stop")).to_be_hidden()
        untouched(watched)
        assert watched.locator("#chat-status img").count() == 0
