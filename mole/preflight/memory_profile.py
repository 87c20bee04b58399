"""Memory and compute of a training step, estimated without running a step.

The model is built on the `meta` device, where tensors have shapes but no data, and one step is run there while every
operation's allocations and FLOPs are counted. Attention, routing, checkpointing, autocast and the backward pass are
those of the real step, so no knowledge about the architecture is needed. `layer_costs` profiles deep models.
"""

from __future__ import annotations

import copy
import warnings
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from peft import get_peft_model
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from mole.config import AdapterConfig
from mole.core.errors import MoleNotice
from mole.mixture.model import mole_config
from mole.mixture.routing_log import auxiliary_loss
from mole.models.logits import summed_loss_at


class ParameterCounts(NamedTuple):
    """Sizes of an adapted model.

    Attributes:
        trainable, total: numbers of parameters.
        base_bytes, adapter_bytes: their bytes, in the dtype in which the model was counted.
        projections: number of base weights in adapted projections, which quantisation makes smaller.
        in_features, out_features: those of the largest adapted projection.
        notices: what the adapter leaves out of the base model, in sentences.
    """

    trainable: int
    total: int
    base_bytes: int
    adapter_bytes: int
    projections: int
    in_features: int
    out_features: int
    notices: tuple[str, ...] = ()


class BatchShape(NamedTuple):
    """A micro-batch: its rows, the tokens of each row, and its total of labelled tokens."""

    rows: int
    length: int
    labelled: int


class StepCost(NamedTuple):
    """The cost of a forward and backward pass, without weights and optimizer.

    Attributes:
        activations, logits: bytes at the peak.
        flops: multiplications and additions of the matrix products.
        calls: number of operations, each of which has a minimum time.
    """

    activations: float
    logits: float
    flops: float
    calls: float

    @property
    def bytes(self) -> float:
        """Bytes at the peak."""
        return self.activations + self.logits


def build_meta_model(config: Any, adapter: AdapterConfig, dtype: torch.dtype) -> Any:
    """The adapted model of a transformers config in training mode, on the `meta` device: it allocates no weights."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype, trust_remote_code=False)
        return get_peft_model(model, mole_config(adapter, task_type="CAUSAL_LM")).train()


def count_parameters(config: Any, adapter: AdapterConfig, dtype: torch.dtype) -> ParameterCounts:
    """Exact numbers of parameters of the adapted model, and their bytes."""
    from mole.mixture import MoleLinear

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", MoleNotice)
        model = build_meta_model(config, adapter, dtype)
    weights = list(model.parameters())
    trainable = [weight for weight in weights if weight.requires_grad]
    adapted = [module for module in model.modules() if isinstance(module, MoleLinear)]
    largest = max(adapted, key=lambda module: module.in_features * module.out_features)
    return ParameterCounts(
        trainable=sum(weight.numel() for weight in trainable),
        total=sum(weight.numel() for weight in weights),
        base_bytes=sum(weight.numel() * weight.element_size() for weight in weights if not weight.requires_grad),
        adapter_bytes=sum(weight.numel() * weight.element_size() for weight in trainable),
        projections=sum(module.in_features * module.out_features for module in adapted),
        in_features=largest.in_features,
        out_features=largest.out_features,
        notices=tuple(str(entry.message) for entry in caught if issubclass(entry.category, MoleNotice)),
    )


def profile_step(model: Any, dtype: torch.dtype, shape: BatchShape, checkpointing: bool) -> StepCost:
    """The cost of one forward and backward pass of a model on the `meta` device."""
    if checkpointing:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    base = model.get_base_model()
    vocabulary = base.get_output_embeddings().weight.shape[0]
    mode = FakeTensorMode()
    to_fake(model, mode)
    tracker = MemoryTracker([*model.parameters(), *model.buffers()], vocabulary)
    half = dtype if dtype != torch.float32 else torch.bfloat16
    with mode, tracker:
        inputs = {
            "input_ids": torch.zeros(shape.rows, shape.length, dtype=torch.long),
            "attention_mask": torch.ones(shape.rows, shape.length, dtype=torch.long),
        }
        positions = torch.zeros(shape.labelled, dtype=torch.long)
        with torch.autocast("cpu", dtype=half, enabled=dtype != torch.float32):
            loss = summed_loss_at(model, base.get_output_embeddings(), positions, positions, **inputs)
            if any(weight.requires_grad for weight in model.parameters()) and has_router(model):
                loss = loss + auxiliary_loss(model)
        loss.backward()
    return StepCost(tracker.peak - tracker.peak_logits, tracker.peak_logits, tracker.flops, tracker.calls)


def has_router(model: Any) -> bool:
    """Whether the adapter has a router."""
    return bool(model.active_peft_config.router != "lora")


def to_fake(model: nn.Module, mode: FakeTensorMode) -> None:
    """Replace a model's `meta` tensors with fake CPU tensors, so that the operations of the CPU are counted."""
    converted: dict[int, Any] = {}  # by id: tied weights stay tied

    def converted_tensor(tensor: torch.Tensor) -> Any:
        if id(tensor) not in converted:
            fake = FakeTensor(mode, tensor.detach(), torch.device("cpu"))
            is_weight = isinstance(tensor, nn.Parameter)
            converted[id(tensor)] = nn.Parameter(fake, tensor.requires_grad) if is_weight else fake
        return converted[id(tensor)]

    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    tensors[name] = converted_tensor(tensor)


