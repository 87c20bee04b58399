"""Compile the kernels of `mole.mixture.decode_kernel` ahead of time, in the background and once for each machine.

They are kept in `$MOLE_HOME/compiled/`. Compiling one takes some ten seconds and a C++ compiler, so it is done in a
detached process of low priority. Where it fails, decoding continues without kernels. `MOLE_COMPILE=0` switches it off.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import math
import os
import platform
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import peft  # noqa: F401  # first: it imports mole.mixture.model, which needs mole.mixture.layer complete
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mole.config import AdapterConfig, params_class
from mole.core import checkpoint, processes
from mole.core.paths import home, make_folder
from mole.mixture import decode_kernel, experts, fused_adapters, routers
from mole.mixture.decode_kernel import KERNELS, DecodeCall, KernelSpec
from mole.mixture.experts import in_dtype
from mole.mixture.fused_adapters import FusedAdapters
from mole.mixture.layer import MoleLinear, features
from mole.mixture.routers import entropy_of

if TYPE_CHECKING:
    from torch.export import ExportedProgram

ADAPTER = "default"
"""Name of the adapter in the example that is compiled."""
COMPILE_RETRY_SECONDS = 24 * 3600.0
"""A kernel that could not be compiled is not tried again before this."""
COMPILE_WAIT_SECONDS = 600.0
"""How long to wait for a kernel after some process began to compile it."""
KERNEL_POLL_SECONDS = 1.0
EXAMPLE_IN, EXAMPLE_OUT = 53, (59, 61, 67)
"""Input and output widths of the example that is compiled. The kernel takes any; these occur nowhere else, so that
every dimension of such a size is known to be a width."""
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 4e-2, torch.float16: 1e-2}
"""Largest difference from the layer's own output, relative to the largest value, that a kernel may have. In bfloat16
that output is itself rounded four times, to one part in 256 each."""

logger = logging.getLogger("mole")
_running = threading.Lock()


def prepare_kernels(model: nn.Module) -> threading.Thread | None:
    """Let the model decode with kernels: those on disk at once, the others when they have been compiled.

    Call it after a reply, when it is known which kernels the model can use. It returns at once.

    Returns:
        The thread that loads the kernels; None if there is nothing to do.
    """
    wanted = [spec for spec in kernel_specs(model) if spec.text not in KERNELS]
    if not wanted or os.environ.get("MOLE_COMPILE") == "0" or _running.locked():
        return None
    thread = threading.Thread(target=_load_or_compile, args=(wanted,), name="decode-kernels", daemon=True)
    thread.start()
    return thread


def _load_or_compile(wanted: list[KernelSpec]) -> None:
    with _running, contextlib.suppress(OSError):
        missing = [spec for spec in wanted if not load_kernel(spec)]
        start_compiling([spec for spec in missing if seconds_since_attempt(spec) > COMPILE_RETRY_SECONDS])
        while missing and min(map(seconds_since_attempt, missing)) < COMPILE_WAIT_SECONDS:
            time.sleep(KERNEL_POLL_SECONDS)
            missing = [spec for spec in missing if not load_kernel(spec)]


def kernel_specs(model: nn.Module) -> list[KernelSpec]:
    """The specs of the kernels that the tokens decoded so far could have used, each once."""
    groups = {id(layer.group): layer.group for layer in model.modules() if isinstance(layer, MoleLinear)}
    found = [spec for group in groups.values() for spec in group.kernel_specs()]
    return list({spec.text: spec for spec in found}.values())


# ---------------------------------------------------------------------------------------------------------
# Files


def kernel_path(spec: KernelSpec) -> Path:
    """The file of a kernel, named by a hash of its spec, this package's formulas, torch and the processor."""
    parts = [spec.text, source_hash(), torch.__version__, processor()]
    return home() / "compiled" / f"{hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]}.pt2"


@functools.cache
def source_hash() -> str:
    """A hash of the source files that kernels are compiled from: a changed formula is another kernel."""
    files = [Path(str(module.__file__)) for module in (experts, fused_adapters, decode_kernel)]
    files += [Path(__file__), *sorted(Path(routers.__path__[0]).glob("*.py"))]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


