"""Memory and compute of a training step, estimated without running a step.

The model is built on the `meta` device, where tensors have shapes but no data, and one step is run there while every
operation's allocations and FLOPs are counted. Attention, routing, checkpointing, autocast and the backward pass are
those of the real step, so no knowledge about the architecture is needed. Layers repeat, so models of one and of two
layers are profiled and the other layers are extrapolated.
"""

from __future__ import annotations

import copy
import dataclasses
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
from mole.mixture.model import mole_config, num_layers
from mole.mixture.routing_log import auxiliary_loss
from mole.models.logits import summed_loss_at


class ParameterCounts(NamedTuple):
    """Sizes of an adapted model.

    Attributes:
        trainable, total: numbers of parameters.
        base_bytes, adapter_bytes: their bytes, in the dtype in which the model was counted.
        projections: number of base weights in adapted projections, which quantisation makes smaller.
        in_features, out_features: those of the largest adapted projection.
    """

    trainable: int
    total: int
    base_bytes: int
    adapter_bytes: int
    projections: int
    in_features: int
    out_features: int


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
    )


def step_cost(
    config: Any, adapter: AdapterConfig, dtype: torch.dtype, shape: BatchShape, checkpointing: bool
) -> StepCost:
    """The cost of a forward and backward pass over one micro-batch.

    Layers that get no experts (`layers_to_transform`, a pattern in `exclude_modules`) are counted as if they had them,
    and all with the largest rank: the models measured have two layers. Raises whatever the architecture raises if it
    cannot run on tensors without data.
    """
    exclude = adapter.exclude_modules if isinstance(adapter.exclude_modules, list) else None
    everywhere = dataclasses.replace(
        adapter,
        layers_to_transform=None,
        exclude_modules=exclude,
        r=adapter.largest_rank,
        rank_pattern={},
        alpha_pattern={},
    )

    def profiled(layers: int, experts: int) -> StepCost:
        small = dataclasses.replace(everywhere, num_experts=experts)
        return profile_step(build_meta_model(with_layers(config, layers), small, dtype), dtype, shape, checkpointing)

    experts = adapter.experts_by_layer(layer_count(config))
    # the cost is fixed + layers · per_layer, so: fixed = 2 · one - two, per_layer = two - one
    one, two = profiled(1, experts[0]), profiled(2, experts[0])
    fixed = [2 * a - b for a, b in zip(one, two, strict=True)]
    per_layer = {experts[0]: [b - a for a, b in zip(one, two, strict=True)]}
    for other in {*experts} - {*per_layer}:
        per_layer[other] = [(b - a) / 2 for a, b in zip(fixed, profiled(2, other), strict=True)]
    columns = zip(*(per_layer[number] for number in experts), strict=True)
    return StepCost(*(start + sum(column) for start, column in zip(fixed, columns, strict=True)))


def layer_count(config: Any) -> int:
    """Number of layers of a transformers config."""
    holder: Any = nn.Module()
    holder.config = config
    return num_layers(holder)


def with_layers(config: Any, layers: int) -> Any:
    """A copy of a transformers config with only the first `layers` layers."""
    short = copy.deepcopy(config)
    text = short.get_text_config()
    before, text.num_hidden_layers = text.num_hidden_layers, layers
    for name, value in vars(text).items():
        if isinstance(value, list) and len(value) == before and name.startswith("layer"):
            setattr(text, name, value[:layers])
    return short


def profile_step(model: Any, dtype: torch.dtype, shape: BatchShape, checkpointing: bool) -> StepCost:
    """The cost of one forward and backward pass of a model on the `meta` device."""
    if checkpointing:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    mode = FakeTensorMode()
    to_fake(model, mode)
    base = model.get_base_model()
    vocabulary = base.get_output_embeddings().weight.shape[0]
    tracker = MemoryTracker([*model.parameters(), *model.buffers()], vocabulary)
    half = dtype if dtype != torch.float32 else torch.bfloat16
    with mode, tracker:
        inputs = {
            "input_ids": torch.zeros(shape.rows, shape.length, dtype=torch.long),
            # the 4D mask that transformers makes of a padding mask; making it here would need the mask's data
            "attention_mask": torch.zeros(shape.rows, 1, shape.length, shape.length, dtype=torch.bool),
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
        output = func(*args, **kwargs)
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
