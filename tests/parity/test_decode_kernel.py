"""Decoding with compiled kernels: the numbers of the slow formulas, and never those of other settings."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from routing_cases import expected
from test_layer import INPUTS, OUTPUTS, RANK, adapted, experts_of
from test_shared_input import pair
from torch import Tensor, nn

from mole.config import ROUTERS, AdapterConfig, params_class
from mole.mixture import aot_compile
from mole.mixture.decode_kernel import KERNELS, KernelSpec

Way = Callable[[Any, Tensor], list[str]]


@pytest.fixture(autouse=True)
def no_kernels() -> Iterator[None]:
    KERNELS.clear()
    yield
    KERNELS.clear()


@pytest.fixture
def kernels(functions_home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where compiled kernels are kept."""
    monkeypatch.setenv("MOLE_HOME", str(functions_home))
    return functions_home / "compiled"


class Packed(Tensor):
    """A weight that is more than its numbers, as torchao's quantised ones are."""


def tokens(dtype: torch.dtype, inputs: int) -> list[Tensor]:
    """Single tokens: ordinary ones, one that treats all experts alike, one that is sure."""
    generator = torch.Generator().manual_seed(1)
    drawn = [torch.randn(1, 1, inputs, dtype=dtype, generator=generator) for _ in range(8)]
    return [*drawn, torch.zeros(1, 1, inputs, dtype=dtype), drawn[0] * 1e4]


def wanted(model: Any, x: Tensor) -> list[KernelSpec]:
    """The specs of the kernels that the model could use to compute `x`."""
    with torch.no_grad():
        model(x)
    return aot_compile.kernel_specs(model)


def exported(model: Any, x: Tensor) -> list[str]:
    """Give the model its kernels for `x`, as exported graphs, not compiled → their specs."""
    specs = wanted(model, x)
    for spec in specs:
        KERNELS[spec.text] = aot_compile.export_kernel(spec).module()
        aot_compile.check_kernel(spec, KERNELS[spec.text])
    return [spec.text for spec in specs]


def compiled(model: Any, x: Tensor) -> list[str]:
    """Give the model its kernels for `x`, compiled and loaded from their files → their specs."""
    specs = wanted(model, x)
    for spec in specs:
        if not aot_compile.kernel_path(spec).exists():
            aot_compile.compile_kernel(spec, aot_compile.kernel_path(spec))
        assert aot_compile.load_kernel(spec)
    return [spec.text for spec in specs]


def counted(texts: list[str]) -> list[str]:
    """A list that grows by a kernel's spec whenever it is called."""
    calls: list[str] = []
    for text in texts:
        kernel = KERNELS[text]
        KERNELS[text] = lambda inputs, text=text, kernel=kernel: calls.append(text) or kernel(inputs)
    return calls


@pytest.mark.parametrize("way", [exported, pytest.param(compiled, marks=pytest.mark.soak)])
@pytest.mark.parametrize("router", ROUTERS)
def test_a_kernel_equals_a_loop_over_experts(router: str, way: Way, kernels: Path) -> None:
    net, layer = adapted(router)
    net.eval()
    calls = counted(way(net, tokens(torch.float64, INPUTS)[0]))
    a, b = (stack.tolist() for stack in experts_of(layer))
    for number, x in enumerate(tokens(torch.float64, INPUTS), 1):
        row, weights = x.reshape(-1).tolist(), expected(layer.routers["default"], x).weights.reshape(-1).tolist()
        want = reference.adapted(layer.base_layer(x).reshape(-1).tolist(), row, weights, a, b, 5 / RANK)
        with torch.no_grad():
            got = net(x)
        assert got.shape == (1, 1, OUTPUTS) and len(calls) == number
        torch.testing.assert_close(got.reshape(-1), torch.tensor(want, dtype=torch.float64), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("router", "dtype", "tolerance"),
    [("dynmole", torch.float32, 1e-5), ("sparsegen", torch.float32, 1e-5), ("adamole", torch.bfloat16, 1e-2)],
)
def test_siblings_are_served_by_one_call(router: str, dtype: torch.dtype, tolerance: float, kernels: Path) -> None:
    model, alone = pair(router, dtype)
    calls = counted(compiled(model.eval(), torch.zeros(1, 1, model.q_proj.in_features, dtype=dtype)))
    slow = alone.eval().double()
    for number, x in enumerate(tokens(dtype, model.q_proj.in_features)[:-1], 1):
        with torch.no_grad():
            got, want = model(x), slow(x.double())
        assert got.dtype == dtype and len(calls) == number
        assert (got - want).abs().max() <= tolerance * want.abs().max()