@functools.cache
def processor() -> str:
    """The instruction set of this machine's processor: code compiled for one may crash another."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        flags = [line for line in lines if line.lower().startswith(("flags", "features"))]
        return f"{platform.machine()} {''.join(flags[:1])}"
    return f"{platform.machine()} {platform.processor()}"


def seconds_since_attempt(spec: KernelSpec) -> float:
    """Seconds since some process began to compile a kernel; infinite if none has."""
    with contextlib.suppress(OSError):
        return time.time() - kernel_path(spec).with_suffix(".tried").stat().st_mtime
    return math.inf


def start_compiling(wanted: Sequence[KernelSpec]) -> None:
    """Compile kernels in a detached process."""
    if not wanted:
        return
    for spec in wanted:
        path = kernel_path(spec)
        make_folder(path.parent)
        path.with_suffix(".tried").touch()
    texts = json.dumps([spec.text for spec in wanted])
    processes.detach("mole.mixture.aot_compile", texts, log=path.parent / "log.txt")


def load_kernel(spec: KernelSpec) -> bool:
    """Load a kernel from its file; delete the file if the kernel is not valid. Returns whether there is a kernel."""
    path = kernel_path(spec)
    if spec.text in KERNELS or not path.exists():
        return spec.text in KERNELS
    try:
        import torch._inductor

        kernel = torch._inductor.aoti_load_package(str(path)).loader.boxed_run
        check_kernel(spec, kernel)
    except Exception as error:  # decoding works without it, whatever is wrong
        logger.warning("A compiled function cannot be used and was deleted: %s", error)
        path.unlink(missing_ok=True)
        return False
    KERNELS[spec.text] = kernel
    return True


def check_kernel(spec: KernelSpec, kernel: Any) -> None:
    """Compare a kernel with the layer's own output for a random token.

    Raises:
        ArithmeticError: they differ by more than `TOLERANCE`.
    """
    adapters = example_adapters(spec)
    x = torch.randn(1, 1, EXAMPLE_IN, dtype=getattr(torch, spec.dtypes[0]), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found, expected = kernel(DecodeCall(adapters).inputs(x)), layer_outputs(adapters, x)
    for one, other in zip(found, expected, strict=True):
        worst = (one - other).abs().max() / other.abs().max().clamp(min=1e-6)
        if not worst <= TOLERANCE[x.dtype]:
            raise ArithmeticError(f"its result is {float(worst):.1e} away from what it should be")


# ---------------------------------------------------------------------------------------------------------
# Compilation


def example_adapters(spec: KernelSpec) -> FusedAdapters:
    """Layers of the example's widths, with adapters that have this spec and random weights."""
    params = params_class(spec.router)(**spec.params)
    adapter = AdapterConfig(
        router=spec.router, num_experts=spec.experts, r=spec.rank, lora_alpha=spec.scaling * spec.rank,
        lora_dropout=0.0, params=params,
    )  # fmt: skip
    bases = [nn.Linear(EXAMPLE_IN, out, bias=biased) for out, biased in zip(EXAMPLE_OUT, spec.biased, strict=False)]
    layers = [MoleLinear(base, *features(base)) for base in bases]
    for layer in layers:
        layer.add_adapter(ADAPTER, adapter, spec.experts, inference_mode=True)
        layer._active_adapter = ADAPTER
        for name in spec.shared if layer is not layers[0] else ():
            layer.share_linear(ADAPTER, name, layers[0])
    adapters = FusedAdapters([layer.eval() for layer in layers], ADAPTER)
    generator = torch.Generator().manual_seed(0)
    for weight, dtype in zip(DecodeCall(adapters).inputs(torch.empty(0))[1:], spec.dtypes[1:], strict=True):
        weight.data = (torch.randn(weight.shape, generator=generator) * 0.3).to(getattr(torch, dtype))
    return adapters


def layer_outputs(adapters: FusedAdapters, x: Tensor) -> list[Tensor]:
    """What a kernel computes, by the layer's own code: the outputs for a token `x (1, 1, in)`, and their routing.

    Returns:
        `(1, 1, out)` of each layer, then the fields of the `Routing` `(1, 1, L, …)` that are not None.
    """
    downs = [module.weight for module in adapters.downs]
    _, routing = adapters.project_and_route(x, downs, separately=True)
    gated = adapters.gate_together([F.linear(in_dtype(x, down.dtype), down) for down in downs], routing.weights)
    outputs = [
        base(x) + in_dtype(F.linear(rows * adapters.scaling, up.weight), x.dtype)[None]
        for base, rows, up in zip(adapters.bases, gated, adapters.ups, strict=True)
    ]
    parts = routing._replace(entropy=entropy_of(routing), sparsity=None)
    return [*outputs, *(part for part in parts if part is not None)]


class AdapterModule(nn.Module):
    """Fused adapters and their base layers as a module, so that `functional_call` can replace its weights."""

    def __init__(self, adapters: FusedAdapters) -> None:
        super().__init__()
        self.adapters = adapters
        self.linears = nn.ModuleList(DecodeCall(adapters).modules)

    def forward(self, x: Tensor) -> list[Tensor]:
        return layer_outputs(self.adapters, x)


class KernelModule(nn.Module):
    """The same as a function of the token and the weights, without weights of its own."""

    def __init__(self, adapters: FusedAdapters) -> None:
        super().__init__()
        # In a tuple it is no submodule; the weights of a submodule would be compiled in as constants.
        self.module = (AdapterModule(adapters),)
        self.names = [name for name, _ in self.module[0].named_parameters()]

    def forward(self, inputs: list[Tensor]) -> list[Tensor]:
        x, *weights = inputs
        return torch.func.functional_call(self.module[0], dict(zip(self.names, weights, strict=True)), (x,))


def export_kernel(spec: KernelSpec) -> ExportedProgram:
    """Export a kernel as a graph of operations that takes any widths."""
    from torch.export import Dim, export

    adapters = example_adapters(spec)
    inputs = DecodeCall(adapters).inputs(torch.randn(1, 1, EXAMPLE_IN, dtype=getattr(torch, spec.dtypes[0])))
    widths = (EXAMPLE_IN, *EXAMPLE_OUT)
    free = [{dim: Dim.AUTO for dim, size in enumerate(value.shape) if size in widths} for value in inputs]
    with torch.no_grad():
        return export(KernelModule(adapters).eval(), (inputs,), dynamic_shapes=(free,), strict=False)


def compile_kernel(spec: KernelSpec, path: Path) -> None:
    """Compile a kernel into the file `path`."""
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        package = torch._inductor.aoti_compile_and_package(export_kernel(spec), package_path=f"{folder}/function.pt2")
        checkpoint.write_file(path, lambda aside: shutil.copyfile(package, aside))


def main(texts: str) -> None:
    """Compile the kernels of these specs, with low priority and without leaving temporary files."""
    os.nice(10)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {"TORCHINDUCTOR_CACHE_DIR": folder, "TORCHINDUCTOR_COMPILE_THREADS": "1"}
        for text in json.loads(texts):
            values: dict[str, Any] = json.loads(text)
            values |= {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
            spec = KernelSpec(**values)
            compile_kernel(spec, kernel_path(spec))


if __name__ == "__main__":
    main(sys.argv[1])
