"""How the auxiliary loss of a forward pass reaches the gradient: in the model's own loss, or injected into its outputs.

A trainer that takes the `loss` which the model returns gets the auxiliary loss with it. One that computes a loss of its
own, from the logits, the log-probabilities or the hidden states, would never see it. There every output of a training
pass goes through a function that changes nothing forwards; backwards it adds the gradient of the auxiliary loss (as
Megatron-LM does for its mixtures of experts). Whichever way a backward pass takes first, it counts once.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from mole.mixture.token_layout import is_encoder_decoder

AUX_LOSS_MODES = ("auto", "in_loss", "injected", "manual")
"""Values of `MoleConfig.aux_loss`:

- `auto`: added to the loss that the model returns; in a step of transformers' `Trainer`, and of trainers built on it,
  injected where the backward pass does not come by that loss. Other loops with a loss of their own add
  `mole.auxiliary_loss(model)`.
- `in_loss`: added to the loss that the model returns, and nowhere else.
- `injected`: injected only; the loss that the model returns stays as it is.
- `manual`: neither; the loop adds `mole.auxiliary_loss(model)` to its loss.
"""


class Delivery:
    """The auxiliary loss of one forward pass on its way into a backward pass, in which it counts once."""

    def __init__(self) -> None:
        self._backward_pass = -1

    def is_first(self) -> bool:
        """Whether this is the first way by which the current backward pass comes to the auxiliary loss."""
        current = torch._C._current_graph_task_id()
        first, self._backward_pass = current != self._backward_pass, current
        return first


class Delivered(torch.autograd.Function):
    """The auxiliary loss itself, `loss` → `loss`, for whoever adds it to a loss."""

    generate_vmap_rule = True

    @staticmethod
    def forward(loss: Tensor, delivery: Delivery) -> Tensor:
        return loss.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Delivery], output: Tensor) -> None:
        ctx.delivery = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None]:
        return (grad if ctx.delivery.is_first() else torch.zeros_like(grad)), None


class Injected(torch.autograd.Function):
    """An output of the model, `output (…)` → `output`, whose gradient brings that of `scale · loss` with it."""

    generate_vmap_rule = True

    @staticmethod
    def forward(output: Tensor, loss: Tensor, scale: Tensor, delivery: Delivery) -> Tensor:
        # An alias: no copy of the logits. It is no view to autograd, so the trainer may write into it.
        return output.detach()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, Delivery], output: Tensor) -> None:
        _, _, ctx.scale, ctx.delivery = inputs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad, (ctx.scale if ctx.delivery.is_first() else torch.zeros_like(ctx.scale)), None, None


def deliver(model: nn.Module, output: Any, loss: Tensor, kwargs: Mapping[str, Any], mode: str) -> tuple[Any, Tensor]:
    """Send the auxiliary loss of a training pass into the backward passes to come.

    Args:
        model: the base model, whose pass it was.
        output: what it returned.
        loss: the auxiliary loss, a scalar.
        kwargs: what the model was called with.
        mode: one of `AUX_LOSS_MODES`.

    Returns:
        The output to return instead, and the auxiliary loss for who adds it by hand.
    """
    delivery = Delivery()
    given = loss
    if loss.requires_grad:
        trainer = running_trainer() if mode in ("auto", "injected") else None
        if mode == "injected" or (mode == "auto" and trainer is not None):
            own = own_loss(output) if mode == "auto" else None
            output = inject(output, loss, loss_scale(loss, trainer), delivery, but=own)
        # Autograd runs what was created last first: a loss that has it already keeps it from being injected.
        given = Delivered.apply(loss, delivery)
        if mode == "in_loss" and own_loss(output) is None:
            warn_of_lost_loss()
    if mode in ("auto", "in_loss"):
        output = add_to_output(model, output, given, kwargs)
    return output, given


def inject(output: Any, loss: Tensor, scale: Tensor, delivery: Delivery, but: Tensor | None = None) -> Any:
    """The model's output with the gradient of the auxiliary loss injected.

    Args:
        output: a `ModelOutput`, tuple, dictionary or tensor.
        loss: the auxiliary loss, a scalar.
        scale: its gradient, a scalar.
        delivery: counts it once.
        but: the part of the output that stays as it is.
    """

    def injected(value: Tensor) -> Tensor:
        if value is but or not value.requires_grad:
            return value
        changed: Tensor = Injected.apply(value, loss.to(value.device), scale.to(value.device), delivery)
        return changed

    return map_tensors(output, injected)


def map_tensors(output: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Apply a function to every tensor of a model's output; caches and other objects stay as they are."""
    if isinstance(output, Tensor):
        return function(output)
    if isinstance(output, MutableMapping):  # a `ModelOutput` too, which is changed in place
        for name, value in output.items():
            changed = map_tensors(value, function)
            if changed is not value:
                output[name] = changed
        return output
    if isinstance(output, (tuple, list)):
        values = [map_tensors(value, function) for value in output]
        return type(output)(*values) if hasattr(output, "_fields") else type(output)(values)
    return output


