"""One map from the names of GPUs to GPUs, and one answer to whether they can be used; without a GPU, told by files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from mole import runs
from mole.config import ModelConfig, RunConfig
from mole.core import devices, gpu_check, gpus
from mole.core.errors import ConfigError
from mole.core.gpu_check import GpuCheck
from mole.models import catalog
from mole.training.notices import start_notices

LISTED = """0, GPU-aaaa1111-0000, NVIDIA A, 24000
1, GPU-bbbb2222-0000, NVIDIA B, 40000
2, GPU-cccc3333-0000, NVIDIA C, 80000
3, GPU-dddd4444-0000, NVIDIA D, 80000
"""
PART = "MIG-7f0ce5a1-0000-5e3b"


@pytest.fixture(autouse=True)
def no_memory() -> Iterator[None]:
    """What was found out of the machine is not kept from one test to the next."""
    forget()
    yield
    forget()


def forget() -> None:
    gpus.system_gpus.cache_clear()
    gpu_check._checked.cache_clear()


@pytest.fixture
def machine(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`machine(visible="2,3")`: four GPUs, as `nvidia-smi` lists them, and what CUDA shows of them."""
    program = tmp_path / "bin" / "nvidia-smi"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\ncat <<'END'\n{LISTED}END\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    for name in (gpus.VISIBLE, gpus.GIVEN, "CUDA_DEVICE_ORDER"):
        monkeypatch.setenv(name, "")  # so that the end of the test puts back what restricting sets
        monkeypatch.delenv(name)

    def make(visible: str | None = None) -> None:
        forget()
        if visible is not None:
            monkeypatch.setenv(gpus.VISIBLE, visible)

    return make


