"""`mole atlas` and the job behind the page: a real tiny run, kept in its folder; two side by side; one HTML file."""

from __future__ import annotations

import json
import re
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from playwright._impl._driver import compute_driver_executable
from run_configs import finished_run

from mole.analysis.atlas import job as atlas_job
from mole.analysis.atlas.comparison import compare_atlases
from mole.analysis.atlas.corpus import read_corpus
from mole.analysis.atlas.inputs_process import begin_atlas
from mole.analysis.atlas.job import AtlasJob
from mole.analysis.atlas.page import atlas_page
from mole.analysis.atlas.stored import read_atlas
from mole.cli.parser import main
from mole.core import checkpoint
from mole.core.errors import DataError, InputError, RunError
from mole.models.adapter_files import WEIGHTS
from mole.runs.recorded_job import ALIVE
from mole.runs.run import Run

ROOT = Path(__file__).resolve().parents[3]
PATIENCE = 240
ROWS = [("Convert 3 km.", "3000 m", "units"), ("Sort: pear, fig.", "fig, pear", "sort"), ("Rude?", "yes", "<b>tone")]


@pytest.fixture
def data(tmp_path: Path) -> str:
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": asked, "completion": answer, "skill": skill} for asked, answer, skill in ROWS * 4]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture
def run(home: Path, tiny_folder: Path, data: str) -> Run:
    """Its checkpoints are those of steps 2 and 3."""
    return finished_run("tiny", tiny_folder, Path(data), experts=3)


def ended(job: AtlasJob) -> dict[str, Any]:
    until = time.monotonic() + PATIENCE
    while (status := job.status())["state"] in ALIVE:
        assert time.monotonic() < until, status
        time.sleep(0.05)
    return status


def test_the_command_and_the_job_of_the_page_keep_the_same_atlas_in_the_runs_folder(
    run: Run, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], auto_dtype: Callable[[str], None]
) -> None:
    auto_dtype("float32")
    asked = ["atlas", run.name, "--data", data, "--by", "skill", "--json", str(tmp_path / "a.json")]
    assert main([*asked, "--html", str(tmp_path / "a.html")]) == 0
    out, err = capsys.readouterr()
    assert "skill" in out and "bits above chance" in out and "Routing" in err and "Muting" in err
    started = begin_atlas(run.name, data, ["skill"], None, quick=False)  # as the page does
    status = ended(started)
    assert status["state"] == "finished" and status["rows"] == 12, status
    assert [one.number for one in atlas_job.atlases_of(run)] == [2, 1]
    first, second = (one.atlas() for one in reversed(atlas_job.atlases_of(run)))
    assert first == second == json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))
    assert first["saturation"]["steps"] == [2, 3]
    assert first["saturation"]["by_k"]["1"][-1] == [1.0] * 14  # the last checkpoint is the final adapter
    assert len(first["muting"]["experts"]) == 6 and first["notices"] == []
    assert {path.suffix for path in (run.path / "atlas").iterdir()} >= {".json"}
    assert not [path for path in (run.path / "atlas").iterdir() if path.name.startswith(".")]


