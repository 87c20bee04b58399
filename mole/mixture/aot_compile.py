"""Make the compiled functions of `mole.mixture.decode_kernel`, in the background and once for this machine.

They are kept in `$MOLE_HOME/compiled/`. Making one takes some ten seconds and a C++ compiler, so it is a process of its
own, of low priority; where it cannot be done, decoding goes on without. `MOLE_COMPILE=0` switches it off.
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

import peft  # noqa: F401 (first: it brings in mole.tuner, which needs mole.layer whole)
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mole.config import AdapterConfig, params_class
from mole.core import checkpoint, processes
from mole.core.paths import home
from mole.mixture import decode_kernel, experts, routers, shared_input
from mole.mixture.decode_kernel import FUNCTIONS, OneToken, Recipe
from mole.mixture.experts import in_dtype
from mole.mixture.layer import MoleLinear, features
from mole.mixture.routers import entropy_of
from mole.mixture.shared_input import Stack

if TYPE_CHECKING:
    from torch.export import ExportedProgram

NAME = "default"
TRY_AGAIN_SECONDS = 24 * 3600.0
"""A function that could not be made is not tried again for so long."""
PATIENCE_SECONDS = 600.0
"""How long to look out for functions since somebody began to make them."""
LOOK_SECONDS = 1.0
IN, OUTS = 53, (59, 61, 67)
"""Widths of the example that is compiled, which no other size is likely to be; the function takes any."""
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 4e-2, torch.float16: 1e-2}
"""Largest difference, relative to the largest value, from the layer's own answer that a function may have; in
bfloat16 that answer is itself rounded four times, to one part in 256 each."""

log = logging.getLogger("mole")
_at_work = threading.Lock()


def prepare(model: nn.Module) -> threading.Thread | None:
    """Let the model decode with compiled functions: at once those there are, the others when they have been made.

    To be called after a reply, when it is known what there is use for. Returns at once, with the thread that looks
    after it; None where there is nothing to do.
    """
    wanted = [recipe for recipe in recipes(model) if recipe.text not in FUNCTIONS]
    if not wanted or os.environ.get("MOLE_COMPILE") == "0" or _at_work.locked():
        return None
    thread = threading.Thread(target=_prepare, args=(wanted,), name="compiled-functions", daemon=True)
    thread.start()
    return thread


def _prepare(wanted: list[Recipe]) -> None:
    with _at_work, contextlib.suppress(OSError):
        missing = [recipe for recipe in wanted if not load(recipe)]
        start([recipe for recipe in missing if since_tried(recipe) > TRY_AGAIN_SECONDS])
        while missing and min(map(since_tried, missing)) < PATIENCE_SECONDS:
            time.sleep(LOOK_SECONDS)
            missing = [recipe for recipe in missing if not load(recipe)]


def recipes(model: nn.Module) -> list[Recipe]:
    """The functions that the model's decoding had use for so far, each once."""
    groups = {id(layer.group): layer.group for layer in model.modules() if isinstance(layer, MoleLinear)}
    found = [recipe for group in groups.values() for recipe in group.recipes()]
    return list({recipe.text: recipe for recipe in found}.values())


# ---------------------------------------------------------------------------------------------------------
# Files


def file_of(recipe: Recipe) -> Path:
    """Where the function is kept: a name for the recipe, our formulas, torch and the processor."""
    about = [recipe.text, sources(), torch.__version__, processor()]
    return home() / "compiled" / f"{hashlib.sha256(json.dumps(about).encode()).hexdigest()[:24]}.pt2"


@functools.cache
def sources() -> str:
    """A sum over the code that functions are made of: changed formulas are other functions."""
    files = [Path(str(module.__file__)) for module in (experts, shared_input, decode_kernel)]
    files += [Path(__file__), *sorted(Path(routers.__path__[0]).glob("*.py"))]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


