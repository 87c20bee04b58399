"""The engine behind the chat: turns, targets that share a base, steering for one reply, stopping."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch

from app.services.engine import ActiveReplies, Engine
from mole.config import ModelConfig
from mole.core.errors import InputError, ModelError
from mole.mixture.steering import Steering

HELLO = [{"role": "user", "content": "Which of these words is the longest?"}]
SHORT: dict[str, Any] = {"max_new_tokens": 6}


@pytest.fixture
def engine(home: Path, monkeypatch: pytest.MonkeyPatch) -> Engine:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    return Engine()


def said(engine: Engine, target: str, **given: Any) -> Any:
    *_, last = engine.reply(target, HELLO, SHORT, device="cpu", **given)
    return last


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_base_and_adapter_in_turn_on_one_base(
    engine: Engine, tiny_adapter: Path, tiny_folder: Path, auto_dtype: Callable[[str], None], dtype: str
) -> None:
    """In either of the dtypes that `auto` may be on a CPU."""
    auto_dtype(dtype)
    base, adapter = f"base:{tiny_folder}", str(tiny_adapter)
    first = [said(engine, target).text for target in (base, adapter)]
    assert first == [said(engine, target).text for target in (base, adapter)] and first[0] != first[1]
    assert engine.holds(base, "cpu") and engine.holds(adapter, "cpu")
    embeddings = set()
    for target in (base, adapter):
        with engine.cache.use(target, ModelConfig(device="cpu")) as loaded:
            embeddings.add(id(loaded.model.get_input_embeddings()))
            assert loaded.model.dtype == getattr(torch, dtype)
    assert len(embeddings) == 1, "both share one base model"
    engine.unload()
    assert not engine.holds(base, "cpu") and first[1] == said(engine, adapter).text


def test_steering_is_for_one_reply(engine: Engine, tiny_adapter: Path) -> None:
    before = said(engine, str(tiny_adapter))
    steered = said(engine, str(tiny_adapter), steering=Steering(muted=frozenset({1})), against=before.record.meta["id"])
    after = said(engine, str(tiny_adapter))
    weights = {name: last.trace_json()["weights"] for name, last in (("before", before), ("steered", steered))}
    assert all(layer[1] == 0 for token in weights["steered"] for layer in token)
    assert any(layer[1] > 0 for token in weights["before"] for layer in token)
    assert after.text == before.text and after.trace_json()["weights"] == weights["before"]
    assert steered.record.meta["against"] == before.record.meta["id"] and after.record.meta.get("against") is None


def test_the_trace_covers_prompt_and_reply(engine: Engine, tiny_adapter: Path) -> None:
    last = said(engine, str(tiny_adapter))
    trace = last.trace_json()
    assert len(trace["tokens"]) == len(trace["weights"]) == trace["prompt_tokens"] + last.count
    assert trace["router"] == "dynmole" and trace["experts"] == 3


def test_the_base_cannot_be_steered(engine: Engine, tiny_adapter: Path, tiny_folder: Path) -> None:
    said(engine, str(tiny_adapter))  # the adapter is on the same base, and is not meant
    with pytest.raises(InputError, match="no mixture of experts"):
        said(engine, f"base:{tiny_folder}", steering=Steering(muted=frozenset({0})))


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
    assert [part.finished for part in going][-1]
    assert said(engine, str(tiny_adapter)).count == 6, "the next one has its turn"


def test_an_abandoned_reply_gives_its_turn_back(engine: Engine, tiny_adapter: Path) -> None:
    going = engine.reply(str(tiny_adapter), HELLO, SHORT, device="cpu", steering=Steering(muted=frozenset({0})))
    next(going)
    going.close()
    assert any(layer[0] > 0 for token in said(engine, str(tiny_adapter)).trace_json()["weights"] for layer in token)


def test_too_little_memory_is_said_in_one_line(
    engine: Engine, tiny_adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    def full(*args: Any, **kwargs: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    said(engine, str(tiny_adapter))
    monkeypatch.setattr("mole.chat.generate.generate", full)
    with pytest.raises(ModelError, match="not enough memory for this reply"):
        said(engine, str(tiny_adapter))
    assert len(engine.cache) == 0, "what was there is given back"
    monkeypatch.undo()


def test_asking_stops_a_sessions_reply_and_so_does_its_next_one() -> None:
    replies = ActiveReplies()
    first, other = replies.start("a"), replies.start("b")
    assert not first() and not other()
    second = replies.start("a")
    assert first() and not second()
    replies.stop("a")
    assert second() and not other()


@pytest.mark.parametrize("pause", [0.5, *(pytest.param(pause, marks=pytest.mark.soak) for pause in (0.0, 1.2))])
def test_a_message_and_a_preview_while_the_libraries_are_still_being_imported(tiny_folder: Path, pause: float) -> None:
    """transformers resolves its names lazily, and would fail with "cannot import name AutoModel" here."""
    code = f"""
import threading, time
from app.services.engine import ENGINE
from mole.models import load_tokenizer
ENGINE.warm_up()
time.sleep({pause})
preview = threading.Thread(target=load_tokenizer, args=({str(tiny_folder)!r},))
preview.start()
assert not ENGINE.holds({f"base:{tiny_folder}"!r}, "cpu")
preview.join()
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0 and "Error" not in ended.stderr, ended.stderr


def test_a_first_reply_after_the_warm_up_imports_next_to_nothing(tiny_adapter: Path, home: Path) -> None:
    code = f"""
import sys, threading
from app.services.engine import Engine
engine = Engine()
engine.warm_up()
[thread.join() for thread in threading.enumerate() if thread.name == "warm-up"]
before = set(sys.modules)
list(engine.reply({str(tiny_adapter)!r}, {HELLO!r}, {SHORT!r}, device="cpu"))
print(sorted(name for name in set(sys.modules) - before if name.startswith(("torch", "transformers", "peft"))))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(done.stdout.split(",")) < 10, done.stdout
