"""How much of everything: each bound says so in one line by its field, before the work is done."""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import socket
import typing
from pathlib import Path
from typing import Any

import pytest
import yaml

from app import settings
from app.services import answering, endpoints
from app.services.conversation import Turn
from mole import runs
from mole.config import (
    BUILT_IN_PRESETS,
    ROUTERS,
    SECTIONS,
    RunConfig,
    parse_yaml,
    read_yaml,
    save_preset,
    spec_of,
    union_members,
)
from mole.core import limits
from mole.core.errors import BusyError, ConfigError, DataError, InputError, RunError
from mole.data import read_examples
from mole.evaluation import job as evaluation_job
from mole.runs import grid

from .conftest import API, PATIENCE, Stranger

MB = 1 << 20


def config(**sections: Any) -> RunConfig:
    return RunConfig.from_dict(sections)


@pytest.mark.parametrize(
    ("section", "values", "field", "most"),
    [
        ("data", {"max_length": limits.LENGTH + 1}, "data.max_length", limits.LENGTH),
        ("data", {"max_length": 10**12}, "data.max_length", limits.LENGTH),
        ("adapter", {"router": "sparsegen", "lambda_hidden": 10**9}, "adapter.lambda_hidden", limits.HIDDEN),
        ("adapter", {"router": "topk", "top_k": 10**9}, "adapter.top_k", limits.EXPERTS),
        ("training", {"max_steps": 10**18}, "training.max_steps", r"1e\+09"),
        ("adapter", {"r": limits.RANK + 1}, "adapter.r", limits.RANK),
        ("adapter", {"num_experts": limits.EXPERTS + 1}, "adapter.num_experts", limits.EXPERTS),
        ("adapter", {"num_experts": [2, 10**9]}, "adapter.num_experts", limits.EXPERTS),
        ("adapter", {"num_experts": [1] * 10_000}, "adapter.num_experts", limits.EXPERTS),
        ("adapter", {"num_experts": 256, "r": 1024}, "adapter.num_experts", limits.RANK_TIMES_EXPERTS),
        ("training", {"per_device_train_batch_size": 10**9}, "training.per_device_train_batch_size", limits.BATCH),
        ("training", {"gradient_accumulation_steps": 10**9}, "training.gradient_accumulation_steps", limits.BATCH),
    ],
)
def test_the_size_of_a_run(section: str, values: dict[str, Any], field: str, most: int | str) -> None:
    with pytest.raises(ConfigError, match=f"at most {most}") as caught:
        config(**{section: values})
    assert caught.value.field == field and len(str(caught.value)) < 600


def test_what_the_papers_use_is_far_below() -> None:
    for preset in BUILT_IN_PRESETS:
        preset.run_config({})
    config(adapter={"num_experts": 64, "r": 256}, data={"max_length": 32_768})


def test_rows_and_bytes_of_a_data_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "x"}\n' * 30)
    monkeypatch.setattr(limits, "ROWS", 20)
    with pytest.raises(DataError, match="contains 30 rows; the maximum is 20") as caught:
        read_examples(str(path))
    assert caught.value.field == "data.path"
    monkeypatch.undo()
    with path.open("r+b") as sparse:
        sparse.truncate(limits.FILE_BYTES + 1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DataError, match="MB; the maximum is 4096 MB"):
        read_examples(str(path))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10, "it was not read"


def test_a_parquet_file_of_a_few_bytes_that_stands_for_millions_of_rows(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "rows.parquet"
    count = limits.ROWS + 1
    column = pyarrow.DictionaryArray.from_arrays(pyarrow.array(bytes(count), pyarrow.int8()), ["x"])
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), path)
    assert path.stat().st_size < MB
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DataError, match=f"rows.parquet contains {count} rows"):
        read_examples(str(path))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10, "no row was made of it"


@pytest.mark.parametrize("name", ["/dev/zero", "/dev/stdin", "pipe.jsonl"])
def test_a_device_or_a_pipe_is_no_file(tmp_path: Path, name: str) -> None:
    """They never end, or wait for somebody to write."""
    path = tmp_path / (name if name.endswith(".jsonl") else "link.jsonl")
    if name.endswith(".jsonl"):
        os.mkfifo(path)
    else:
        path.symlink_to(name)
    with pytest.raises(DataError, match="is not a regular file|There is no file"):
        read_examples(str(path))