class MemoryTracker(TorchDispatchMode):
    """Tracks the memory that operations allocate and free, its peak, and the operations' FLOPs.

    Args:
        known: tensors that existed before, which do not count.
        vocabulary: size of the last dimension of logits, which are also counted separately.
    """

    def __init__(self, known: list[torch.Tensor], vocabulary: int) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        # address of a storage → its bytes, and those of them that are logits; views share a storage and count once
        self.live: dict[int, tuple[int, int]] = {tensor.untyped_storage()._cdata: (0, 0) for tensor in known}
        self.now = self.logits = self.peak = self.peak_logits = self.calls = 0
        self.flops = 0.0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        output = grouped_product(*args, **kwargs) if is_grouped_product(func, args) else func(*args, **kwargs)
        self.calls += 1
        formula: Callable[..., int] | None = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **kwargs, out_val=output)
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor):
                self.add(tensor)
        return output

    def add(self, tensor: torch.Tensor) -> None:
        """Count a tensor's memory until it is freed, once per storage."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.live:
            return
        size = storage.nbytes()
        logits = size if tensor.dim() and tensor.shape[-1] == self.vocabulary else 0
        self.live[key] = size, logits
        weakref.finalize(storage, self.remove, key)
        self.now, self.logits = self.now + size, self.logits + logits
        if self.now > self.peak:
            self.peak, self.peak_logits = self.now, self.logits

    def remove(self, key: int) -> None:
        """Subtract the memory of a freed storage."""
        size, logits = self.live.pop(key)
        self.now, self.logits = self.now - size, self.logits - logits


def is_grouped_product(func: Any, args: Any) -> bool:
    """Whether an operation is the product with the experts of a mixture-of-experts base, on tensors without data."""
    return func is torch.ops.aten._grouped_mm.default and isinstance(args[0], FakeTensor)


def grouped_product(a: torch.Tensor, b: torch.Tensor, offs: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """What `_grouped_mm` returns. It works on every dtype on a CPU, but without data torch lets it have bfloat16 only.

    Shapes: `(tokens, in) · (experts, in, out)` → `(tokens, out)`; `(m, tokens) · (tokens, n)` → `(experts, m, n)`.
    """
    if a.dim() == 2 and b.dim() == 2:
        return a.new_empty(offs.shape[0], a.shape[0], b.shape[1])
    return a.new_empty(*a.shape[:-1], b.shape[-1])
