"""Devices: which one a setting means, whether it is fast at bfloat16, how much memory it has left."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mole.core import devices
from mole.core.errors import ConfigError


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_a_device_that_is_not_there_is_named() -> None:
    with pytest.raises(ConfigError, match=r"model\.device is 'cuda:3'; it must be auto or a device of this machine"):
        devices.pick_device("cuda:3")
    assert devices.pick_device("auto").type in ("cpu", "mps")


@pytest.mark.parametrize(
    "machine, line, fast",
    [
        ("x86_64", "flags\t\t: fpu avx2 fma", False),
        ("x86_64", "flags\t\t: fpu avx512f avx512_bf16", True),
        ("x86_64", "flags\t\t: fpu amx_bf16 amx_tile", True),
        ("aarch64", "Features\t: fp asimd bf16 i8mm", True),
        ("aarch64", "Features\t: fp asimd", False),
    ],
)
def test_bfloat16_is_chosen_where_the_cpu_is_fast_at_it(
    machine: str, line: str, fast: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MOLE_CPU_BFLOAT16", raising=False)
    monkeypatch.setattr("platform.machine", lambda: machine)
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\n{line}\n")
    assert devices.cpu_is_fast_at_bfloat16(tmp_path / "cpuinfo") is fast
    assert devices.cpu_is_fast_at_bfloat16(tmp_path / "none") is False


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_environment_says_which_dtype_auto_is_on_a_cpu(dtype: str, auto_dtype: Callable[[str], None]) -> None:
    auto_dtype(dtype)
    assert devices.pick_dtype("auto", torch.device("cpu")) == getattr(torch, dtype)


def test_bfloat16_on_a_gpu_that_has_none_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla K80")
    cuda = torch.device("cuda")
    with pytest.raises(ConfigError, match="model.dtype is 'bfloat16'; it must be auto, float16 or float32 on this GPU"):
        devices.pick_dtype("bfloat16", cuda)
    assert devices.pick_dtype("auto", cuda) == torch.float16


def test_what_the_allocator_keeps_counts_as_free(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = [3 << 30]
    monkeypatch.setattr(torch.cuda, "empty_cache", kept.clear)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: ((8 << 30) - sum(kept), 16 << 30))
    assert devices.free_memory(torch.device("cuda")) == 8 << 30


@pytest.mark.parametrize(
    ("device", "visible", "expected"),
    [
        ("cpu", None, "cpu"),
        ("cuda", None, "cuda:0"),
        ("cuda:3", None, "cuda:3"),
        ("cuda", "2,3", "cuda:2"),
        ("auto", "", "cpu"),
        ("auto", "-1", "cpu"),
    ],
)
@pytest.mark.skipif(sys.platform == "darwin", reason="auto may be mps there")
def test_the_device_is_told_without_torch(
    monkeypatch: pytest.MonkeyPatch, device: str, visible: str | None, expected: str
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert devices.physical_device(device) == expected


def test_free_memory_is_the_containers_where_that_is_less(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("600\n")
    (tmp_path / "memory.stat").write_text("anon 300\ninactive_file 250\n")
    assert devices.free_on_cpu(cgroup=tmp_path) == 650
    (tmp_path / "memory.max").write_text("max\n")
    assert devices.free_on_cpu(cgroup=tmp_path) > 1 << 20
    assert devices.free_on_cpu(cgroup=tmp_path / "none") > 1 << 20


def test_a_container_s_limit_is_its_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "memory.max").write_text("2000000000\n")
    monkeypatch.setattr(devices, "CGROUP", tmp_path)
    assert devices.total_on_cpu() == 2_000_000_000
