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
import pyarrow as pa
import pyarrow.parquet as pq
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
EVENTS = 1 << 30
"""Size of a stranger's `events.jsonl`."""
BACKTRACKS = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
"""A part of a tokenizer that takes ages for many letters a before something else."""
ENDLESS_GGUF = b"GGUF" + b"".join(
    number.to_bytes(size, "little")
    for number, size in ((3, 4), (0, 8), (1, 8), (1, 8), (ord("a"), 1), (9, 4), (0, 4), (2**63, 8))
)
"""A header with one key, `a`, whose value is an array of 2⁶³ numbers."""


def hostile_adapter(adapter: Path, folder: Path, template: str = "", **config: Any) -> Path:
    """A copy of an adapter with a chat template and settings of a stranger."""
    shutil.copytree(adapter, folder)
    (folder / "manifest.json").unlink(missing_ok=True)
    if template:
        (folder / "chat_template.jinja").write_text(template)
    change_json(folder / "adapter_config.json", **config)
    return folder


def hostile_model(model: Path, folder: Path, template: str) -> Path:
    """A copy of a model with a stranger's chat template."""
    shutil.copytree(model, folder)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    change_json(folder / "tokenizer_config.json", chat_template=template)
    return folder


def hostile_tokenizer(model: Path, folder: Path) -> Path:
    """A copy of a model whose tokenizer splits by a pattern of a stranger."""
    shutil.copytree(model, folder)
    change_json(folder / "tokenizer.json", pre_tokenizer=BACKTRACKS)
    return folder


def change_json(path: Path, **values: Any) -> None:
    """Replace some values of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def hostile_gguf(file: Path, content: bytes) -> Path:
    """A model in one file."""
    file.write_bytes(content)
    return file


def parquet_bomb(file: Path) -> Path:
    """A file of some kilobytes that decodes to a gigabyte: a hundred thousand times the same text."""
    text = pa.DictionaryArray.from_arrays(pa.array(bytes(100_000), pa.int8()), ["x" * 10_000])
    pq.write_table(pa.table({"text": text}), file)
    return file


def wide_csv(file: Path) -> Path:
    """A table of 60,000 columns."""
    names = [f"column {number}" for number in range(60_000)]
    file.write_text(",".join(names) + "\n" + ",".join("a" * len(names)) + "\n")
    return file


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
            lines = (json.dumps({"time": time.time(), "type": "step", "step": 1, "loss": 1.0}) + "\n") * 10_000
            with run.events_path.open("a") as events:
                for _ in range(EVENTS // len(lines)):
                    events.write(lines)


@pytest.fixture
def besieged(home: Path) -> Iterator[Studio]:
    """A studio whose home has all of them."""
    hostile_runs()
    port = free_port()
    with serve(studio_command(port), port, home) as running:
        yield running
    runs.get("long").events_path.unlink()  # pytest keeps the folder for a while


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


def asking(studio: Studio, target: Path | str, message: str = "Hello") -> Callable[[], Any]:
    """A message to a target."""
    stranger = visiting(studio)
    return lambda: stranger.call(stranger.named("chat"), [str(target), message, 2, 0.0, 1.0, 0, "", None])


def previewing(studio: Studio, model: Path, data: Path | None = None) -> Callable[[], Any]:
    """A click on the preview of the sample data, or of a file, with a model."""
    stranger = visiting(studio)
    ids = {part["props"].get("elem_id"): part["id"] for part in stranger.config["components"]}
    handler = next(entry for entry in stranger.endpoints if [ids["preview"], "click"] in entry["targets"])
    values = stranger.initial(handler)
    values[handler["inputs"].index(ids["field-model-name"])] = str(model)
    if data is not None:
        values[handler["inputs"].index(ids["field-data-path"])] = str(data)
    return lambda: stranger.call(handler, values)


def looking(studio: Studio, name: str) -> Callable[[], Any]:
    """A look at a run."""
    stranger = visiting(studio)
    return lambda: stranger.call(stranger.named("show_run"), [name])


def listing(studio: Studio) -> Callable[[], Any]:
    """A look at the list of runs."""
    stranger = visiting(studio)
    return lambda: stranger.call(stranger.named("list_runs"), [])


LINES = {
    "a GGUF file": "endless.gguf",
    "a tokenizer": "retry-limit",
    "a Parquet file": "bomb.parquet",
    "a CSV file": "the maximum is 4096",
}
"""What the studio says about some of them: each was really used."""


@pytest.mark.timed
def test_the_page_comes_within_a_second_whatever_is_being_used(
    besieged: Studio, tiny_adapter: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    """The last two never end by themselves here: the studio takes their processes with it. A run that it woke meanwhile
    goes on without it, as runs do."""
    warm = asking(besieged, tiny_adapter)()
    assert "error" not in warm, warm
    attacks = {
        **{f"the run {name}": looking(besieged, name) for name in RUNS},
        "the list": listing(besieged),
        "a GGUF file": previewing(besieged, hostile_gguf(tmp_path / "endless.gguf", ENDLESS_GGUF)),
        "a tokenizer": asking(besieged, f"base:{hostile_tokenizer(tiny_folder, tmp_path / 't')}", "a" * 40 + "!"),
        "a Parquet file": previewing(besieged, tiny_folder, parquet_bomb(tmp_path / "bomb.parquet")),
        "a CSV file": previewing(besieged, tiny_folder, wide_csv(tmp_path / "wide.csv")),
        "a pattern": asking(besieged, hostile_adapter(tiny_adapter, tmp_path / "a", target_modules=FOR_EVER)),
        "an exclusion": asking(besieged, hostile_adapter(tiny_adapter, tmp_path / "b", exclude_modules=FOR_EVER)),
        "memory": asking(besieged, hostile_adapter(tiny_adapter, tmp_path / "c", MEMORY)),
        "a preview": previewing(besieged, hostile_model(tiny_folder, tmp_path / "model", IN_C)),
        "a template": asking(besieged, hostile_adapter(tiny_adapter, tmp_path / "d", IN_C)),
    }
    slowest, answers = {}, {}
    studio = psutil.Process(process_of(besieged).pid)
    with ThreadPoolExecutor(len(attacks)) as threads:
        for name, attack in attacks.items():
            running = threads.submit(attack)
            slowest[name] = slowest_look(besieged)
            if name not in ("a preview", "a template"):
                answers[name] = running.result(timeout=600)
        commands = {process: " ".join(process.cmdline()) for process in studio.children(recursive=True)}
        processes = [process for process, line in commands.items() if "mole.training.worker" not in line]
        assert len(processes) >= 2, "both hang"
        studio.kill()
        _, alive = psutil.wait_procs(processes, timeout=10)
    assert not alive, ("what hung ended with the studio", [commands[process] for process in alive])
    print({name: round(seconds, 3) for name, seconds in slowest.items()})
    assert max(slowest.values()) <= SECONDS, slowest
    for name, line in LINES.items():
        assert line in str(answers[name]), (name, answers[name])