@functools.cache
def processor() -> str:
    """What the machine's processor can do: code for one may stop another."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        flags = [line for line in lines if line.lower().startswith(("flags", "features"))]
        return f"{platform.machine()} {''.join(flags[:1])}"
    return f"{platform.machine()} {platform.processor()}"


def since_tried(recipe: Recipe) -> float:
    """Seconds since some process began to make the function."""
    with contextlib.suppress(OSError):
        return time.time() - file_of(recipe).with_suffix(".tried").stat().st_mtime
    return math.inf


def start(wanted: Sequence[Recipe]) -> None:
    """Begin to make functions, in a process of its own."""
    if not wanted:
        return
    for recipe in wanted:
        path = file_of(recipe)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".tried").touch()
    texts = json.dumps([recipe.text for recipe in wanted])
    processes.detach("mole.mixture.aot_compile", texts, log=path.parent / "log.txt")


def load(recipe: Recipe) -> bool:
    """Take up a function that is there and right; one that is not is deleted."""
    path = file_of(recipe)
    if recipe.text in FUNCTIONS or not path.exists():
        return recipe.text in FUNCTIONS
    try:
        import torch._inductor

        function = torch._inductor.aoti_load_package(str(path)).loader.boxed_run
        check(recipe, function)
    except Exception as error:  # whatever it is, there is another way
        log.warning("A compiled function cannot be used and was deleted: %s", error)
        path.unlink(missing_ok=True)
        return False
    FUNCTIONS[recipe.text] = function
    return True


def check(recipe: Recipe, function: Any) -> None:
    """Compare a function with the layer's own answer. Raises `ArithmeticError` when they differ."""
    token = OneToken(example(recipe))
    x = torch.randn(1, 1, IN, dtype=getattr(torch, recipe.dtypes[0]), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found, expected = function(token.inputs(x)), answers(token.stack, x)
    for one, other in zip(found, expected, strict=True):
        worst = (one - other).abs().max() / other.abs().max().clamp(min=1e-6)
        if not worst <= TOLERANCE[x.dtype]:
            raise ArithmeticError(f"its result is {float(worst):.1e} away from what it should be")


# ---------------------------------------------------------------------------------------------------------
# Making them


def example(recipe: Recipe) -> Stack:
    """Layers with adapters of a recipe and random weights."""
    params = params_class(recipe.router)(**recipe.params)
    adapter = AdapterConfig(
        router=recipe.router, num_experts=recipe.experts, r=recipe.rank, lora_alpha=recipe.scaling * recipe.rank,
        lora_dropout=0.0, params=params,
    )  # fmt: skip
    bases = [nn.Linear(IN, out, bias=biased) for out, biased in zip(OUTS, recipe.biased, strict=False)]
    layers = [MoleLinear(base, *features(base)) for base in bases]
    for layer in layers:
        layer.add_adapter(NAME, adapter, recipe.experts, inference_mode=True)
        layer._active_adapter = NAME
        for name in recipe.shared if layer is not layers[0] else ():
            layer.share_linear(NAME, name, getattr(layers[0].routers[NAME], name))
    stack = Stack([layer.eval() for layer in layers], NAME)
    token = OneToken(stack)
    generator = torch.Generator().manual_seed(0)
    for weight, dtype in zip(token.inputs(torch.empty(0))[1:], recipe.dtypes[1:], strict=True):
        weight.data = (torch.randn(weight.shape, generator=generator) * 0.3).to(getattr(torch, dtype))
    return stack


def answers(stack: Stack, x: Tensor) -> list[Tensor]:
    """Each layer's output for a token and the parts of their routing, by the layer's own code."""
    downs, scale = [module.weight for module in stack.downs], stack.layers[0].scaling[NAME]
    _, routing = stack.read(x, downs, apart=True)
    gated = stack.gated([F.linear(in_dtype(x, down.dtype), down) for down in downs], routing.weights)
    outputs = [
        layer.base_layer(x) + in_dtype(F.linear(rows * scale, layer.up(NAME)), x.dtype)[None]
        for rows, layer in zip(gated, stack.layers, strict=True)
    ]
    return [*outputs, *(part for part in routing._replace(entropy=entropy_of(routing)) if part is not None)]


class Layers(nn.Module):
    """A stack's layers as a module whose weights can be put in from outside."""

    def __init__(self, stack: Stack) -> None:
        super().__init__()
        self.stack = stack
        self.linears = nn.ModuleList(OneToken(stack).linears)

    def forward(self, x: Tensor) -> list[Tensor]:
        return answers(self.stack, x)


class Function(nn.Module):
    """The same as a function of the token and the weights, with no weights of its own."""

    def __init__(self, stack: Stack) -> None:
        super().__init__()
        self.layers = (Layers(stack),)  # in a tuple it is not a part, whose weights would be compiled in
        self.names = [name for name, _ in self.layers[0].named_parameters()]

    def forward(self, inputs: list[Tensor]) -> list[Tensor]:
        x, *weights = inputs
        return torch.func.functional_call(self.layers[0], dict(zip(self.names, weights, strict=True)), (x,))


def export(recipe: Recipe) -> ExportedProgram:
    """The function of a recipe as a graph of operations, of any widths."""
    from torch.export import Dim, export

    stack = example(recipe)
    inputs = OneToken(stack).inputs(torch.randn(1, 1, IN, dtype=getattr(torch, recipe.dtypes[0])))
    free = [{place: Dim.AUTO for place, size in enumerate(value.shape) if size in (IN, *OUTS)} for value in inputs]
    with torch.no_grad():
        return export(Function(stack).eval(), (inputs,), dynamic_shapes=(free,), strict=False)


def make(recipe: Recipe, path: Path) -> None:
    """Compile the function of a recipe into a file."""
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        made = torch._inductor.aoti_compile_and_package(export(recipe), package_path=f"{folder}/function.pt2")
        checkpoint.write_file(path, lambda aside: shutil.copyfile(made, aside))


def main(texts: str) -> None:
    """Make the functions of these recipes, of low priority and with files that are gone afterwards."""
    os.nice(10)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {"TORCHINDUCTOR_CACHE_DIR": folder, "TORCHINDUCTOR_COMPILE_THREADS": "1"}
        for text in json.loads(texts):
            values: dict[str, Any] = json.loads(text)
            values |= {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
            recipe = Recipe(**values)
            make(recipe, file_of(recipe))


if __name__ == "__main__":
    main(sys.argv[1])
