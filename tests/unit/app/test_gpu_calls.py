"""A function with a GPU of its own for each call: the real package `spaces`, the service that hands out GPUs a stub."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import gradio as gr
import pytest
from zerogpu import LONGEST, ROOT, DeviceApi, has_cuda, space

from app import settings
from app.services import gpu_replies
from app.services.zerogpu import gpu
from mole.chat.messages import ReplyJob

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
    assert (first.seconds, closed.seconds) == (13, LONGEST)
    assert not first.failed and not closed.failed and closed.ended


def test_a_space_keeps_its_runs_on_mounted_storage_only(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def mounts(*places: tuple[Path, str]) -> None:
        disks = [SimpleNamespace(mountpoint=str(place), fstype=fstype) for place, fstype in places]
        monkeypatch.setattr(settings.psutil, "disk_partitions", lambda all: [own, *disks])

    own = SimpleNamespace(mountpoint="/", fstype="ext4")
    mounts()
    assert settings.home_is_kept(), "elsewhere the person's disk keeps them"
    monkeypatch.setenv("SPACE_ID", "someone/mole-studio")
    assert not settings.home_is_kept(), "a Space's own disk does not"
    mounts((home.parent, "tmpfs"))
    assert not settings.home_is_kept()
    for place in (home, home.parent):
        mounts((place, "fuse"))
        assert settings.home_is_kept()
    monkeypatch.delenv("MOLE_HOME")
    assert not settings.home_is_kept()


@pytest.mark.parametrize(
    ("target", "tokens", "seconds"),
    [("here", 0, 10), ("here", 128, 16.4), ("here", 1024, 61.2), ("elsewhere", 128, 46.4)],
)
def test_a_reply_asks_for_the_seconds_that_its_tokens_take(
    target: str, tokens: int, seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_replies, "LOADED", {"here"})
    job = ReplyJob(target, [], {"max_new_tokens": tokens}, {}, "auto", with_trace=False)
    assert gpu_replies.seconds_of(job) == pytest.approx(seconds)


def test_an_error_of_the_platform_is_one_line_without_markup() -> None:
    message = 'No GPU was available. <a style="x" href="https://h">Create a free account</a> to get more.'
    assert (
        gpu_replies.refusal(gr.Error(message, title="Queue"), 10)
        == "Queue: No GPU was available. Create a free account to get more."
    )
