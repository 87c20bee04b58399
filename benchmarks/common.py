"""What the benchmarks share: models on one base, fair rounds, and how a figure is told.

Every script measures one goal and is run by itself, `python benchmarks/step_time.py --json`, or with the others by
`make bench`. What is compared runs in turns within one process, so that whatever else the machine does falls on all of
it alike; a figure is the median of the rounds' ratios, with their quartiles.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, redirect_stdout
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from mole import MoleConfig, models
from mole.config import ROUTERS as METHODS

logging.disable_progress_bar()

EXPERTS, RANK = 8, 8
EQUAL = EXPERTS * RANK
"""The rank of the plain LoRA with as many parameters."""
ROUTERS = [name for name in METHODS if name != "lora"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Figure:
    """One measured number.

    Attributes:
        name: what was measured.
        value: the median.
        low, high: the quartiles.
        goal: `<= 1.00`, `>= 0.65`; empty for what is told without one.
        about: seconds, tokens, megabytes behind the ratio, in words.
    """

    name: str
    value: float
    low: float
    high: float
    goal: str = ""
    about: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the goal is met; None without one."""
        if not self.goal:
            return None
        sign, bound = self.goal.split()
        return self.value <= float(bound) if sign == "<=" else self.value >= float(bound)


def in_turns(work: Mapping[str, Callable[[], float]], rounds: int, warm: int = 1) -> dict[str, list[float]]:
    """Seconds that each piece of work says it took, round by round, every round all of them, to and fro."""
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for number in range(warm + rounds):
        for name in list(work)[:: -1 if number % 2 else 1]:
            took = work[name]()
            if number >= warm:
                seconds[name].append(took)
    return seconds


def timed(run: Callable[[], object]) -> Callable[[], float]:
    """The same as work for `in_turns`."""

    def took() -> float:
        begun = time.perf_counter()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - begun

    return took


def ratio(name: str, over: Sequence[float], under: Sequence[float], goal: str = "", about: str = "") -> Figure:
    """The ratio of two rows of a round-by-round table."""
    return figure(name, [one / other for one, other in zip(over, under, strict=True)], goal, about)


def figure(name: str, values: Sequence[float], goal: str = "", about: str = "") -> Figure:
    """Median and quartiles of some values."""
    low, _, high = statistics.quantiles(values, n=4) if len(values) > 1 else (values[0],) * 3
    return Figure(name, statistics.median(values), low, high, goal, about)


def base(dtype: torch.dtype = torch.float32, layers: int | None = None, **given: Any) -> Any:
    """The embedded SmolLM2-135M, or its first layers alone."""
    folder = models.convert_embedded(models.models_dir() / models.EMBEDDED)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **given)
    return model if layers is None else shortened(model, layers)


def shortened(model: Any, layers: int) -> Any:
    """The model with its first layers alone."""
    model.model.layers = model.model.layers[:layers]
    model.config.num_hidden_layers = layers
    return model


def with_lora(model: Any, rank: int = EQUAL, dropout: float = 0.0) -> Any:
    """PEFT's own LoRA on all projections, in the base's dtype."""
    config = LoraConfig(
        r=rank, lora_alpha=2 * rank, lora_dropout=dropout, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    return get_peft_model(model, config, autocast_adapter_dtype=False)


def with_experts(model: Any, router: str, dropout: float = 0.0, **given: Any) -> Any:
    """Our mixture on all projections, in the base's dtype."""
    shape = {"num_experts": EXPERTS, "r": RANK, "lora_alpha": 2 * RANK, **given}
    config = MoleConfig(
        router=router, lora_dropout=dropout, target_modules="all-linear", task_type="CAUSAL_LM", **shape
    )
    return get_peft_model(model, config, autocast_adapter_dtype=False)


def awake(model: Any) -> Any:
    """The same with random numbers in the experts' second half, which training would begin at zero."""
    generator = torch.Generator().manual_seed(0)
    for name, weight in model.named_parameters():
        if weight.requires_grad and ("lora_B" in name or "mole_studio_B" in name):
            weight.data.copy_(torch.randn(weight.shape, generator=generator) * 0.02)
    return model


def machine() -> dict[str, Any]:
    """Where the figures come from."""
    names = [line for line in cpu_info() if line.startswith("model name")]
    libraries = {name: version(name) for name in ("torch", "transformers", "peft")}
    return {
        "cpu": names[0].split(":")[1].strip() if names else platform.processor(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "bfloat16": any(f" {flag}" in line for line in cpu_info() for flag in ("amx_bf16", "avx512_bf16")),
        "python": platform.python_version(),
        **libraries,
        "date": time.strftime("%Y-%m-%d"),
    }


def cpu_info() -> list[str]:
    """What Linux says of the processor; nothing elsewhere."""
    path = Path("/proc/cpuinfo")
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


def main(about: str, measure: Callable[[argparse.Namespace], Sequence[Figure]], **options: Any) -> None:
    """Run a benchmark from the command line; `options` are its flags with their defaults."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print JSON, for benchmarks/report.py")
    for name, default in options.items():
        kind = type(default) if default is not None else str
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, default=default, help=f"default: {default}")
    chosen = parser.parse_args()
    torch.manual_seed(0)
    with redirect_stdout(sys.stderr) if chosen.json else nullcontext():  # trainers print too
        figures = list(measure(chosen))
    if chosen.json:
        told = [{**asdict(item), "met": item.met} for item in figures]
        flags = [f"--{name.replace('_', '-')} {getattr(chosen, name)}" for name in options if getattr(chosen, name)]
        command = " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *flags])
        head = {"title": about.splitlines()[0], "command": command, "machine": machine()}
        print(json.dumps({**head, "figures": told}, indent=1))
        return
    for item in figures:
        verdict = {None: "", True: "met", False: "MISSED"}[item.met]
        spread = f"[{item.low:.3f} {item.high:.3f}]"
        print(f"{item.name:44s} {item.value:7.3f}  {spread:16s} {item.goal:8s} {verdict:6s} {item.about}")
