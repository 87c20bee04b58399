"""The engine behind the chat: turns, targets that share a base, steering for one reply, stopping, and what hangs."""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from multiprocessing.connection import Pipe
from pathlib import Path
from threading import Thread
from typing import Any

import psutil
import pytest

from app.services import engine as engine_module
from app.services.engine import ActiveReplies, Engine, PartialReply
from mole.chat.messages import ReplyJob, Stage
from mole.chat.process import ReplyGenerator
from mole.config import ModelConfig
from mole.core.errors import InputError, ModelError
from mole.mixture.steering import Steering

HELLO = [{"role": "user", "content": "Which of these words is the longest?"}]
SHORT: dict[str, Any] = {"max_new_tokens": 6}
LONG: dict[str, Any] = {"max_new_tokens": 500}


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """One process for all tests that leave it as it was: it imports torch for seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOLE_HOME", str(tmp_path_factory.mktemp("home")))
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        engine = Engine()
        yield engine
        engine.unload()


def parts_of(engine: Engine, target: str, settings: dict[str, Any] = SHORT, **given: Any) -> list[Any]:
    return list(engine.reply(target, HELLO, settings, device="cpu", with_trace=True, **given))


def said(engine: Engine, target: str, **given: Any) -> PartialReply:
    *_, last = parts_of(engine, target, **given)
    assert isinstance(last, PartialReply)
    return last


def routing(reply: PartialReply) -> Any:
    assert reply.trace is not None
    return reply.trace["weights"]


def process_of(engine: Engine) -> psutil.Process:
    process = engine._child._process
    assert process is not None
    return psutil.Process(process.pid)


def test_steering_is_for_one_reply(engine: Engine, tiny_adapter: Path) -> None:
    before = said(engine, str(tiny_adapter))
    steered = said(engine, str(tiny_adapter), steering=Steering(muted=frozenset({1})), against=before.record.meta["id"])
    after = said(engine, str(tiny_adapter))
    assert all(layer[1] == 0 for token in routing(steered) for layer in token)
    assert any(layer[1] > 0 for token in routing(before) for layer in token)
    assert after.text == before.text and routing(after) == routing(before)
    assert steered.record.meta["against"] == before.record.meta["id"] and after.record.meta.get("against") is None


def test_the_trace_and_the_record_cover_prompt_and_reply(engine: Engine, tiny_adapter: Path) -> None:
    last = said(engine, str(tiny_adapter))
    trace = last.trace or {}
    assert len(trace["tokens"]) == len(trace["weights"]) == trace["prompt_tokens"] + last.count
    assert trace["router"] == "dynmole" and trace["experts"] == 3
    assert last.record.tokens == trace["tokens"] and last.record.meta["prompt"] == trace["prompt_tokens"]


def test_the_stages_come_before_the_reply_and_loading_only_once(engine: Engine, tiny_adapter: Path) -> None:
    said(engine, str(tiny_adapter))
    stages = [part for part in parts_of(engine, str(tiny_adapter)) if isinstance(part, Stage)]
    assert stages == [Stage.ENCODING, Stage.GENERATING]
    engine.unload()
    stages = [part for part in parts_of(engine, str(tiny_adapter)) if isinstance(part, Stage)]
    assert stages == [Stage.LOADING, Stage.ENCODING, Stage.GENERATING]


def test_the_base_cannot_be_steered(engine: Engine, tiny_adapter: Path, tiny_folder: Path) -> None:
    said(engine, str(tiny_adapter))  # the adapter is on the same base, and is not meant
    with pytest.raises(InputError, match="no mixture of experts"):
        said(engine, f"base:{tiny_folder}", steering=Steering(muted=frozenset({0})))
    assert said(engine, f"base:{tiny_folder}").count == 6, "the process goes on"


def test_a_second_reply_waits_its_turn_and_may_be_stopped_meanwhile(engine: Engine, tiny_adapter: Path) -> None:
    going = engine.reply(str(tiny_adapter), HELLO, SHORT, device="cpu")
    next(going)
    waited: list[Any] = []
    stops = iter([False, True])
    thread = Thread(
        target=lambda: waited.append(list(engine.reply(str(tiny_adapter), HELLO, SHORT, lambda: next(stops))))
    )
    thread.start()
    thread.join(20)
    assert waited == [[]], "stopped before its turn, it says nothing"
    *_, last = going
    assert isinstance(last, PartialReply) and last.finished
    assert said(engine, str(tiny_adapter)).count == 6, "the next one has its turn"


def test_a_stopped_reply_ends_with_what_it_has(engine: Engine, tiny_adapter: Path) -> None:
    asked = itertools.count()
    *_, last = parts_of(engine, str(tiny_adapter), LONG, should_stop=lambda: next(asked) > 8)
    assert isinstance(last, PartialReply) and last.finished and last.count < 500
    pid = process_of(engine).pid
    assert said(engine, str(tiny_adapter)).count == 6 and process_of(engine).pid == pid, "its models stay"


def test_an_abandoned_reply_gives_its_turn_back(engine: Engine, tiny_adapter: Path) -> None:
    said(engine, str(tiny_adapter))
    pid = process_of(engine).pid
    going = engine.reply(str(tiny_adapter), HELLO, LONG, device="cpu", steering=Steering(muted=frozenset({0})))
    next(part for part in going if isinstance(part, PartialReply))
    going.close()
    assert any(layer[0] > 0 for token in routing(said(engine, str(tiny_adapter))) for layer in token)
    assert process_of(engine).pid == pid


def test_a_killed_process_is_one_line_and_the_next_reply_starts_another(engine: Engine, tiny_adapter: Path) -> None:
    """As the kernel does when the memory runs out."""
    going = engine.reply(str(tiny_adapter), HELLO, LONG, device="cpu")
    next(part for part in going if isinstance(part, PartialReply))
    process_of(engine).kill()
    with pytest.raises(ModelError, match="its process was ended, most likely because the memory ran out"):
        list(going)
    assert said(engine, str(tiny_adapter)).count == 6


TEMPLATES = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}{% endfor %}"
    "{% endfor %}",
    "computes": "{{ 10 ** (10 ** 9) }}",  # in C: no Python code runs meanwhile, nor any other thread
}


def with_template(adapter: Path, folder: Path, template: str) -> str:
    shutil.copytree(adapter, folder)
    (folder / "manifest.json").unlink(missing_ok=True)
    (folder / "chat_template.jinja").write_text(template)
    return str(folder)


@pytest.mark.parametrize("kind", list(TEMPLATES))
def test_a_template_without_an_end_is_given_up_and_the_next_reply_comes(
    engine: Engine, tiny_adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setitem(engine_module.LIMITS, Stage.ENCODING, 2.0)
    target = with_template(tiny_adapter, tmp_path / "adapter", TEMPLATES[kind])
    with pytest.raises(ModelError, match="^The model's chat template or tokenizer does not come to an end"):
        said(engine, target)
    monkeypatch.undo()
    assert said(engine, str(tiny_adapter)).count == 6


def test_a_template_without_an_end_can_be_stopped(engine: Engine, tiny_adapter: Path, tmp_path: Path) -> None:
    target = with_template(tiny_adapter, tmp_path / "adapter", TEMPLATES["computes"])
    stopping = [False]
    begun = time.monotonic()
    for part in engine.reply(target, HELLO, SHORT, lambda: stopping[0], device="cpu"):
        stopping[0] |= part == Stage.ENCODING
    assert time.monotonic() - begun < 30
    assert said(engine, str(tiny_adapter)).count == 6


def test_a_template_that_takes_all_the_memory_is_one_line(engine: Engine, tiny_adapter: Path, tmp_path: Path) -> None:
    target = with_template(tiny_adapter, tmp_path / "adapter", "{{ 'a' * 10 ** 10 }}")
    with pytest.raises(InputError, match="the chat template rejects the messages: MemoryError"):
        said(engine, target)
    assert said(engine, str(tiny_adapter)).count == 6


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_base_and_adapter_in_turn_on_one_base(
    home: Path, tiny_adapter: Path, tiny_folder: Path, auto_dtype: Callable[[str], None], dtype: str
) -> None:
    """In either of the dtypes that `auto` may be on a CPU."""
    import torch

    auto_dtype(dtype)
    generator = ReplyGenerator()

    def text(target: str) -> str:
        ours, theirs = Pipe()
        generator.answer(ReplyJob(target, HELLO, SHORT, {}, "cpu", with_trace=False), theirs)
        theirs.close()
        received = []
        while ours.poll():
            try:
                received.append(ours.recv())
            except EOFError:
                break
        return str(received[-1].text)

    base, adapter = f"base:{tiny_folder}", str(tiny_adapter)
    first = [text(target) for target in (base, adapter)]
    assert first == [text(target) for target in (base, adapter)] and first[0] != first[1]
    embeddings = set()
    for target in (base, adapter):
        assert generator.cache.holds(target, ModelConfig(device="cpu"))
        with generator.cache.use(target, ModelConfig(device="cpu")) as loaded:
            embeddings.add(id(loaded.model.get_input_embeddings()))
            assert loaded.model.dtype == getattr(torch, dtype)
    assert len(embeddings) == 1, "both share one base model"


def test_too_little_memory_is_said_in_one_line(home: Path, tiny_adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    def full(*args: Any, **kwargs: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    generator, job = ReplyGenerator(), ReplyJob(str(tiny_adapter), HELLO, SHORT, {}, "cpu", with_trace=False)
    monkeypatch.setattr("mole.chat.generate.generate", full)
    ours, theirs = Pipe()
    with ours, theirs, pytest.raises(ModelError, match="not enough memory for this reply"):
        generator.answer(job, theirs)
    assert len(generator.cache) == 0, "what was there is given back"


def test_when_memory_runs_out_nothing_keeps_what_took_it(
    home: Path, tiny_adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error's traceback refers to the frames that it came through, and so to the model and what it has computed."""
    import torch

    import mole.chat.model_cache as cache

    kept: list[weakref.ref[Any]] = []

    def full(model: Any, *args: Any, **kwargs: Any) -> Any:
        computed = torch.ones(8)
        kept.extend([weakref.ref(model), weakref.ref(computed)])
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    left: list[list[Any]] = []
    release = cache.release_memory
    monkeypatch.setattr(cache, "release_memory", lambda: (release(), left.append([each() for each in kept])))
    monkeypatch.setattr("mole.chat.generate.generate", full)
    generator, job = ReplyGenerator(), ReplyJob(str(tiny_adapter), HELLO, SHORT, {}, "cpu", with_trace=False)
    ours, theirs = Pipe()
    with ours, theirs, pytest.raises(ModelError):
        generator.answer(job, theirs)
    assert left[-1] == [None, None], "before the memory is given back to the GPU"


def test_asking_stops_a_sessions_reply_and_so_does_its_next_one() -> None:
    replies = ActiveReplies()
    first, other = replies.start("a"), replies.start("b")
    assert not first() and not other()
    second = replies.start("a")
    assert first() and not second()
    replies.stop("a")
    assert second() and not other()


def test_a_studio_that_chats_imports_no_torch(tiny_adapter: Path, home: Path) -> None:
    code = f"""
import json, sys
from app.page import build_page
from app.services.engine import ENGINE
*_, last = ENGINE.reply({str(tiny_adapter)!r}, {HELLO!r}, {SHORT!r}, device="cpu")
print(json.dumps([last.count, sorted({{name.partition(".")[0] for name in sys.modules}})]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=6000)
    assert done.returncode == 0, done.stderr[-2000:]
    count, modules = json.loads(done.stdout.splitlines()[-1])
    assert count == 6 and not {"torch", "transformers", "peft"} & set(modules)
