"""Threads that share one model get what each of them would get alone, wherever one comes between the other."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from test_shared_input import INPUTS, Attention, pair
from torch import Tensor, nn

import mole.mixture
from mole import auxiliary_loss, record_routing
from mole.config import ROUTERS
from mole.mixture import aot_compile
from mole.mixture.decode_kernel import KERNELS, DecodeCall

Work = Callable[[], list[Tensor]]
SOURCES = str(Path(mole.mixture.__file__).parent)


@pytest.fixture(autouse=True)
def no_kernels() -> Iterator[None]:
    KERNELS.clear()
    yield
    KERNELS.clear()


def in_a_thread(work: Work) -> list[Tensor]:
    """What `work` returns when another thread does it."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(work).result(timeout=600)


@contextmanager
def interrupted(line: int, by: Callable[[], None]) -> Iterator[list[int]]:
    """Call `by` before this thread runs its `line`-th line of `mole.mixture`; gives the number of lines run so far."""
    lines = [0]

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        if event == "call":
            return trace if frame.f_code.co_filename.startswith(SOURCES) else None
        if event == "line":
            lines[0] += 1
            if lines[0] == line:
                by()
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield lines
    finally:
        sys.settrace(before)


def hold_each_alone(first: Work, *second: Work, step: int = 1) -> None:
    """Both return what they do alone, whatever line of `first` another thread begins `second` at.

    Its first part is done there, the others once `first` has returned.
    """
    alone = first()
    with ThreadPoolExecutor(1) as other:
        others_alone = [other.submit(part).result(timeout=600) for part in second]
        line, seen = 1, 1
        while line <= seen:
            results: list[list[Tensor]] = []

            def begin(results: list[list[Tensor]] = results) -> None:
                results.append(other.submit(second[0]).result(timeout=600))

            with interrupted(line, begin) as lines:
                found = [first()]
            results += [other.submit(part).result(timeout=600) for part in second[len(results) :]]
            for got, expected in zip([*found, *results], [alone, *others_alone], strict=True):
                assert all(map(torch.equal, got, expected)), f"interrupted at line {line} of {lines[0]}"
            line, seen = line + step, lines[0]
    assert line > 100


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Two batches of one shape, so that nothing but their numbers tells their outputs apart."""
    generator = torch.Generator().manual_seed(3)
    return torch.randn(2, 1, 3, INPUTS, dtype=dtype, generator=generator).unbind(0)


@pytest.mark.parametrize(("router", "grad"), [*((router, False) for router in ROUTERS), ("dynmole", True)])
def test_outputs(router: str, grad: bool) -> None:
    """The other thread is between its projections, too, when the first one goes on."""
    model, _ = pair(router)
    model.eval()
    x, other = inputs()

    def outputs(x: Tensor, *projections: nn.Module) -> list[Tensor]:
        with torch.set_grad_enabled(grad):
            return [projection(x).detach() for projection in projections]

    q, k, v = model.q_proj, model.k_proj, model.v_proj
    hold_each_alone(lambda: outputs(x, q, k, v), lambda: outputs(other, q), lambda: outputs(other, k, v))


@pytest.mark.parametrize("router", ["dynmole", "adamole"])
def test_recordings(router: str) -> None:
    """Each of the two threads records the model; each trace has the passes of its own thread."""
    model, _ = pair(router)
    model.eval()

    def forward(x: Tensor) -> Work:
        def work() -> list[Tensor]:
            with record_routing(model) as trace, torch.no_grad():
                y = model(x)
            return [y, trace.weights, trace.entropy]

        return work

    hold_each_alone(*map(forward, inputs()), step=2)


class MaskedAttention(Attention):
    """Takes a mask, as a language model does, which is for the routing log alone."""

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return super().forward(x)


def test_auxiliary_losses() -> None:
    """Of training passes, each with the padding of its own batch."""
    model, _ = pair("topk", balance_loss_coef=1.0)
    model.__class__ = MaskedAttention
    model.train()

    def forward(x: Tensor, padding: int) -> Work:
        mask = torch.ones(1, 3, dtype=torch.long)
        mask[:, :padding] = 0

        def work() -> list[Tensor]:
            y = model(x, attention_mask=mask)
            loss = auxiliary_loss(model)
            return [y.detach(), loss.detach(), *torch.autograd.grad(loss, model.q_proj.routers["default"].gate.weight)]

        return work

    first, second = inputs()
    hold_each_alone(forward(first, 1), forward(second, 2), step=3)


def test_tokens_decoded_by_a_kernel() -> None:
    model, _ = pair("dynmole", torch.float32)
    model.eval()
    x, other = (x[:, :1] for x in inputs(torch.float32))

    def forward(x: Tensor) -> list[Tensor]:
        with torch.no_grad():
            return [model(x)]

    forward(x)
    for spec in aot_compile.kernel_specs(model):  # not compiled: its formulas run as they are
        KERNELS[spec.text] = aot_compile.KernelModule(aot_compile.example_adapters(spec))

    def first_token() -> list[Tensor]:
        for fused in model.q_proj.group._fused.values():
            fused.decode_call = DecodeCall(fused)  # knows of no kernel yet
        return forward(x)

    hold_each_alone(first_token, lambda: forward(other))


def test_a_recording_has_the_passes_of_a_thread_that_only_runs_the_model() -> None:
    """As with a reply that one thread generates and another one shows."""
    model, _ = pair("dynmole")
    x, _ = inputs()
    with record_routing(model) as alone, torch.no_grad():
        model(x)
    with record_routing(model) as trace, torch.no_grad():
        in_a_thread(lambda: [model(x)])
    assert torch.equal(trace.weights, alone.weights)


def test_a_pass_that_fails_halfway_leaves_nothing_to_other_threads() -> None:
    model, alone = pair("dynmole")
    first, second = inputs()
    handle = model.k_proj.register_forward_pre_hook(lambda *_: 1 / 0)
    with torch.no_grad():
        with pytest.raises(ZeroDivisionError):
            model(first)
        handle.remove()
        (found,) = in_a_thread(lambda: [model.eval()(second)])
        torch.testing.assert_close(found, alone(second), rtol=0, atol=1e-12)
        torch.testing.assert_close(model(first), alone(first), rtol=0, atol=1e-12)