def own_loss(output: Any) -> Tensor | None:
    """The loss in a model's output; None without one. In a tuple it comes first."""
    if isinstance(output, (tuple, list)):
        first = output[0] if output else None
        return first if isinstance(first, Tensor) and first.dim() == 0 else None
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    return loss if isinstance(loss, Tensor) else None


def add_to_output(model: nn.Module, output: Any, loss: Tensor, kwargs: Mapping[str, Any]) -> Any:
    """Add the auxiliary loss to the loss of the model's output, if it has one.

    With `num_items_in_batch` (Trainer, gradient accumulation) the model's loss is divided by the labels of the whole
    batch. The auxiliary loss is then weighted by this pass's share of the labels, so that it is not counted once for
    every micro-batch.
    """
    own = own_loss(output)
    if own is None:
        return output
    items, labels = kwargs.get("num_items_in_batch"), counted_labels(model, kwargs)
    if items is not None and labels is not None:
        loss = loss * ((labels != -100).sum() / items)
    total = own + loss.to(own.device)
    if isinstance(output, (tuple, list)):
        return type(output)((total, *output[1:]))
    if isinstance(output, MutableMapping):
        output["loss"] = total
    else:
        output.loss = total
    return output


def counted_labels(model: nn.Module, kwargs: Mapping[str, Any]) -> Tensor | None:
    """The labels that the model's loss is a mean over, as `Trainer` counts them; None if it was called without.

    A causal model predicts the next token, so the first label of each row counts for nothing. Labels of a classifier
    `(B,)` and of an encoder-decoder `(B, T)` all count.
    """
    if kwargs.get("shift_labels") is not None:
        return cast(Tensor, kwargs["shift_labels"])
    labels: Tensor | None = kwargs.get("labels")
    if labels is None:
        return None
    from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

    causal = LOSS_MAPPING.get(getattr(model, "loss_type", None) or "") is ForCausalLMLoss
    return labels[..., 1:] if causal and not is_encoder_decoder(model) else labels


# ---------------------------------------------------------------------------------------------------------
# The scale of the loss


def loss_scale(loss: Tensor, trainer: Any) -> Tensor:
    """What the running loop multiplies a micro-batch's loss by: the gradient of the auxiliary loss to inject → scalar.

    It is 1 over the number of micro-batches in a step, times the scale of float16 training. Both are known of a
    `Trainer`; of another loop that uses accelerate the number is known, and of any other loop nothing: 1.
    """
    one = torch.ones_like(loss)
    if trainer is None:
        return one / accumulation_steps()
    scaler = getattr(trainer.accelerator, "scaler", None)
    scaled: Tensor = one if scaler is None else scaler.scale(one)
    return scaled / max(1, getattr(trainer, "current_gradient_accumulation_steps", 1))


def running_trainer() -> Any:
    """The `Trainer` in whose training step the current forward pass is; None outside one.

    Nothing that a trainer passes to a model tells how it will scale the loss, so it is looked up on the call stack.
    """
    module = sys.modules.get("transformers.trainer")
    if module is None:
        return None
    step = getattr(module.Trainer.training_step, "__code__", None)
    frame = sys._getframe(1)
    while frame.f_code is not step:
        if frame.f_back is None:
            return None
        frame = frame.f_back
    return frame.f_locals["self"]


def accumulation_steps() -> int:
    """The number of micro-batches by which accelerate divides a loss; 1 where it is not in use."""
    module = sys.modules.get("accelerate.state")
    if module is None or not module.GradientState._shared_state:
        return 1
    return max(1, int(module.GradientState().num_steps))


def warn_of_lost_loss() -> None:
    """Say that a training pass has nothing to which its auxiliary loss could be added."""
    warnings.warn(
        "The routers' auxiliary loss does not reach the gradient: aux_loss is 'in_loss', and the model was called "
        "without labels. Use aux_loss='auto', or add mole.auxiliary_loss(model) to the loss.",
        stacklevel=2,
    )
