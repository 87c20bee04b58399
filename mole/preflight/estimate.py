"""Before a run starts: what it will cost, whether it fits, and ways out when it does not.

`estimate` reads no weights and takes no step: parameters are counted exactly, memory and time are told from a rehearsal
(`memory_profile`). `dry_run` takes real steps instead. Whoever only wants the types needs no torch.
"""

from __future__ import annotations

import dataclasses
import heapq
import math
import random
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mole import runs
from mole.config import DataConfig, RunConfig
from mole.core.devices import free_memory
from mole.core.errors import ModelError
from mole.core.text import one_line

if TYPE_CHECKING:
    import torch

    from mole.preflight.memory_profile import Cost, Counts, Shape

CPU_RUNTIME, GPU_RUNTIME = 0.55e9, 0.7e9
"""Bytes that Python and the libraries take before any model, and a GPU's own bookkeeping."""
SLACK = {"cpu": 0.3, "cuda": 0.1}
"""What the allocator keeps of freed memory, as a share of the activations of a step without checkpointing: with it the
same tensors come and go. Fitted to six measured peaks of four settings on one CPU; the GPU's is a guess."""
TIGHT = 0.8
"""Share of the free memory above which an estimate is too close to call."""
MATMUL_SHARE = 0.6
"""Share of a step's time that is matrix products, roughly; the rest is norms, routing, dropout and the optimizer."""
CALL_SECONDS = 1.5e-5
"""What an operation takes however small it is."""
QUANTISED_BYTES = {"8bit": 1.0, "4bit": 0.53}
"""Bytes that bitsandbytes keeps for a number of a projection, scales included."""
SAMPLE = 4000
"""Rows that are tokenised to know their lengths; larger data are sampled."""


@dataclass(frozen=True)
class Lengths:
    """How long the rows of the training data are, in tokens as a run would see them.

    Attributes:
        rows: rows to learn from.
        longest: `(tokens, labelled tokens)` of the longest rows, longest first.
        typical: mean tokens of a row.
        quantile: length that nine of ten rows do not pass.
    """

    rows: int
    longest: list[tuple[int, int]]
    typical: float
    quantile: int


@dataclass(frozen=True)
class Way:
    """A way to make a run smaller.

    Attributes:
        label: what it changes, short.
        effect: what that does to the result and the time.
        overrides: the settings, as `{"section.field": value}`.
        peak: estimated bytes with it.
        fits: yes, tight or no, with it.
    """

    label: str
    effect: str
    overrides: dict[str, Any]
    peak: int
    fits: str


@dataclass(frozen=True)
class Estimate:
    """What a run takes, estimated; parameters are exact.

    Attributes:
        trainable_parameters, total_parameters: of the adapted model.
        memory: bytes by part; `peak` is their sum. Empty, with a note, when the architecture cannot be rehearsed.
        available: bytes free on the device now, None when that cannot be told.
        fits: yes, tight, no, or unknown.
        device, dtype: as a run would take them.
        total_steps, epochs: optimizer steps of the run, and the passes over the data they amount to.
        rows, longest, typical: training rows, tokens of the longest and mean tokens.
        seconds_per_step: roughly, None while another process has the device.
        ways: what makes it smaller, the least costly first; only where it does not fit easily.
        notes: what else should be known.
    """

    trainable_parameters: int
    total_parameters: int
    memory: dict[str, int]
    available: int | None
    fits: str
    device: str
    dtype: str
    total_steps: int
    epochs: float
    rows: int
    longest: int
    typical: float
    seconds_per_step: float | None
    ways: list[Way] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def peak(self) -> int:
        """Bytes at the peak."""
        return sum(self.memory.values())

    @property
    def seconds(self) -> float | None:
        """Roughly how long the whole run takes."""
        return None if self.seconds_per_step is None else self.seconds_per_step * self.total_steps

    def to_dict(self) -> dict[str, Any]:
        """The estimate as JSON values, `peak` and `seconds` among them."""
        return {**dataclasses.asdict(self), "peak": self.peak, "seconds": self.seconds}


