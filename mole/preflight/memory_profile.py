"""What a training step takes, told without taking it.

The model is built on the `meta` device, where tensors have shapes and no contents, and one step of it is rehearsed
there: every operation is asked what it would allocate and compute. Attention, routing, checkpointing, autocast and the
backward pass are those of the real step, so nothing has to be known about an architecture. Layers repeat, so a model
of one and one of two layers are rehearsed and the rest is counted on.
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
from mole.mixture.model import depth, mole_config
from mole.mixture.routing_log import auxiliary_loss
from mole.models.logits import summed_loss_at


class Counts(NamedTuple):
    """Sizes of an adapted model; `width` and `inner` are those of its largest projection `(inner, width)`."""

    trainable: int
    total: int
    base_bytes: int
    adapter_bytes: int
    projections: int
    """Numbers in the base's adapted projections: what quantisation makes smaller."""
    width: int
    inner: int


class Shape(NamedTuple):
    """A micro-batch: rows, tokens in each, and labelled tokens in all."""

    batch: int
    length: int
    labelled: int


class Cost(NamedTuple):
    """What a forward and backward pass takes beside weights and optimizer.

    Attributes:
        activations, logits: bytes at the peak.
        flops: multiplications and additions of its matrix products.
        calls: operations, each of which takes some time however small it is.
    """

    activations: float
    logits: float
    flops: float
    calls: float

    @property
    def bytes(self) -> float:
        """All of it."""
        return self.activations + self.logits


def build(config: Any, adapter: AdapterConfig, dtype: torch.dtype) -> Any:
    """The adapted model of a transformers config, in training mode on the `meta` device: no memory, no weights."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype, trust_remote_code=False)
        return get_peft_model(model, mole_config(adapter, task_type="CAUSAL_LM")).train()


def count(config: Any, adapter: AdapterConfig, dtype: torch.dtype) -> Counts:
    """The exact numbers of parameters, and the bytes they take."""
    from mole.mixture.layer import MoleLinear

    model = build(config, adapter, dtype)
    weights = list(model.parameters())
    ours = [weight for weight in weights if weight.requires_grad]
    adapted = [module for module in model.modules() if isinstance(module, MoleLinear)]
    widest = max(adapted, key=lambda module: module.in_features * module.out_features)
    return Counts(
        trainable=sum(weight.numel() for weight in ours),
        total=sum(weight.numel() for weight in weights),
        base_bytes=sum(weight.numel() * weight.element_size() for weight in weights if not weight.requires_grad),
        adapter_bytes=sum(weight.numel() * weight.element_size() for weight in ours),
        projections=sum(module.in_features * module.out_features for module in adapted),
        width=widest.in_features,
        inner=widest.out_features,
    )


def cost(config: Any, adapter: AdapterConfig, dtype: torch.dtype, shape: Shape, checkpointing: bool) -> Cost:
    """What a forward and backward pass over one micro-batch takes.

    Raises whatever the architecture raises when it cannot be run on tensors without contents.
    """

    def rehearsed(layers: int, experts: int) -> Cost:
        small = dataclasses.replace(adapter, num_experts=experts)
        return rehearse(build(shortened(config, layers), small, dtype), dtype, shape, checkpointing)

    layers = depth_of(config)
    experts = adapter.experts_by_layer(layers)
    one, two = rehearsed(1, experts[0]), rehearsed(2, experts[0])
    fixed = [2 * a - b for a, b in zip(one, two, strict=True)]
    per_layer = {experts[0]: [b - a for a, b in zip(one, two, strict=True)]}
    for other in {*experts} - {*per_layer}:
        per_layer[other] = [(b - a) / 2 for a, b in zip(fixed, rehearsed(2, other), strict=True)]
    columns = zip(*(per_layer[number] for number in experts), strict=True)
    return Cost(*(start + sum(column) for start, column in zip(fixed, columns, strict=True)))


def depth_of(config: Any) -> int:
    """Number of layers of a transformers config."""
    holder: Any = nn.Module()
    holder.config = config
    return depth(holder)


def shortened(config: Any, layers: int) -> Any:
    """A copy of a transformers config with its first `layers` layers."""
    short = copy.deepcopy(config)
    text = short.get_text_config()
    before, text.num_hidden_layers = text.num_hidden_layers, layers
    for name, value in vars(text).items():
        if isinstance(value, list) and len(value) == before and name.startswith("layer"):
            setattr(text, name, value[:layers])
    return short


def rehearse(model: Any, dtype: torch.dtype, shape: Shape, checkpointing: bool) -> Cost:
    """One forward and backward pass of a model on the `meta` device, counted."""
    if checkpointing:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    mode = FakeTensorMode()
    pretend(model, mode)
    base = model.get_base_model()
    vocabulary = base.get_output_embeddings().weight.shape[0]
    ledger = Ledger([*model.parameters(), *model.buffers()], vocabulary)
    half = dtype if dtype != torch.float32 else torch.bfloat16
    with mode, ledger:
        inputs = {
            "input_ids": torch.zeros(shape.batch, shape.length, dtype=torch.long),
            # as transformers makes it of one with padding; making it would ask for the contents
            "attention_mask": torch.zeros(shape.batch, 1, shape.length, shape.length, dtype=torch.bool),
        }
        positions = torch.zeros(shape.labelled, dtype=torch.long)
        with torch.autocast("cpu", dtype=half, enabled=dtype != torch.float32):
            loss = summed_loss_at(model, base.get_output_embeddings(), positions, positions, **inputs)
            if any(weight.requires_grad for weight in model.parameters()) and has_router(model):
                loss = loss + auxiliary_loss(model)
        loss.backward()
    return Cost(ledger.peak - ledger.peak_logits, ledger.peak_logits, ledger.flops, ledger.calls)


def has_router(model: Any) -> bool:
    """Whether the adapter chooses between experts."""
    return bool(model.active_peft_config.router != "lora")


def pretend(model: nn.Module, mode: FakeTensorMode) -> None:
    """Let a model's `meta` tensors pass for tensors of the CPU, so that its kernels are the ones that are counted."""
    made: dict[int, Any] = {}

    def fake(tensor: torch.Tensor) -> Any:
        if id(tensor) not in made:
            pretended = FakeTensor(mode, tensor.detach(), torch.device("cpu"))
            is_weight = isinstance(tensor, nn.Parameter)
            made[id(tensor)] = nn.Parameter(pretended, tensor.requires_grad) if is_weight else pretended
        return made[id(tensor)]

    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    tensors[name] = fake(tensor)


class Ledger(TorchDispatchMode):
    """Counts the memory that operations allocate and give back, its peak, and the multiplications they do.

    Args:
        known: tensors that were there before and do not count.
        vocabulary: size of the last dimension of logits, which are counted apart.
    """

    def __init__(self, known: list[torch.Tensor], vocabulary: int) -> None:
        super().__init__()
        self.vocabulary = vocabulary
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
        """Count a tensor's memory, once, for as long as it lives."""
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
        """A tensor's memory is free again."""
        size, logits = self.live.pop(key)
        self.now, self.logits = self.now - size, self.logits - logits
