"""What the estimates of a run and of its variants share: the model's sizes, the device, the lengths of the rows.

A `Planner` looks the model and the data up once, without reading weights, and then estimates the memory and the time of
any variant of the run. Importing this module does not load torch.
"""

from __future__ import annotations

import dataclasses
import heapq
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mole.config import DataConfig, RunConfig
from mole.core.devices import free_memory, pick_device, pick_dtype
from mole.core.errors import DataError, InputError, ModelError
from mole.data import IGNORE_INDEX, Example, encode_examples, read_sources, weighted
from mole.models.context import within_positions
from mole.models.sizes import QUANTISED_BYTES

if TYPE_CHECKING:
    import torch

    from mole.preflight.memory_profile import BatchShape, ParameterCounts, StepCost

CPU_RUNTIME, GPU_RUNTIME = 0.55e9, 0.7e9
"""Bytes of Python and its libraries without a model, and of a GPU's context."""
ALLOCATOR_SHARE = {"cpu": 0.3, "cuda": 0.1}
"""Freed memory that the allocator keeps, as a share of the activations of a step without checkpointing: checkpointing
allocates and frees the same tensors. Fitted to six measured peaks of four settings on one CPU; the GPU's is a guess."""
BORDERLINE = 0.8
"""Share of the free memory above which an estimate is too close to call."""
MATMUL_SHARE = 0.6
"""Approximate share of matrix products in a step's time; the rest is norms, routing, dropout and the optimizer."""
CALL_SECONDS = 1.5e-5
"""Minimum time of an operation, however small it is."""
LENGTH_SAMPLE = 4000
"""Rows that are tokenised to estimate lengths; larger data are sampled."""


@dataclass(frozen=True)
class RowLengths:
    """Lengths of the training rows in tokens, encoded as in training.

    Attributes:
        rows: number of training rows.
        longest: `(tokens, labelled tokens)` of the longest rows, longest first.
        typical: mean number of tokens per row.
        quantile: 90 % of the rows have at most this many tokens.
    """

    rows: int
    longest: list[tuple[int, int]]
    typical: float
    quantile: int


@dataclass
class Planner:
    """Estimates variants of one run.

    Attributes:
        hf_config: the model's transformers config.
        device: the device of the run.
        available: bytes free on it, None if unknown.
        lengths: lengths of the training rows.
        counts: sizes of the adapted model.
    """

    hf_config: Any
    device: torch.device
    available: int | None
    lengths: RowLengths
    counts: ParameterCounts
    _costs: dict[Any, StepCost] = field(default_factory=dict)

    @classmethod
    def of(cls, config: RunConfig) -> Planner:
        """Look the model and the data of a run up. Raises `InputError`."""
        from transformers import AutoConfig

        from mole.models.loading import check_continues_text, load_tokenizer, on_its_gpu, read_config, reason
        from mole.preflight import memory_profile

        model = on_its_gpu(config.model)
        device = pick_device(model.device)
        folder = folder_without_weights(model.name)
        check_continues_text(described := read_config(folder), model.name)
        lengths = row_lengths(within_positions(config, described).data, load_tokenizer(model.name, folder))
        try:
            hf_config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
            counts = memory_profile.count_parameters(hf_config, config.adapter, pick_dtype(model.dtype, device))
        except InputError:  # a setting of the adapter that does not fit this model
            raise
        except Exception as error:
            raise ModelError(f"The model {model.name} cannot be built: {reason(error)}.") from error
        return cls(hf_config, device, free_on(device), lengths, counts)

    def dtype(self, config: RunConfig) -> torch.dtype:
        """The base model's dtype."""
        return pick_dtype(config.model.dtype, self.device)

    def fits(self, peak: float) -> str:
        """Whether this many bytes fit: `yes`, `tight`, `no` or `unknown`."""
        if self.available is None:
            return "unknown"
        return "no" if peak > self.available else "tight" if peak > BORDERLINE * self.available else "yes"

    def memory(self, config: RunConfig) -> tuple[dict[str, int], str]:
        """Estimated bytes by part, and an empty note; if the architecture cannot be profiled, no parts and a reason."""
        dtype = self.dtype(config)
        try:
            shape = self.largest_batch(config)
            step = self.step_cost(config, shape)
            kept = ALLOCATOR_SHARE.get(self.device.type, 0.1) * self.step_cost(config, shape, checkpointing=False).bytes
        except Exception:  # an architecture whose forward pass depends on the contents of its tensors
            return {}, "The memory of this architecture cannot be estimated: measure it."
        states = 3 + (config.training.gradient_accumulation_steps > 1)  # weights, two moments, accumulated gradients
        quantisation = config.model.quantization
        base = self.counts.base_bytes / self.bytes_per_weight * dtype.itemsize
        dequantised = 0.0  # the largest projection: one at a time is computed in the model's dtype
        if quantisation != "none":
            base -= self.counts.projections * (dtype.itemsize - QUANTISED_BYTES[quantisation])
            dequantised = self.counts.in_features * self.counts.out_features * dtype.itemsize
        parts = {
            "base model": base,
            "experts and optimizer": self.counts.adapter_bytes * states,
            "activations": step.activations + kept + dequantised,
            "logits": step.logits,
            "libraries": GPU_RUNTIME if self.device.type == "cuda" else CPU_RUNTIME,
        }
        return {name: round(size) for name, size in parts.items()}, ""

    @property
    def bytes_per_weight(self) -> float:
        """Bytes of a base weight in the dtype in which the model was counted."""
        return self.counts.base_bytes / (self.counts.total - self.counts.trainable)

    def largest_batch(self, config: RunConfig) -> BatchShape:
        """The largest micro-batch of the run: the longest rows together."""
        from mole.preflight.memory_profile import BatchShape

        rows = min(config.training.per_device_train_batch_size, self.lengths.rows)
        limit = config.data.max_length
        labelled = sum(min(count, limit - 1) for _, count in self.lengths.longest[:rows])
        return BatchShape(rows, min(self.lengths.longest[0][0], limit), labelled)

    def typical_batch(self, config: RunConfig) -> tuple[int, int]:
        """Rows and length of a typical micro-batch: random rows, padded to the longest of them."""
        rows = min(config.training.per_device_train_batch_size, self.lengths.rows)
        length = self.lengths.typical if rows == 1 else self.lengths.quantile
        return rows, max(min(round(length), config.data.max_length), 2)

    def step_cost(self, config: RunConfig, shape: BatchShape, checkpointing: bool | None = None) -> StepCost:
        """The profiled cost of a micro-batch, cached; `checkpointing` None takes the run's own setting."""
        from mole.preflight import layer_costs

        if checkpointing is None:
            checkpointing = config.training.gradient_checkpointing
        key = shape, config.model.dtype, checkpointing
        if key not in self._costs:
            dtype = self.dtype(config)
            self._costs[key] = layer_costs.step_cost(self.hf_config, config.adapter, dtype, shape, checkpointing)
        return self._costs[key]

    def seconds_per_step(self, config: RunConfig) -> float:
        """Rough time of a typical optimizer step, from the measured speed of a matrix product of its size."""
        rows, length = self.typical_batch(config)
        tokens = rows * length
        shape = min(tokens, 4096), self.counts.in_features, self.counts.out_features
        speed = matmul_speed(*shape, self.device, self.dtype(config))
        largest = self.largest_batch(config)
        step = self.step_cost(config, largest)
        flops = step.flops * tokens / (largest.rows * largest.length)
        seconds = flops / speed / MATMUL_SHARE + step.calls * CALL_SECONDS
        return float(seconds * config.training.gradient_accumulation_steps)


