"""A function with a GPU of its own for each call: the real package `spaces`, the service that hands out GPUs a stub."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from zerogpu import LONGEST, ROOT, DeviceApi, has_cuda, space

from app.services.zerogpu import gpu

PROGRAM = f"""
import json, os, sys
sys.path.insert(0, {str(ROOT / "tests")!r})
import zerogpu
{"" if has_cuda() else "zerogpu.stand_in()"}
import app, torch
from app.services.zerogpu import gpu
from mole.core.devices import found_device, pick_device
from spaces.zero import torch as emulation

weights = torch.arange(10.0).to(pick_device("auto"))
shown = [str(weights.device), found_device("auto")]

@gpu(lambda seconds, values: seconds)
def total(seconds, values):
    for value in range(values):
        yield os.getpid(), float((weights * value).sum())

emulation.pack()  # what the start of the page does
few = list(total(12.5, 3))
longer = total(1000, 1000)
next(longer)
longer.close()
print(json.dumps([shown, os.getpid(), few]))
"""


def test_elsewhere_a_function_with_a_gpu_is_the_function_itself() -> None:
    assert gpu(lambda: 10)(os.getpid) is os.getpid


def test_each_call_gets_a_fork_with_the_weights_on_its_gpu_for_at_most_two_minutes(home: Path) -> None:
    with DeviceApi() as api:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), **space(api, 0, home)}
        done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    shown, own, few = json.loads(done.stdout.splitlines()[-1])
    assert shown == ["cuda:0", "cuda:0"]
    first, closed = api.calls
    assert [total for _, total in few] == [0.0, 45.0, 90.0]
    assert {pid for pid, _ in few} == {first.pid}
    assert len({own, first.pid, closed.pid}) == 3
    assert (first.seconds, closed.seconds) == (12, LONGEST)
    assert not first.failed and not closed.failed and closed.ended