@pytest.mark.parametrize(
    ("visible", "device", "locked", "shown"),
    [
        (None, "cuda", "cuda:0", "0"),
        (None, "cuda:3", "cuda:3", "3"),
        ("2,3", "cuda", "cuda:2", "2"),
        ("2,3", "cuda:1", "cuda:3", "3"),
        ("3, 2", "cuda:1", "cuda:2", "2"),
        ("GPU-cccc,GPU-aaaa", "cuda:1", "cuda:0", "GPU-aaaa"),
        (f"{PART},1", "cuda", f"cuda:{PART}", PART),
        ("MIG-GPU-aaaa1111/1/0", "cuda", "cuda:MIG-GPU-aaaa1111-1-0", "MIG-GPU-aaaa1111/1/0"),
    ],
)
def test_lock_training_and_torch_mean_the_same_gpu(
    machine: Callable[..., None], visible: str | None, device: str, locked: str, shown: str
) -> None:
    machine(visible)
    assert devices.physical_device(device) == locked and devices.is_physical_device(locked)
    assert devices.restrict_to(device) == "cuda"
    assert os.environ[gpus.VISIBLE] == shown and os.environ["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
    # What is asked afterwards, in this process or in one that it starts, still means the same.
    assert devices.physical_device(device) == locked
    assert devices.restrict_to(device) == "cuda" and os.environ[gpus.VISIBLE] == shown


@pytest.mark.parametrize(("visible", "device"), [("2,3", "cuda:2"), ("0,-1,1", "cuda:1"), ("", "cuda"), ("-1", "cuda")])
def test_a_gpu_that_cuda_does_not_show_is_refused(machine: Callable[..., None], visible: str, device: str) -> None:
    machine(visible)
    with pytest.raises(ConfigError, match=f"model.device is '{device}'; it must be auto, cpu or a visible GPU"):
        devices.restrict_to(device)
    assert os.environ[gpus.VISIBLE] == visible


def test_another_gpu_in_a_process_that_computes_on_one_is_refused(
    machine: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    machine("2,3")
    devices.restrict_to("cuda:1")
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    assert devices.restrict_to("cuda:1") == "cuda"
    with pytest.raises(ConfigError, match="the GPU that this process computes on already"):
        devices.restrict_to("cuda:0")


def test_the_catalogue_judges_by_the_gpu_that_the_setting_means(machine: Callable[..., None]) -> None:
    machine("GPU-dddd,1")
    names = [catalog.training_device(ModelConfig(device=device)).name for device in ("cuda", "cuda:1", "cpu")]
    assert names == ["NVIDIA D", "NVIDIA B", "this machine's CPU"]


# ---------------------------------------------------------------------------------------------------------
# Whether it can be used


@pytest.mark.skipif(torch.cuda.is_available(), reason="PyTorch can use the GPUs of this machine")
def test_a_gpu_that_pytorch_cannot_use_is_told_with_the_reason(machine: Callable[..., None]) -> None:
    machine()
    told = devices.unused_gpu_notice("auto")
    assert told is not None and told.startswith("This machine has a GPU, but PyTorch cannot use it: ")
    assert "built for the CPU only" in told if torch.version.cuda is None else "driver" in told
    assert devices.physical_device("auto") == str(devices.pick_device("auto")) == devices.restrict_to("auto") == "cpu"
    assert devices.unused_gpu_notice("cpu") is None
    with pytest.raises(ConfigError, match="PyTorch cannot use the GPU: "):
        devices.pick_device("cuda")
    assert told in start_notices(RunConfig(), None, 10)
    machine("")
    assert devices.unused_gpu_notice("auto") is None  # it was hidden on purpose


def test_auto_is_the_first_gpu_that_works(machine: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    machine("3,1")
    monkeypatch.setattr(gpu_check, "_ask", lambda visible: GpuCheck((1,), "no kernel image for the first"))
    assert devices.physical_device("auto") == "cuda:1" and devices.unused_gpu_notice("auto") is None
    assert devices.restrict_to("auto") == "cuda" and os.environ[gpus.VISIBLE] == "1"


def test_what_worked_is_not_tried_again_and_what_did_not_is(
    machine: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def answer(check: GpuCheck) -> GpuCheck:
        monkeypatch.setattr(gpu_check, "_ask", lambda visible: asked.append(visible) or check)
        machine()
        return gpu_check.check_gpus()

    assert answer(GpuCheck((), "driver too old")).places == () and answer(GpuCheck((0, 1), "")).places == (0, 1)
    assert answer(GpuCheck((), "")).places == (0, 1) and len(asked) == 2
    (gpus_record := runs.home() / gpu_check.RECORD).write_text('{"state": 1, "places": "x"}')
    assert answer(GpuCheck((2,), "")).places == (2,) and json.loads(gpus_record.read_text())["places"] == [2]


def test_a_machine_without_any_sign_of_a_gpu_asks_nobody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(gpus, "SIGNS", ())
    monkeypatch.setattr(gpu_check, "_ask", lambda visible: pytest.fail("a process was started"))
    assert gpu_check.check_gpus() == GpuCheck((), "") and devices.found_device("auto") in ("cpu", "mps")


WITNESS = """
import os, sys
class Witness:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            with open(os.environ["MKL_WITNESS"], "a") as file:
                print(os.environ.get("CUDA_VISIBLE_DEVICES"), file=file)
sys.meta_path.insert(0, Witness())
"""


def test_training_shows_torch_its_gpu_before_it_is_imported(
    machine: Callable[..., None], tiny_folder: Path, tmp_path: Path
) -> None:
    """Importing PEFT imports bitsandbytes, which starts CUDA on every GPU that it sees then."""
    machine("2,3")
    (tmp_path / "sitecustomize.py").write_text(WITNESS)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 4)
    run = runs.create(
        RunConfig.from_dict(
            {
                "model": {"name": str(tiny_folder), "device": "cuda:1"},
                "data": {"path": str(tmp_path / "rows.jsonl")},
                "training": {"max_steps": 1},
            }
        )
    )
    environment = {**os.environ, "MKL_WITNESS": str(tmp_path / "seen"), "PYTHONPATH": f"{tmp_path}:{os.getcwd()}"}
    command = [sys.executable, "-m", "mole.training.worker", run.name]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=6000)
    assert (tmp_path / "seen").read_text().split()[0] == "3"
    if not torch.cuda.is_available():
        assert done.returncode == 2 and "PyTorch cannot use the GPU" in run.last_event["error"]
