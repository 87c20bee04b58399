"""Where a reply is computed while a run trains: told from who holds which device, what is free, what is needed."""

from __future__ import annotations

from pathlib import Path

import pytest

from app.services import device_policy
from app.services.device_policy import DeviceHint, DeviceStatus, device_hint, reply_device
from mole import runs
from mole.core import locks

GB = 10**9


def test_with_nobody_training_there_is_nothing_to_say() -> None:
    assert device_hint(DeviceStatus("cpu")) == device_hint(DeviceStatus("cuda:0", need=99 * GB, free=0)) == DeviceHint()
    assert (
        reply_device(device_policy.CPU, "")
        == reply_device(device_policy.WAIT, "")
        == reply_device(device_policy.GPU, "")
        == "auto"
    )


def test_on_a_cpu_there_is_no_choice_but_patience() -> None:
    hint = device_hint(DeviceStatus("cpu", "demo"))
    assert hint.text == "The run demo is training on this machine: replies are slow until it has ended."
    assert not hint.choose


@pytest.mark.parametrize(
    ("need", "free", "words"),
    [
        (2 * GB, 3 * GB, "It fits next to it now (this model needs about 2.5 GB, 3.0 GB are free)"),
        (2 * GB, 2 * GB, "It does not fit next to it (this model needs about 2.5 GB, 2.0 GB are free)"),
        (2 * GB, None, "Whether this model fits next to it is unknown."),
        (0, 3 * GB, "Whether this model fits next to it is unknown."),
    ],
)
def test_on_a_gpu_it_says_what_fits_and_the_person_chooses(need: int, free: int | None, words: str) -> None:
    hint = device_hint(DeviceStatus("cuda:0", "demo", need, free))
    assert hint.choose and words in hint.text and "The run demo is training on the GPU." in hint.text


def test_only_who_says_so_gets_on_the_gpu_beside_a_training() -> None:
    assert reply_device(device_policy.GPU, "demo") == "auto"
    assert reply_device(device_policy.CPU, "demo") == "cpu"
    assert device_policy.DEVICE_CHOICES[0][1] == device_policy.CPU, "which is what is chosen at first"


def test_the_lock_tells_who_trains(home: Path) -> None:
    path = runs.device_lock_path("cpu")
    assert device_policy.run_on_device("cpu") == ""
    path.parent.mkdir(parents=True)
    lock = locks.acquire(path, run="demo")
    assert lock is not None and device_policy.run_on_device("cpu") == "demo"
    lock.release()
    assert device_policy.run_on_device("cpu") == ""