def estimate(config: RunConfig, available: int | None = None) -> Estimate:
    """What a run takes, without reading its weights or taking a step.

    Args:
        config: the run.
        available: bytes there are; those free on the device if None.

    Raises:
        InputError: model, data or a setting cannot be used.
    """
    from mole.preflight.suggestions import ways_out

    plan = Planner.of(config)
    if available is None:
        available = free_on(plan.device)
    parts, notes = plan.parts(config)
    peak = sum(parts.values())
    fits = verdict(peak, available) if parts else "unknown"
    steps, epochs = steps_of(config, plan.lengths.rows)
    holder = runs.user_of(runs.device_of(config))
    if holder:
        notes.append(
            f"{holder} is using {runs.device_of(config)} now: what it holds is not counted as free, "
            "and the speed is not known. Measure once it has ended."
        )
    return Estimate(
        trainable_parameters=plan.counts.trainable,
        total_parameters=plan.counts.total,
        memory=parts,
        available=available,
        fits=fits,
        device=str(plan.device),
        dtype=str(plan.dtype(config)).removeprefix("torch."),
        total_steps=steps,
        epochs=epochs,
        rows=plan.lengths.rows,
        longest=plan.lengths.longest[0][0],
        typical=plan.lengths.typical,
        seconds_per_step=None if holder or not parts else plan.seconds_per_step(config),
        ways=ways_out(config, plan, available) if fits in ("tight", "no") else [],
        notes=notes,
    )


def verdict(peak: float, available: int | None) -> str:
    """Whether so many bytes fit: yes, tight, no, or unknown."""
    if available is None:
        return "unknown"
    return "no" if peak > available else "tight" if peak > TIGHT * available else "yes"


def free_on(device: torch.device) -> int | None:
    """Bytes free on a device; None when that cannot be told."""
    try:
        return free_memory(device)
    except RuntimeError:  # a GPU so full, or so broken, that it cannot be asked
        return 0


def steps_of(config: RunConfig, rows: int) -> tuple[int, float]:
    """Optimizer steps of a run over so many rows, and the passes over the data they amount to."""
    settings = config.training
    batches = math.ceil(rows / settings.per_device_train_batch_size)
    per_epoch = math.ceil(batches / settings.gradient_accumulation_steps)
    steps = settings.max_steps or math.ceil(per_epoch * settings.num_train_epochs)
    return steps, steps / per_epoch


@dataclass
class Planner:
    """What estimates of one run and its variants share: the model's config, the device, the rows' lengths."""

    hf_config: Any
    device: torch.device
    tokenizer: Any
    lengths: Lengths
    counts: Counts
    _costs: dict[Any, Cost] = field(default_factory=dict)

    @classmethod
    def of(cls, config: RunConfig) -> Planner:
        """Look the model and the data up. Raises `InputError`."""
        from transformers import AutoConfig

        from mole.core.devices import pick_device, pick_dtype
        from mole.models.loading import load_tokenizer, on_its_gpu, reason
        from mole.preflight import memory_profile

        model = on_its_gpu(config.model)
        device = pick_device(model.device)
        folder = folder_without_weights(model.name)
        tokenizer = load_tokenizer(model.name, folder)
        lengths = lengths_of(config.data, tokenizer)
        try:
            hf_config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
            counts = memory_profile.count(hf_config, config.adapter, pick_dtype(model.dtype, device))
        except Exception as error:
            raise ModelError(f"The model {model.name} cannot be built: {reason(error)}.") from error
        return cls(hf_config, device, tokenizer, lengths, counts)

    def dtype(self, config: RunConfig) -> torch.dtype:
        """The base model's dtype."""
        from mole.core.devices import pick_dtype

        return pick_dtype(config.model.dtype, self.device)

    def parts(self, config: RunConfig) -> tuple[dict[str, int], list[str]]:
        """Estimated bytes of a variant of the run by part, and notes; no parts when it cannot be rehearsed."""
        dtype = self.dtype(config)
        try:
            shape = self.longest(config)
            step = self.cost(config, shape)
            kept = SLACK.get(self.device.type, 0.1) * self.cost(config, shape, checkpointing=False).bytes
        except Exception as error:  # an architecture that looks at contents on its way
            note = f"The memory of this architecture cannot be told beforehand ({one_line(error)[:120]}): measure it."
            return {}, [note]
        states = 3 + (config.training.gradient_accumulation_steps > 1)  # weights, two moments, kept gradients
        quantisation = config.model.quantization
        base = self.counts.base_bytes / self.bytes_counted * dtype.itemsize
        unpacked = 0.0
        if quantisation != "none":
            base -= self.counts.projections * (dtype.itemsize - QUANTISED_BYTES[quantisation])
            unpacked = self.counts.width * self.counts.inner * dtype.itemsize
        parts = {
            "base model": base,
            "experts and optimizer": self.counts.adapter_bytes * states,
            "activations": step.activations + kept + unpacked,
            "logits": step.logits,
            "libraries": GPU_RUNTIME if self.device.type == "cuda" else CPU_RUNTIME,
        }
        return {name: round(size) for name, size in parts.items()}, []

    @property
    def bytes_counted(self) -> float:
        """Bytes a number of the base took when it was counted."""
        return self.counts.base_bytes / (self.counts.total - self.counts.trainable)

    def longest(self, config: RunConfig) -> Shape:
        """The largest micro-batch the run can meet."""
        from mole.preflight.memory_profile import Shape

        rows = min(config.training.per_device_train_batch_size, self.lengths.rows)
        limit = config.data.max_length
        labelled = sum(min(count, limit - 1) for _, count in self.lengths.longest[:rows])
        return Shape(rows, min(self.lengths.longest[0][0], limit), labelled)

    def typical(self, config: RunConfig) -> tuple[int, int]:
        """Rows and length of the micro-batch the run meets most: random rows, padded to the longest of them."""
        rows = min(config.training.per_device_train_batch_size, self.lengths.rows)
        length = self.lengths.typical if rows == 1 else self.lengths.quantile
        return rows, max(min(round(length), config.data.max_length), 2)

    def cost(self, config: RunConfig, shape: Shape, checkpointing: bool | None = None) -> Cost:
        """The rehearsed cost of a micro-batch, once for the same; with the run's own checkpointing if None."""
        from mole.preflight import memory_profile

        if checkpointing is None:
            checkpointing = config.training.gradient_checkpointing
        key = shape, config.model.dtype, checkpointing
        if key not in self._costs:
            dtype = self.dtype(config)
            self._costs[key] = memory_profile.cost(self.hf_config, config.adapter, dtype, shape, checkpointing)
        return self._costs[key]

    def seconds_per_step(self, config: RunConfig) -> float:
        """Roughly: the operations of a typical step by the measured speed of a matrix product of its size."""
        rows, length = self.typical(config)
        tokens = rows * length
        speed = matmul_speed(min(tokens, 4096), self.counts.width, self.counts.inner, self.device, self.dtype(config))
        longest = self.longest(config)
        step = self.cost(config, longest)
        flops = step.flops * tokens / (longest.batch * longest.length)
        seconds = flops / speed / MATMUL_SHARE + step.calls * CALL_SECONDS
        return float(seconds * config.training.gradient_accumulation_steps)