def test_what_is_wrong_is_one_line_before_anything_starts(
    run: Run, data: str, make_adapter: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = tmp_path / "one.jsonl"
    one.write_text(json.dumps({"text": "a"}), encoding="utf-8")
    (tmp_path / "empty.jsonl").write_text("", encoding="utf-8")
    lora = str(make_adapter(router="lora", num_experts=1))
    for target, arguments, line in (
        (
            "tiny",
            ["--data", data, "--by", "skil"],
            "has no column 'skil' (--by); its columns: prompt, completion, skill.",
        ),
        ("tiny", ["--data", str(one)], "has one usable row; an atlas needs at least 2 rows"),
        ("tiny", ["--data", str(tmp_path / "empty.jsonl")], "empty.jsonl is empty."),
        ("base:smollm2-135m", ["--data", data], "has no routed adapter: it is a base model"),
        (lora, ["--data", data], "has no routed adapter"),
        ("nowhere", ["--data", data], "There is no run"),
    ):
        assert main(["atlas", target, *arguments]) == 2
        error = [text for text in capsys.readouterr().err.splitlines() if text.startswith("mole:")]
        assert len(error) == 1 and line in error[0]
    for start in (atlas_job.start_atlas, partial(begin_atlas, limit=None, quick=True)):
        with pytest.raises(DataError) as caught:
            start(run.name, data, by=["skil"])
        assert caught.value.field == "by" and atlas_job.atlases_of(run) == []


def test_a_cancelled_one_and_one_that_is_no_atlas_say_so(run: Run, data: str) -> None:
    started = atlas_job.start_atlas(run.name, data)
    started.cancel()
    assert ended(started)["state"] == "cancelled"
    with pytest.raises(InputError, match="There is no atlas in"):
        started.atlas()
    with pytest.raises(RunError, match="The atlas 1 of tiny is cancelled"):
        started.cancel()
    started.file("atlas.json").write_text('{"format": 99}', encoding="utf-8")
    with pytest.raises(InputError, match=r"is no atlas of the version 1; compute it again\."):
        read_atlas(started.file("atlas.json"))


# ---------------------------------------------------------------------------------------------------------
# Side by side, and the page


@pytest.fixture
def two(
    home: Path, make_adapter: Callable[..., Path], data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> list[dict[str, Any]]:
    """The atlases of two adapters over the same rows."""
    targets = [str(make_adapter(router=router, num_experts=3, target_modules=names)) for router, names in
               (("topk", ["q_proj", "v_proj"]), ("dynmole", ["q_proj"]))]  # fmt: skip
    file = str(tmp_path / "two.json")
    command = ["atlas", targets[0], "--versus", targets[1], "--data", data, "--by", "skill", "--quick", "--json", file]
    assert main(command) == 0
    both = json.loads(Path(file).read_text(encoding="utf-8"))
    assert both["comparison"] == compare_atlases(*both["atlases"])
    atlases: list[dict[str, Any]] = both["atlases"]
    return atlases


def test_two_are_compared_in_what_both_have_and_only_over_the_same_rows(two: list[dict[str, Any]]) -> None:
    found = compare_atlases(*two)
    assert found["projections"] == [f"model.layers.{layer}.self_attn.q_proj" for layer in (0, 1)]
    place = [one["name"] for one in two[0]["projections"]].index(found["projections"][1])
    skill = next(one for one in two[0]["variables"] if one["name"] == "skill")
    assert found["specialisation"]["skill"][0][1] == skill["specialisation"]["excess"][place]
    assert found["entropy"][1] == [one["entropy"] for one in two[1]["projections"]]
    with pytest.raises(InputError, match="are not of the same rows: sha256 is"):
        compare_atlases(two[0], {**two[1], "sha256": "other"})


RENDER = """
const fs = require("fs");
const html = fs.readFileSync(process.argv[1], "utf8");
const parts = [...html.matchAll(/<script[^>]*>([^]*?)<\\/script>/g)].map((found) => found[1]);
class Node {
  style = { setProperty() {} };
  constructor(tag, data) { this.tag = tag; this.data = data; this.children = []; this.attributes = {}; }
  append(...more) { for (const one of more) this.children.push(one instanceof Node ? one : new Node("", String(one))); }
  replaceChildren(...more) { this.children = []; this.append(...more); }
  setAttribute(name, value) { this.attributes[name] = value; }
  get text() { return this.tag ? this.children.map((one) => one.text).join(" ") : this.data; }
  get all() { return [this, ...this.children.flatMap((one) => one.all)]; }
  querySelectorAll(tag) { return this.all.filter((one) => one.tag === tag); }
  querySelector(tag) { return this.all.find((one) => one.tag === tag) || { focus() {}, scrollIntoView() {} }; }
  get firstChild() { return this.children[0]; }
  focus() {}
}
const page = new Node("div");
global.document = {
  createElement: (tag) => new Node(tag),
  getElementById: (name) => (name === "data" ? { textContent: parts[0] } : page),
};
new Function(parts[1])();
for (const select of page.querySelectorAll("select")) select.onchange({ target: { value: "1" } });
for (const button of page.querySelectorAll("button")) button.onclick();
console.log(page.text);
"""


def test_the_page_is_one_file_that_loads_nothing_and_shows_texts_as_texts(
    two: list[dict[str, Any]], tmp_path: Path
) -> None:
    for atlases in (two[:1], two):
        html = atlas_page(atlases)
        assert not re.search(r"(src|href)\s*=|url\(|@import|fetch\(|innerHTML", html)
        assert "<b>tone" not in html and html.count("</script>") == 2 and "{{" not in html
        (tmp_path / "page.html").write_text(html, encoding="utf-8")
        command = [compute_driver_executable()[0], "-e", RENDER, str(tmp_path / "page.html")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=6000)
        assert done.returncode == 0, done.stderr
        assert "<b>tone" in done.stdout and "Co-activation" in done.stdout
        assert ("Side by side" in done.stdout) == (len(atlases) == 2)


def test_the_demo_s_atlas_is_of_the_adapter_and_the_rows_that_come_with_it() -> None:
    atlas = read_atlas(ROOT / "assets" / "demo" / "atlas.json")
    assert atlas["adapter"] == checkpoint.sha256(ROOT / "assets" / "demo" / "adapter" / WEIGHTS)
    assert atlas["sha256"] == read_corpus(str(ROOT / "assets" / "data" / "skills_heldout.jsonl")).fingerprint
    assert [one["name"] for one in atlas["variables"]] == ["token", "position", "part", "skill"]
    assert len(atlas["projections"]) == 210 and len(atlas["muting"]["experts"]) == 240
