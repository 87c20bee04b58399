"""Compiled kernels as a chat gets them: in the background after its first reply, kept for the next, done without."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from adapting import TOKENS, adapt

from mole.chat.messages import Part, ReplyJob
from mole.chat.process import ReplyGenerator
from mole.mixture import aot_compile
from mole.mixture.aot_compile import prepare_kernels
from mole.mixture.decode_kernel import KERNELS

HELLO = [{"role": "user", "content": "Which of these words is the longest?"}]


@pytest.fixture(autouse=True)
def switched_on(monkeypatch: pytest.MonkeyPatch, auto_dtype: Callable[[str], None]) -> Iterator[None]:
    auto_dtype("float32")  # in bfloat16 rounding decides on the text of a random model
    monkeypatch.setenv("MOLE_COMPILE", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    KERNELS.clear()
    yield
    KERNELS.clear()


class Parts(list[Any]):
    """What a reply sends, in this process."""

    send = list.append

    def poll(self) -> bool:
        return False


def reply(generator: ReplyGenerator, target: Path) -> Part:
    sent: Any = Parts()
    generator.answer(ReplyJob(str(target), HELLO, {"max_new_tokens": 12}, {}, "cpu", with_trace=True), sent)
    last: Part = sent[-1]
    return last


def wait_for(count: int, seconds: float = 590) -> None:
    """Until so many functions are there; on a busy machine the process that makes them has to wait for its turn."""
    deadline = time.monotonic() + seconds
    while len(KERNELS) < count:
        assert time.monotonic() < deadline, f"only {len(KERNELS)} kernels"
        time.sleep(0.2)


@pytest.mark.timeout(700)
@pytest.mark.parametrize(
    ("targets", "count"),
    [(["down_proj"], 1), pytest.param("all-linear", 3, marks=pytest.mark.soak)],  # q, k and v; gate and up; one alone
)
def test_the_first_reply_waits_for_nothing_and_later_ones_say_the_same(
    targets: Any, count: int, home: Path, make_adapter: Callable[..., Path]
) -> None:
    engine, adapter = ReplyGenerator(), make_adapter(router="dynmole", num_experts=3, target_modules=targets)
    first = reply(engine, adapter)
    assert not KERNELS
    wait_for(count)
    second = reply(engine, adapter)
    assert second.text == first.text
    for name in ("weights", "entropy", "active"):
        before, after = (torch.tensor((said.trace or {})[name]) for said in (first, second))
        torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)
    files = sorted((home / "compiled").glob("*.pt2"))
    made = {path: path.stat().st_mtime_ns for path in files}
    assert len(files) == count

    KERNELS.clear()  # another start of the studio
    reply(ReplyGenerator(), adapter)
    wait_for(count)
    assert {path: path.stat().st_mtime_ns for path in files} == made, "taken from their files, not made again"


def decoded(model: Any) -> torch.Tensor:
    """The logits of given tokens, read one at a time as those of a reply are, `(tokens, vocabulary)`."""
    rows, seen = [], None
    for token in TOKENS[0]:
        with torch.inference_mode():
            out = model(input_ids=token.view(1, 1), past_key_values=seen, use_cache=True)
        rows.append(out.logits[0, 0])
        seen = out.past_key_values
    return torch.stack(rows)


@pytest.mark.soak
@pytest.mark.timeout(700)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 4e-2)])
def test_decoding_has_the_same_logits_to_the_rounding_of_its_dtype(
    home: Path, tiny_model: Any, dtype: torch.dtype, tolerance: float
) -> None:
    """With a router that uses all experts: where one is chosen or not, rounding may choose another."""
    model = adapt(tiny_model().to(dtype), "dense")
    before = decoded(model)
    thread = prepare_kernels(model)
    assert thread is not None
    thread.join()
    assert len(KERNELS) == 3
    after = decoded(model)
    assert before.dtype == dtype and (after - before).abs().max() <= tolerance * before.abs().max()


def test_without_a_compiler_replies_go_on_as_before(
    home: Path, tiny_adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "/nowhere/g++")
    monkeypatch.setattr(aot_compile, "COMPILE_WAIT_SECONDS", 0)  # its thread ends once the attempt has begun
    engine = ReplyGenerator()
    first = reply(engine, tiny_adapter)
    folder = home / "compiled"
    attempts = finished_attempts(folder)
    assert len(attempts) == 3
    deadline = time.monotonic() + 240
    while not ((folder / "log.txt").exists() and "Error" in (folder / "log.txt").read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert reply(engine, tiny_adapter).text == first.text
    assert finished_attempts(folder) == attempts, "it is not tried again"
    assert not KERNELS


def finished_attempts(folder: Path) -> dict[Path, int]:
    """The marks of attempts to compile, with their times in ns, once no thread of a reply is at it."""
    for thread in threading.enumerate():
        if thread.name == "decode-kernels":
            thread.join()
    return {path: path.stat().st_mtime_ns for path in folder.glob("*.tried")}


def test_it_can_be_switched_off(home: Path, tiny_adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOLE_COMPILE", "0")
    reply(ReplyGenerator(), tiny_adapter)
    assert not (home / "compiled").exists()