BOMB = "\n".join(
    ["a0: &a0 [x, x, x, x, x, x, x, x, x]"] + [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)]
)


@pytest.mark.timeout(PATIENCE)
@pytest.mark.parametrize(
    "text", [BOMB, "a: &a [*a]", "a: {<<: &b {x: *b}}", "[" * 50_000, "- " * 50_000, "a: " + "{a: " * 20_000]
)
def test_a_small_yaml_file_that_stands_for_a_gigantic_one(tmp_path: Path, text: str) -> None:
    """A billion laughs: references to references. They are not followed, nor quoted."""
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        read_yaml(path)
    assert len(str(caught.value)) < 1000
    with pytest.raises(yaml.YAMLError):
        parse_yaml(text)
    assert len(grid.parse_values("&a [x], *a")) == 2, "text between commas, not a reference"


@pytest.mark.parametrize(
    "value", ["!!python/object/apply:os.system ['true']", "!!python/name:os.system", "!x y", "2001-99-99"]
)
def test_yaml_makes_no_objects(tmp_path: Path, value: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(f"name: {value}\n")
    with pytest.raises(InputError):
        RunConfig.load(path)


@pytest.mark.timeout(PATIENCE)
def test_the_queue_and_the_grid(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=f"{limits.QUEUE} runs can be queued at a time"):
        grid.expand({}, {"training.seed": list(range(100)), "adapter.r": list(range(1, 100))}, "g")
    axes = {f"training.{name}": list(range(1000)) for name in ("seed", "max_steps", "save_steps", "eval_steps")}
    with pytest.raises(InputError, match="combinations"):  # counted, not made: there are 10¹²
        grid.expand({}, axes, "g")
    for number in range(limits.QUEUE):
        run = runs.create(config(name=f"r{number}"))
        run.append_event("queued", 0, device="cpu", resume=False, position=float(number))
    with pytest.raises(BusyError, match=f"limit of {limits.QUEUE}"):
        runs.check_room()


def test_presets_of_one_s_own(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "PRESETS", 3)
    for number in range(3):
        save_preset(f"p{number}", RunConfig())
    save_preset("p0", RunConfig())  # in place of itself
    with pytest.raises(RunError, match="already 3 saved presets") as caught:
        save_preset("p3", RunConfig())
    assert caught.value.field == "preset"
    with pytest.raises(RunError, match="64 KB"):
        save_preset("p0", config(data={"columns": {"prompt": "x" * 100_000}}))
    assert len(list((home / "presets").iterdir())) == 3


def test_uploads_that_are_kept(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "UPLOADS", 3)
    files = []
    for number in range(4):
        files.append(tmp_path / f"{number}.jsonl")
        files[-1].write_text(f'{{"text": "{number}"}}')
    for path in [*files[:3], files[0]]:
        settings.keep_upload(str(path))
    with pytest.raises(DataError, match=r"3 uploads are kept already.*delete some in") as caught:
        settings.keep_upload(str(files[3]))
    assert caught.value.field == "data.path" and len(list((home / "uploads").iterdir())) == 3


@pytest.mark.parametrize(
    ("message", "system", "tokens", "field"),
    [
        ("x" * (limits.MESSAGE + 1), "", 1, "message"),
        ("x", "x" * (limits.MESSAGE + 1), 1, "system"),
        ("x", "", limits.NEW_TOKENS + 1, "max_new_tokens"),
        ("x", "", 0, "max_new_tokens"),
        ("x", "", -1, "max_new_tokens"),
        ("x", "", 10**30, "max_new_tokens"),
        ("x", "", float("nan"), "max_new_tokens"),
    ],
)
def test_what_is_asked_of_a_model(message: str, system: str, tokens: float, field: str) -> None:
    with pytest.raises(InputError) as caught:
        settings.check_asked(message, system, tokens)
    assert caught.value.field == field and len(str(caught.value)) < 300
    question = answering.ReplyRequest({"max_new_tokens": tokens}, system)
    column = answering.ChatColumn("nobody", [Turn(message)])
    (*_, last) = answering.answer_columns([column], question, answering.LastRecords())
    assert "Not answered" in (last.status or "") and field in (last.status or "").replace("\\", "")
    with pytest.raises(Exception, match=field):
        endpoints.api_chat("nobody", message, max_new_tokens=tokens if tokens == tokens else 0, system=system)


# ---------------------------------------------------------------------------------------------------------
# At the server


def test_requests_of_too_many_bytes(stranger: Stranger) -> None:
    """Told before the body is sent, or cut off while it comes; the upload has a larger measure of its own."""

    def endless(size: int) -> Any:
        yield from (b"x" * MB for _ in range(size // MB))

    for path in ("/run/predict", "/queue/join", "/component_server", "/process_recording", "/call/chat"):
        answer = stranger.http.post(API + path, content=b"x" * (limits.REQUEST_BYTES + 1))
        assert answer.status_code == 413 and "larger than 8 MB" in answer.text, path
        answer = stranger.http.post(API + path, content=endless(limits.REQUEST_BYTES + 4 * MB))
        assert answer.status_code in (400, 413, 422), (path, answer.status_code)
    with socket.create_connection(("127.0.0.1", int(stranger.studio.url.rpartition(":")[2]))) as wire:
        size = limits.UPLOAD_BYTES + 2 * MB  # of which not one byte is sent
        wire.sendall(f"POST {API}/upload HTTP/1.1\r\nHost: localhost\r\nContent-Length: {size}\r\n\r\n".encode())
        wire.settimeout(PATIENCE)
        assert b" 413 " in wire.recv(1000)
    nested = json.dumps({"data": []})[:-2] + "[" * 200_000
    assert stranger.http.post(f"{API}/run/predict", content=nested).status_code in (400, 422)
    assert "Traceback" not in stranger.log()


def test_a_line_at_the_door_that_is_full_says_so(stranger: Stranger) -> None:
    """More than `limits.LINE` requests for the handler that answers: the next one is refused in one line, not kept."""
    from concurrent.futures import ThreadPoolExecutor

    chat = stranger.named("chat")
    message = "word " * 200
    body = {
        "fn_index": chat["id"],
        "data": ["base:smollm2-135m", message, 512, 0.0, 1.0, 0, "", None],
        "session_hash": "s",
    }

    def join(_: int) -> tuple[int, str]:
        answer = stranger.http.post(f"{API}/queue/join", json=body)
        return answer.status_code, answer.text

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(join, range(limits.LINE + 40)))
    refused = [text for status, text in answers if status == 503]
    assert refused and all("Queue is full" in text and "\n" not in text for text in refused)
    taken = [json.loads(text)["event_id"] for status, text in answers if status == 200]
    assert len(taken) <= limits.LINE + 8
    for event in taken:
        stranger.http.post(f"{API}/cancel", json={"session_hash": "s", "fn_index": chat["id"], "event_id": event})
    assert stranger.http.get("/config").status_code == 200


def test_the_line_cannot_be_passed_by(stranger: Stranger) -> None:
    """Gradio's direct routes would call a handler at once, beside the counted ones."""
    for endpoint in stranger.endpoints:
        if endpoint["queue"]:
            body = {"fn_index": endpoint["id"], "data": stranger.initial(endpoint), "session_hash": "s"}
            for route in ("/run/predict", "/api/predict"):
                answer = stranger.http.post(API + route, json=body)
                assert answer.status_code == 404 and "join the queue" in answer.text
            return
    raise AssertionError("no handler goes through the line")


def test_an_evaluation_takes_no_more_rows_than_there_may_be(home: Path, tmp_path: Path) -> None:
    run = runs.create(config(name="mine"))
    with pytest.raises(ConfigError, match="at least 1"):
        evaluation_job.data_columns(run, str(tmp_path), 0)


def test_every_number_among_the_settings_has_an_upper_limit() -> None:
    """None is a way to ask for any amount of memory or time; the limit is in the error and under the form's field."""
    for section in (*SECTIONS.values(), *ROUTERS.values()):
        for item in dataclasses.fields(section):
            kinds = set(union_members(typing.get_type_hints(section)[item.name]))
            if kinds & {int, float} and "spec" in item.metadata and item.name != "num_experts":
                spec = spec_of(item)
                assert spec.le is not None and "at most" in spec.range_text(), f"{section.__name__}.{item.name}"