def matmul_speed(
    rows: int, width: int, inner: int, device: torch.device, dtype: torch.dtype, seconds: float = 0.3
) -> float:
    """Operations a second of `(rows, width) · (width, inner)` on a device, measured for about so long."""
    import torch

    x = torch.ones(rows, width, dtype=dtype, device=device)
    weight = torch.ones(width, inner, dtype=dtype, device=device)

    def settle() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    with torch.no_grad():
        for _ in range(2):
            x @ weight
        settle()
        begun, done = time.perf_counter(), 0
        while time.perf_counter() - begun < seconds:
            x @ weight
            settle()
            done += 1
        return 2.0 * rows * width * inner * done / (time.perf_counter() - begun)


def folder_without_weights(name: str) -> Path:
    """The folder of a model's config and tokenizer; of a hub model that is not here, only those are fetched."""
    from mole.models.sources import local_folder, resolve

    source = resolve(name)
    small = tuple(file for file in source.files if not file.endswith(".safetensors"))
    return local_folder(dataclasses.replace(source, files=small) if small else source, progress=True)


def lengths_of(config: DataConfig, tokenizer: Any) -> Lengths:
    """The lengths of the rows a run would learn from; of many rows, of a sample and of those with the longest text.

    Raises `DataError` when the data cannot be read or no row can be used.
    """
    from mole.core.errors import DataError
    from mole.data.encoding import IGNORED, encode_all, read_examples

    source = read_examples(config.path, config.columns)
    examples = list(source.examples)
    sample, more = examples, list[Any]()
    if len(examples) > SAMPLE:
        sample = random.Random(0).sample(examples, SAMPLE * 3 // 4)
        more = heapq.nlargest(SAMPLE // 4, examples, key=characters)

    def measured(chosen: list[Any]) -> list[tuple[int, int]]:
        items = (item for item in encode_all(chosen, tokenizer, config.max_length) if not isinstance(item, DataError))
        return [(len(item.input_ids), sum(label != IGNORED for label in item.labels[1:])) for item in items]

    found = measured(sample)
    if not found:
        raise DataError(f"{config.path}: no row can be used.", field="data.path")
    rows = round(len(examples) * len(found) / len(sample))
    if not config.eval_path and config.eval_fraction:
        rows -= min(max(round(rows * config.eval_fraction), 1), rows - 1)
    lengths = sorted(length for length, _ in found)
    return Lengths(
        rows=rows,
        longest=sorted([*found, *measured(more)], reverse=True)[:4096],
        typical=sum(lengths) / len(lengths),
        quantile=lengths[min(round(0.9 * len(lengths)), len(lengths) - 1)],
    )


def characters(example: Any) -> int:
    """Length of an example's text."""
    return len(example.text or "") + sum(len(message["content"]) for message in example.messages)