def free_on(device: torch.device) -> int | None:
    """Bytes free on a device for the process of a run, None if unknown."""
    try:
        free = free_memory(device)
        # Asking has started CUDA in this process. What that takes is free again when the run starts.
        return free + round(GPU_RUNTIME) if free is not None and device.type == "cuda" else free
    except RuntimeError:  # CUDA cannot start, because the GPU is full or broken
        return 0


def matmul_speed(
    rows: int, in_features: int, out_features: int, device: torch.device, dtype: torch.dtype, seconds: float = 0.3
) -> float:
    """FLOP/s of `(rows, in_features) · (in_features, out_features)` on a device, measured for about `seconds`."""
    import torch

    x = torch.ones(rows, in_features, dtype=dtype, device=device)
    weight = torch.ones(in_features, out_features, dtype=dtype, device=device)

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    with torch.no_grad():
        for _ in range(2):
            x @ weight
        wait()
        begun, done = time.perf_counter(), 0
        while time.perf_counter() - begun < seconds:
            x @ weight
            wait()
            done += 1
        return 2.0 * rows * in_features * out_features * done / (time.perf_counter() - begun)


def folder_without_weights(name: str) -> Path:
    """The folder of a model's config and tokenizer; for a hub model that is not local, only these are downloaded."""
    from mole.models.sources import local_folder, resolve

    source = resolve(name)
    small = tuple(file for file in source.files if not file.endswith(".safetensors"))
    return local_folder(dataclasses.replace(source, files=small) if small else source, progress=True)


def row_lengths(config: DataConfig, tokenizer: Any) -> RowLengths:
    """The lengths of the training rows; for large data, of a random sample and of the rows with the longest text.

    Raises `DataError` when the data cannot be read or no row can be used.
    """
    examples = weighted([found.examples for found in read_sources(config)], config.sources, seed=0)
    sample, more = examples, list[Example]()
    if len(examples) > LENGTH_SAMPLE:
        sample = random.Random(0).sample(examples, LENGTH_SAMPLE * 3 // 4)
        more = heapq.nlargest(LENGTH_SAMPLE // 4, examples, key=character_count)
    found = encoded_lengths(sample, tokenizer, config)
    if not found:
        raise DataError(f"{config.label}: no row can be used.", field="data.path")
    rows = round(len(examples) * len(found) / len(sample))
    if not config.eval_path and config.eval_fraction:
        rows -= min(max(round(rows * config.eval_fraction), 1), rows - 1)
    lengths = sorted(length for length, _ in found)
    return RowLengths(
        rows=rows,
        longest=sorted([*found, *encoded_lengths(more, tokenizer, config)], reverse=True)[:4096],
        typical=sum(lengths) / len(lengths),
        quantile=lengths[min(round(0.9 * len(lengths)), len(lengths) - 1)],
    )


def encoded_lengths(examples: Sequence[Example], tokenizer: Any, config: DataConfig) -> list[tuple[int, int]]:
    """`(tokens, labelled tokens)` of the examples that can be encoded."""
    encoded = encode_examples(examples, tokenizer, config.max_length, config.enable_thinking)
    return [
        (len(piece.input_ids), sum(label != IGNORE_INDEX for label in piece.labels[1:]))
        for item in encoded
        if not isinstance(item, DataError)
        for piece in (item, *item.more)
    ]


def character_count(example: Example) -> int:
    """Characters of an example's text."""
    told = sum(len(message["content"]) + len(str(message.get("tool_calls", ""))) for message in example.messages)
    return len(example.text or "") + told + len(str(example.tools))
