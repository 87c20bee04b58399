"""The routing log: what the routers of a model did in a forward pass, and the auxiliary loss computed from it.

All adapted projections of a model share one `RoutingLog`. Forward hooks on the base model open and close it. In
between, each projection adds sums of its `Routing` over the tokens, in training, and the `Routing` itself while
somebody listens (`record_routing`). When the pass ends, the log turns the sums into the auxiliary loss, sends it on its
way to the gradient (`aux_gradient`) and passes the routings to the listeners. Nothing is kept on the modules and
nothing synchronises with the device.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from mole.core.errors import MoleError
from mole.mixture.aux_gradient import deliver
from mole.mixture.losses import has_losses, masked_sum, mixture_loss, token_columns
from mole.mixture.routers import Router, Routing
from mole.mixture.token_layout import TokenLayout, padding_masks, reads_decoder_tokens, token_layout

LOG_ATTRIBUTE = "_mole_routing_log"


class LogEntry(NamedTuple):
    """What a projection hands to the log.

    Attributes:
        routing: `(…, L, E)`, of the L projections that were computed together; None while nobody listens.
        column: which of the L it is.
        sums: in training, `(k,)`: the `token_columns` summed over the tokens; in a compiled graph `(…, k)`, still to be
            summed.
    """

    routing: Routing | None
    column: int
    sums: Tensor | None


class RecordedRouting(NamedTuple):
    """The routing of the projection `name` in one forward pass: `column` of a `routing (…, L, E)`."""

    name: str
    routing: Routing
    column: int


class RoutingSums(NamedTuple):
    """The `token_columns` of a projection, summed over the tokens of one batch: `values (k,)`."""

    name: str
    router: Router[Any]
    values: Tensor


class RoutingListener(Protocol):
    """What receives the routing of every forward pass."""

    def extend(self, records: list[RecordedRouting]) -> None:
        """Add the records of one forward pass, one for each adapted projection that was called."""


class Recording(NamedTuple):
    """A listener and the thread that it listens in."""

    thread: int
    listener: RoutingListener


@dataclass
class SharedByThreads:
    """What the logs of all threads have in common.

    Attributes:
        recordings: what listens to the model, each with the thread that began it.
        aux_loss: how the auxiliary loss reaches the gradient, one of `AUX_LOSS_MODES`.
        layer_left: whether a layer has lost its last adapter since the last pass.
    """

    recordings: list[Recording] = field(default_factory=list)
    aux_loss: str = "auto"
    layer_left: bool = False


class RoutingLog(threading.local):
    """The routing of the model's current forward pass. Each thread sees its own, but for what is `shared`.

    The hooks that open and close it are on the base model, so calls that bypass a `PeftModel` (native `add_adapter`)
    are logged too. When non-reentrant checkpointing recomputes a layer the log is closed, so nothing is counted twice.

    Attributes:
        shared: the same in all threads.
        listeners: receive the routings of this pass.
        sums: of the last batch in training mode.
        layout: which tokens this pass has, if there are listeners and the model's inputs tell.
        loss: the auxiliary loss of the last batch in training mode; None without one.
        micro_batches: sums of the passes so far, inside `one_batch`; None outside, where each pass is a batch.
    """

    def __init__(self, shared: SharedByThreads) -> None:
        """Called again in each thread, with the same object."""
        self.shared = shared
        self.listeners: list[RoutingListener] = []
        self.layout: TokenLayout | None = None
        self.records: list[RecordedRouting] = []
        self.sums: list[RoutingSums] = []
        self.loss: Tensor | None = None
        self.micro_batches: list[list[RoutingSums]] | None = None
        self._masks: dict[str, Tensor] = {}  # of encoder and decoder, (B, T): true for tokens that are not padding
        self._open = False
        self._training = False
        self._grad = False

    def __reduce__(self) -> tuple[Any, ...]:
        """A copied model starts with an empty log: the tensors of a forward pass belong to the original."""
        return RoutingLog, (SharedByThreads(aux_loss=self.shared.aux_loss),)

    @property
    def recordings(self) -> list[Recording]:
        """What listens to the model, each with the thread that began it."""
        return self.shared.recordings

    # Where a whole model is compiled, its hooks run in Python: Dynamo does not follow what they set in a thread's log.
    @torch.compiler.disable
    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook: drop the last pass, note the padding of this one."""
        if self.shared.layer_left:
            self.shared.layer_left = False
            # PEFT's `delete_adapter` tells the model; transformers' own tells the layers only.
            if not any(isinstance(own := getattr(part, "routers", None), dict) and own for part in module.modules()):
                return remove_log(module)
        self.records, self.sums, self.loss = [], [], None
        self._open = True
        self._training, self._grad = module.training, torch.is_grad_enabled()
        self._masks = padding_masks(module, args, kwargs) if self._training else {}
        self.listeners = self.listeners_here() if self.recordings else []
        self.layout = token_layout(module, args, kwargs) if self.listeners else None

    @torch.compiler.disable
    def listeners_here(self) -> list[RoutingListener]:
        """Those of this thread; in a thread that records nothing itself, as one that only generates, those of all."""
        recordings, here = tuple(self.recordings), threading.get_ident()
        own = [recording.listener for recording in recordings if recording.thread == here]
        return own or [recording.listener for recording in recordings]

    def entries(self, name: str, router: Router[Any], routing: Routing, training: bool) -> list[LogEntry]:
        """The log entries of L projections that were computed together.

        Args:
            name: the full name of one of them.
            router: the router of one of them; all follow the same rule.
            routing: `(…, L, E)`.
            training: whether the projections train. The log cannot tell: when checkpointing recomputes a layer, which
                must run the same operations as before, the log may have seen other passes.
        """
        count = routing.weights.shape[-2]
        recorded = routing if self.listeners else None
        if not training:
            return [LogEntry(recorded, column, None) for column in range(count)]
        columns = token_columns(router, routing)
        # A compiled block would save the mask for its backward pass, see `MaskedSum`: `finish` sums what it hands out.
        sums = columns if torch.compiler.is_compiling() else self.sum_over_tokens(name, columns, 1)
        return [LogEntry(recorded, column, own) for column, own in enumerate(sums.unbind(-2))]

    def sum_over_tokens(self, name: str, values: Tensor, kept: int = 0) -> Tensor:
        """Sum `values (…, k)` of the projection `name` over the tokens that are not padding.

        Args:
            name: its full name.
            values: `(B, T, k)`, `(N, k)`, or with further dimensions before k.
            kept: number of dimensions before k that are not summed over.
        """
        tokens = values.shape[: -1 - kept]
        mask = self.mask_of(name, tokens)
        mask = None if mask is None else mask.reshape(-1).to(values.device)
        return masked_sum(values.flatten(0, len(tokens) - 1), mask)

    def mask_of(self, name: str, tokens: torch.Size) -> Tensor | None:
        """The padding mask of the tokens that a projection sees, `(B, T)` or `(N,)`; None if they are other tokens than
        the model's input, such as those of an image encoder."""
        fitting = {
            part: mask
            for part, mask in self._masks.items()
            if (mask.shape == tokens if len(tokens) == 2 else mask.numel() == tokens.numel())
        }
        if len(fitting) == 2:  # inputs and targets of one length
            return fitting["decoder" if reads_decoder_tokens(name) else "encoder"]
        return next(iter(fitting.values()), None)

    def add(self, name: str, router: Router[Any], entry: LogEntry) -> None:
        """Add the entry of the projection `name` to the current pass; nothing happens outside a pass.

        Raises:
            MoleError: under reentrant checkpointing, where the auxiliary loss would silently get no gradient.
        """
        if not self._open:
            return
        if self._training and self._grad and not torch.is_grad_enabled() and has_losses(router):
            self._open = False
            raise MoleError(
                "The routers' auxiliary losses get no gradient under reentrant checkpointing: pass "
                'gradient_checkpointing_kwargs={"use_reentrant": False}, or set the loss coefficients to 0.'
            )
        if entry.routing is not None:
            self.records.append(RecordedRouting(name, entry.routing, entry.column))
        if entry.sums is not None:
            self.sums.append(RoutingSums(name, router, entry.sums))

    @torch.compiler.disable
    def finish(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Forward hook: notify the listeners, compute the auxiliary loss, send it on its way to the gradient."""
        self._open = False
        for listener in self.listeners:
            listener.extend(self.records)
        self.records = []
        if not self._training:
            self.sums = []
            return output
        self.sums = [
            sums if sums.values.dim() == 1 else sums._replace(values=self.sum_over_tokens(sums.name, sums.values))
            for sums in self.sums
        ]
        if self.micro_batches is not None:
            self.micro_batches.append(self.sums)
            return output
        self.compute_loss()
        if self.loss is not None:
            output, self.loss = deliver(module, output, self.loss, kwargs, self.shared.aux_loss)
        return output

    def compute_loss(self) -> None:
        """Compute the auxiliary loss from the sums; without a router that has one, it stays None."""
        found = [sums for sums in self.sums if has_losses(sums.router)]
        if found:
            self.loss = mixture_loss([sums.router for sums in found], [sums.values for sums in found])

    def join_micro_batches(self) -> None:
        """Add up the micro-batches: the sums and the auxiliary loss become those of the whole batch."""
        micro_batches, self.micro_batches = self.micro_batches or [], None
        if micro_batches:
            self.sums = [
                same[0]._replace(values=torch.stack([sums.values for sums in same]).sum(0))
                for same in zip(*micro_batches, strict=True)
            ]
            self.compute_loss()


@contextmanager
def listening(model: nn.Module, listener: RoutingListener) -> Iterator[None]:
    """Pass the routing of every forward pass inside the `with` block to `listener`; none without a MoLE adapter.

    The passes of another thread are passed on too, unless that thread listens to the model itself.
    """
    log = find_log(model)
    if log is None:
        yield
        return
    recording = Recording(threading.get_ident(), listener)
    log.recordings.append(recording)
    try:
        yield
    finally:
        log.recordings.remove(recording)


@contextmanager
def one_batch(model: nn.Module) -> Iterator[None]:
    """Treat the forward passes in training mode inside the `with` block as micro-batches of one batch.

    Afterwards `auxiliary_loss` is that of all their tokens, as after one pass over all of them. Nothing is added to the
    losses of the passes themselves.
    """
    log = find_log(model)
    if log is None:
        yield
        return
    log.micro_batches = []
    try:
        yield
        log.join_micro_batches()
    finally:
        log.micro_batches = None


def install_log(model: nn.Module) -> RoutingLog:
    """The routing log of a model; the first call creates it and registers its hooks."""
    log: RoutingLog | None = getattr(model, LOG_ATTRIBUTE, None)
    if log is None:
        log = RoutingLog(SharedByThreads())
        setattr(model, LOG_ATTRIBUTE, log)
        model.register_forward_pre_hook(log.begin, with_kwargs=True)
        model.register_forward_hook(log.finish, with_kwargs=True)
    return log


def remove_log(model: nn.Module) -> None:
    """Remove the routing log of a model and its hooks."""
    log = model.__dict__.pop(LOG_ATTRIBUTE, None)
    before, after = model._forward_pre_hooks, model._forward_hooks
    for hooks, with_kwargs in (
        (before, model._forward_pre_hooks_with_kwargs),
        (after, model._forward_hooks_with_kwargs),
    ):
        for key in [key for key, hook in hooks.items() if log is not None and getattr(hook, "__self__", None) is log]:
            del hooks[key], with_kwargs[key]


def find_log(model: nn.Module) -> RoutingLog | None:
    """The routing log of a model or of the model it wraps (PEFT, DDP, …); None without a MoLE adapter."""
    owner = log_owner(model)
    return None if owner is None else owner.__dict__[LOG_ATTRIBUTE]


def log_owner(model: nn.Module) -> nn.Module | None:
    """The model that has the routing log: itself or one that it wraps; None without a MoLE adapter."""
    return next((module for module in model.modules() if module.__dict__.get(LOG_ATTRIBUTE) is not None), None)


def auxiliary_loss(model: nn.Module) -> Tensor:
    """The weighted auxiliary loss of the model's last forward pass in training mode → scalar with gradient.

    It is 0 if no router has an auxiliary loss. Only a loop that computes its own loss from the logits needs it: a model
    called with `labels` returns a loss that includes it, and in a `Trainer` it is injected (`MoleConfig.aux_loss`).

    Raises:
        MoleError: the model has no MoLE adapter, or its last pass was not in training mode.
    """
    log = find_log(model)
    if log is None or not log.sums:
        raise MoleError("There is no auxiliary loss: run a forward pass in training mode with a MoLE adapter first.")
    return log.loss if log.loss is not None else log.sums[0].values.new_zeros(())


def layer_index(name: str) -> int:
    """The index of the layer a projection belongs to: the first number in its dotted name; 0 without one."""
    return layer_number(name) or 0


def layer_number(name: str) -> int | None:
    """The index of the layer that a module belongs to: the first number in its dotted name; None without one."""
    match = re.search(r"\.(\d+)\.", f".{name}.")
    return int(match.group(1)) if match else None