def test_only_a_single_token_without_gradients_takes_it(kernels: Path) -> None:
    model = pair("dynmole", torch.float32)[0].eval()
    x = tokens(torch.float32, model.q_proj.in_features)[0]
    calls = counted(compiled(model, x))
    model(x).sum().backward()
    assert model.q_proj.mole_studio_A["default"].weight.grad is not None
    with torch.no_grad():
        model(x.expand(1, 2, -1))
        model(x.expand(2, 1, -1))
        model.train()(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model.eval()(x)
    assert not calls


def test_whatever_is_changed_is_heeded_at_once(kernels: Path) -> None:
    model = pair("dynmole", torch.float32)[0].eval()
    x = tokens(torch.float32, model.q_proj.in_features)[0]
    calls = counted(compiled(model, x))
    layers = (model.q_proj, model.k_proj, model.v_proj)

    def answer() -> tuple[Tensor, Tensor]:
        """With kernels, and without."""
        with torch.no_grad():
            first, kept = model(x), dict(KERNELS)
            KERNELS.clear()
            second = model(x)
        KERNELS.update(kept)
        return first, second

    before = answer()[0]
    for layer in layers:  # weights: by the kernel, from the new ones
        layer.mole_studio_B["default"].weight.data = layer.mole_studio_B["default"].weight.data * 2
    other, same = answer()
    torch.testing.assert_close(other, same)
    assert len(calls) == 2 and not torch.allclose(other, before)
    for layer in layers:  # settings, scale, steering, dtype: not by a kernel made for others
        layer.routers["default"].params.entropy_threshold = 0.0
    assert torch.equal(*answer())
    for layer in layers:
        layer.scaling["default"] *= 3
    assert torch.equal(*answer())
    model.q_proj.routers["default"].allowed = torch.tensor([0, 2])
    assert torch.equal(*answer())
    model.q_proj.routers["default"].allowed = None
    x = x.double()
    model.double()
    assert torch.equal(*answer()) and len(calls) == 2


def test_what_is_done_to_a_base_layer_is_heeded_at_once(kernels: Path) -> None:
    model = pair("dynmole", torch.float32)[0].eval()
    x = tokens(torch.float32, model.q_proj.in_features)[0]
    calls = counted(compiled(model, x))
    base, seen = model.k_proj.base_layer, []
    with torch.no_grad():
        before = model(x)
        hook = base.register_forward_hook(lambda module, args, output: seen.append(output) or output + 1)
        torch.testing.assert_close(model(x)[..., 8:12], before[..., 8:12] + 1)
        hook.remove()
        assert len(seen) == 1 and len(calls) == 1
        base.forward = lambda x: nn.functional.linear(x, base.weight) * 0
        torch.testing.assert_close(model(x)[..., :8], before[..., :8])
        assert not torch.allclose(model(x), before) and len(calls) == 1
        del base.forward
        base.weight, plain = nn.Parameter(base.weight.as_subclass(Packed)), base.weight
        torch.testing.assert_close(model(x), before)
        assert len(calls) == 1
        base.weight = plain
        assert torch.equal(model(x), before) and len(calls) == 2
        model.k_proj.base_layer = nn.Linear(base.in_features, base.out_features, bias=False)
        other = model(x)
        assert len(calls) == 2
        KERNELS.clear()
        assert torch.equal(other, model(x)) and not torch.allclose(other, before)


def test_a_base_that_is_no_plain_linear_asks_for_no_kernel() -> None:
    model = pair("dynmole", torch.float32)[0].eval()
    model.v_proj.base_layer.__class__ = type("Quantised", (nn.Linear,), {})
    with torch.no_grad():
        model(tokens(torch.float32, model.q_proj.in_features)[0])
    assert not aot_compile.kernel_specs(model)


def test_two_adapters_at_once_are_added_up(kernels: Path) -> None:
    model = pair("dynmole", torch.float32)[0].eval()
    x = tokens(torch.float32, model.q_proj.in_features)[0]
    calls = counted(compiled(model, x))
    other = AdapterConfig(router="dense", num_experts=2, r=2, params=params_class("dense")())
    for layer in (model.q_proj, model.k_proj, model.v_proj):
        layer.add_adapter("other", other, 2, inference_mode=True)
        layer.mole_studio_B["other"].weight.data.normal_()
    parts = []
    with torch.no_grad():
        for active in (["default"], ["other"], ["default", "other"]):
            for layer in (model.q_proj, model.k_proj, model.v_proj):
                layer.set_adapter(active)
            parts.append(model(x))
        bare = torch.cat([layer.base_layer(x) for layer in (model.q_proj, model.k_proj, model.v_proj)], -1)
    assert len(calls) == 1
    torch.testing.assert_close(parts[0] + parts[1] - bare, parts[2])


def test_settings_that_were_tried_for_one_reply_ask_for_no_kernel() -> None:
    model = pair("dynmole", torch.float32)[0].eval()
    routers = [layer.routers["default"] for layer in (model.q_proj, model.k_proj, model.v_proj)]
    trained = [router.params for router in routers]
    for router in routers:
        router.params = dataclasses.replace(router.params, entropy_threshold=0.5)
    with torch.no_grad():
        model(tokens(torch.float32, model.q_proj.in_features)[0])
    assert len(aot_compile.kernel_specs(model)) == 1
    for router, params in zip(routers, trained, strict=True):
        router.params = params
    assert not aot_compile.kernel_specs(model)


def test_a_file_that_is_not_the_kernel_is_deleted(kernels: Path) -> None:
    model = pair("dynmole", torch.float32)[0].eval()
    x = tokens(torch.float32, model.q_proj.in_features)[0]
    compiled(model, x)
    right = aot_compile.kernel_path(aot_compile.kernel_specs(model)[0])
    for layer in (model.q_proj, model.k_proj, model.v_proj):
        layer.routers["default"].params.entropy_threshold = 0.0
    with torch.no_grad():
        model(x)
    (spec,) = aot_compile.kernel_specs(model)
    path = aot_compile.kernel_path(spec)
    shutil.copyfile(right, path)
    assert not aot_compile.load_kernel(spec) and not path.exists()
    path.write_bytes(right.read_bytes()[:-1000])
    assert not aot_compile.load_kernel(spec) and not path.exists()
    assert spec.text not in KERNELS and right.exists()


def test_where_nothing_may_be_executed_decoding_goes_on_without_the_kernel(
    kernels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel is a library, which torch unpacks into the folder of temporary files."""
    if not can_mount(tmp_path):
        pytest.skip("mounting a file system needs root")
    model = pair("dynmole", torch.float32)[0].eval()
    x = tokens(torch.float32, model.q_proj.in_features)[0]
    compiled(model, x)
    (spec,) = aot_compile.kernel_specs(model)
    made = aot_compile.kernel_path(spec)
    KERNELS.clear()
    with torch.no_grad():
        expected = model(x)
    monkeypatch.setenv("MOLE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "scratch"))
    with mounted(tmp_path / "home", "noexec"), mounted(tmp_path / "scratch", "noexec"):
        path = aot_compile.kernel_path(spec)
        path.parent.mkdir()
        shutil.copyfile(made, path)
        assert not aot_compile.load_kernel(spec) and not path.exists()
        with torch.no_grad():
            assert all(map(torch.equal, model(x), expected))
    assert not KERNELS


def can_mount(folder: Path) -> bool:
    try:
        with mounted(folder / "tried", "noexec"):
            return True
    except (OSError, subprocess.CalledProcessError):
        return False


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[None]:
    """A file system of its own on a folder."""
    folder.mkdir(exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", options, "none", str(folder)]
    subprocess.run(mount, check=True, stderr=subprocess.DEVNULL)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
