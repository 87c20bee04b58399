"""The studio answers while hostile files lie in its home and are being used: none of them makes it stand still."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from serving import Studio, free_port, serve, studio_command

from mole import runs
from mole.config import RunConfig

from .conftest import visiting
from .test_public_studio import process_of

SECONDS = 1.0
"""The longest the page may take meanwhile."""
LOOKS = 5
IN_C = "{{ 10 ** (10 ** 9) }}"
"""A template during which no Python code runs in its process."""
MEMORY = "{{ 'a' * 10 ** 10 }}"
FOR_EVER = "(.+)+!"
"""A pattern for which Python's `re` needs ages, with the interpreter's lock held."""
RUNS = ("pipes", "links", "pattern", "long")


def hostile_adapter(adapter: Path, folder: Path, template: str = "", **config: Any) -> Path:
    """A copy of an adapter with a chat template and settings of a stranger."""
    shutil.copytree(adapter, folder)
    (folder / "manifest.json").unlink(missing_ok=True)
    if template:
        (folder / "chat_template.jinja").write_text(template)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    return folder


def hostile_model(model: Path, folder: Path, template: str) -> Path:
    """A copy of a model with a stranger's chat template."""
    shutil.copytree(model, folder)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": template}))
    return folder


def hostile_runs() -> None:
    """Run folders of a stranger: pipes, links, a pattern, a long history."""
    for kind in RUNS:
        run = runs.create(RunConfig.from_dict({"name": kind}))
        if kind == "pipes":
            for name in ("events.jsonl", "run.lock", "train.log", "stop"):
                (run.path / name).unlink(missing_ok=True)
                os.mkfifo(run.path / name)
        elif kind == "links":
            (run.path / "train.log").symlink_to("/dev/zero")
            (run.path / "checkpoints").symlink_to("/")
        elif kind == "pattern":
            text = run.config_path.read_text()
            run.config_path.write_text(text.replace("all-linear", f"'{FOR_EVER}'"))
        else:
            line = json.dumps({"time": time.time(), "type": "step", "step": 1, "loss": 1.0}) + "\n"
            with run.events_path.open("a") as events:
                events.write(line * 300_000)


@pytest.fixture
def besieged(home: Path) -> Iterator[Studio]:
    """A studio whose home has all of them."""
    hostile_runs()
    port = free_port()
    with serve(studio_command(port), port, home) as running:
        yield running


def slowest_look(studio: Studio) -> float:
    """Seconds of the slowest of some looks at the page."""
    taken = []
    with httpx.Client(base_url=studio.url, timeout=60, trust_env=False) as client:
        for _ in range(LOOKS):
            begun = time.monotonic()
            assert client.get("/").status_code == 200
            taken.append(time.monotonic() - begun)
            time.sleep(0.2)
    return max(taken)


def asking(studio: Studio, target: Path) -> Callable[[], Any]:
    """A message to a target."""
    stranger = visiting(studio)
    return lambda: stranger.call(stranger.named("chat"), [str(target), "Hello", 2, 0.0, 1.0, 0, "", None])


def previewing(studio: Studio, model: Path) -> Callable[[], Any]:
    """A click on the preview of the sample data with a model."""
    stranger = visiting(studio)
    ids = {part["props"].get("elem_id"): part["id"] for part in stranger.config["components"]}
    handler = next(entry for entry in stranger.endpoints if [ids["preview"], "click"] in entry["targets"])
    values = stranger.initial(handler)
    values[handler["inputs"].index(ids["field-model-name"])] = str(model)
    return lambda: stranger.call(handler, values)


def looking(studio: Studio, name: str) -> Callable[[], Any]:
    """A look at a run."""
    stranger = visiting(studio)
    return lambda: stranger.call(stranger.named("show_run"), [name])


def listing(studio: Studio) -> Callable[[], Any]:
    """A look at the list of runs."""
    stranger = visiting(studio)
    return lambda: stranger.call(stranger.named("list_runs"), [])


@pytest.mark.timed
def test_the_page_comes_within_a_second_whatever_is_being_used(
    besieged: Studio, tiny_adapter: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    """The last two never end by themselves here: the studio takes their processes with it."""
    warm = asking(besieged, tiny_adapter)()
    assert "error" not in warm, warm
    attacks = {
        **{f"the run {name}": looking(besieged, name) for name in RUNS},
        "the list": listing(besieged),
        "a pattern": asking(besieged, hostile_adapter(tiny_adapter, tmp_path / "a", target_modules=FOR_EVER)),
        "an exclusion": asking(besieged, hostile_adapter(tiny_adapter, tmp_path / "b", exclude_modules=FOR_EVER)),
        "memory": asking(besieged, hostile_adapter(tiny_adapter, tmp_path / "c", MEMORY)),
        "a preview": previewing(besieged, hostile_model(tiny_folder, tmp_path / "model", IN_C)),
        "a template": asking(besieged, hostile_adapter(tiny_adapter, tmp_path / "d", IN_C)),
    }
    slowest = {}
    studio = psutil.Process(process_of(besieged).pid)
    with ThreadPoolExecutor(len(attacks)) as threads:
        for name, attack in attacks.items():
            running = threads.submit(attack)
            slowest[name] = slowest_look(besieged)
            if name not in ("a preview", "a template"):
                running.result(timeout=120)
        processes = studio.children(recursive=True)
        assert len(processes) >= 2, "both hang"
        studio.kill()
        _, alive = psutil.wait_procs(processes, timeout=10)
    assert not alive, "what hung ended with the studio"
    print({name: round(seconds, 3) for name, seconds in slowest.items()})
    assert max(slowest.values()) <= SECONDS, slowest
