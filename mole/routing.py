"""What the routers did: the log every adapted model keeps during a forward pass, and the losses over it.

`RoutingLog` is shared by all adapted projections of a model. Between the model's forward hooks each projection
adds its `Routing`; at the end the log turns them into the auxiliary loss, adds it to the model's own loss, and
hands them to the traces that listen. Nothing is kept on the modules, and nothing waits for the device.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from mole.errors import MoleError
from mole.losses import has_losses, masked_mean, mixture_loss
from mole.routers import Router, Routing, entropy_of

if TYPE_CHECKING:
    from mole.trace import Trace

LOG_ATTRIBUTE = "_mole_routing_log"


class Record(NamedTuple):
    """One projection's routing in the last forward pass; `name` is the projection's full module name."""

    name: str
    router: Router[Any]
    routing: Routing


class RoutingLog:
    """The routing of the model's current forward pass, opened and closed by hooks on the base model.

    The hooks also see calls that go round a `PeftModel` (native `add_adapter`), and the recomputation of
    non-reentrant checkpointing finds the log closed, so that nothing is counted twice.
    """

    def __init__(self) -> None:
        self.records: list[Record] = []
        self.traces: list[Trace] = []
        self.mask: Tensor | None = None
        self.loss: Tensor | None = None
        self.parts: list[tuple[list[Record], Tensor | None]] | None = None
        """The passes so far of a batch that comes in parts; None when a pass is a batch."""
        self._open = False
        self._training = False
        self._grad = False

    def __deepcopy__(self, memo: dict[int, Any]) -> RoutingLog:
        """A copied model starts with an empty log: tensors of a forward pass belong to the original."""
        return RoutingLog()

    @property
    def listens(self) -> bool:
        """Whether anybody wants to know the routing; the same while checkpointing computes a pass again."""
        return bool(self.traces) or self._training

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook: forget the last pass, note this one's padding."""
        self.records, self.loss, self.mask = [], None, None
        mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
        if isinstance(mask, Tensor) and mask.dim() == 2:
            self.mask = mask.bool()
        self._open, self._training, self._grad = True, module.training, torch.is_grad_enabled()

    def add(self, name: str, router: Router[Any], routing: Routing) -> None:
        """Note what a projection's router did in the pass that is open.

        Raises `MoleError` under reentrant checkpointing, where the auxiliary loss would silently get no gradient.
        """
        if not self._open:
            return
        if self._training and self._grad and not torch.is_grad_enabled() and has_losses(router):
            self._open = False
            raise MoleError(
                "The routers' auxiliary losses get no gradient under reentrant checkpointing: pass "
                'gradient_checkpointing_kwargs={"use_reentrant": False}, or set the loss coefficients to 0.'
            )
        if self.listens:
            self.records.append(Record(name, router, routing))

    def finish(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Forward hook: feed the traces, compute the auxiliary loss, add it to the output's own loss."""
        self._open = False
        self.mask = current_tokens(self.mask, self.records)
        for trace in self.traces:
            trace.extend(self.records)
        if not self._training:
            self.records = []
            return output
        if self.parts is not None:
            self.parts.append((self.records, self.mask))
            return output
        self.count()
        return output if self.loss is None else with_added_loss(output, self.loss, kwargs)

    def count(self) -> None:
        """Turn the records into the auxiliary loss; None when no router has one."""
        records = [record for record in self.records if has_losses(record.router)]
        if records:
            routers, routings = [r.router for r in records], [r.routing for r in records]
            self.loss = mixture_loss(routers, routings, self.mask)

    def join(self) -> None:
        """Make one batch of the parts: its records, mask and auxiliary loss."""
        parts, self.parts = self.parts or [], None
        if not parts:
            return
        self.records = [
            Record(same[0].name, same[0].router, tokens_of([record.routing for record in same]))
            for same in zip(*(records for records, _ in parts), strict=True)
        ]
        masks = [mask.reshape(-1) for _, mask in parts if mask is not None]
        self.mask = torch.cat(masks) if len(masks) == len(parts) else None
        self.count()


@contextmanager
def one_batch(model: nn.Module) -> Iterator[None]:
    """Take the forward passes in training mode of this block as parts of one batch: `auxiliary_loss` is that of all
    their tokens, as if there had been one pass. The parts' own losses, with `labels`, have none added."""
    log = find_log(model)
    if log is None:
        yield
        return
    log.parts = []
    try:
        yield
        log.join()
    finally:
        log.parts = None


def tokens_of(routings: Sequence[Routing]) -> Routing:
    """Routings of `(…, E)` as one of `(N, E)`, their tokens one after another."""

    def joined(tensors: Sequence[Tensor | None], keep: int) -> Tensor | None:
        flat = [tensor.reshape(-1, *tensor.shape[tensor.dim() - keep :]) for tensor in tensors if tensor is not None]
        return torch.cat(flat) if flat else None

    columns = zip(*routings, strict=True)
    return Routing(*(joined(column, keep) for column, keep in zip(columns, (1, 1, 0, 1, 0), strict=True)))  # type: ignore[arg-type]


def current_tokens(mask: Tensor | None, records: list[Record]) -> Tensor | None:
    """The part of an attention mask `(batch, past + length)` that covers this pass's `length` tokens."""
    lengths = [record.routing.weights.shape[1] for record in records if record.routing.weights.dim() == 3]
    return mask[:, -lengths[0] :] if mask is not None and lengths else mask


def with_added_loss(output: Any, loss: Tensor, kwargs: Mapping[str, Any]) -> Any:
    """The model's output with the auxiliary loss in its `loss`, when it has one.

    With `num_items_in_batch` (Trainer, gradient accumulation) the model's loss is a share of the whole batch's:
    the auxiliary loss is weighted by the same share of labels, so that a batch counts once, not once a part.
    """
    labels, items = kwargs.get("labels"), kwargs.get("num_items_in_batch")
    if labels is None:
        return output
    if items is not None:
        loss = loss * ((labels[..., 1:] != -100).sum() / items)
    if isinstance(output, tuple):
        return (output[0] + loss.to(output[0].device), *output[1:])
    output.loss = output.loss + loss.to(output.loss.device)
    return output


def install_log(model: nn.Module) -> RoutingLog:
    """The model's routing log, with its hooks; made on the first call, the same one after."""
    log: RoutingLog | None = getattr(model, LOG_ATTRIBUTE, None)
    if log is None:
        log = RoutingLog()
        setattr(model, LOG_ATTRIBUTE, log)
        model.register_forward_pre_hook(log.begin, with_kwargs=True)
        model.register_forward_hook(log.finish, with_kwargs=True)
    return log


def find_log(model: nn.Module) -> RoutingLog | None:
    """The routing log of a model or of what it wraps (PEFT, DDP, …); None without an adapter of ours."""
    for module in model.modules():
        log: RoutingLog | None = module.__dict__.get(LOG_ATTRIBUTE)
        if log is not None:
            return log
    return None


def auxiliary_loss(model: nn.Module) -> Tensor:
    """The weighted auxiliary loss of the model's last forward pass in training mode → scalar with gradient.

    Only needed by a loop that computes its own loss from the logits: with `labels`, the model's loss has it
    already. 0 for a model whose routers have no auxiliary loss. Raises `MoleError` before the first pass and
    after one in evaluation mode, which collects none.
    """
    log = find_log(model)
    if log is None or not log.records:
        raise MoleError("There is no auxiliary loss: run a forward pass in training mode with a MoLE adapter first.")
    return log.loss if log.loss is not None else log.records[0].routing.weights.new_zeros(())


# ---------------------------------------------------------------------------------------------------------
# Statistics for the event log

DEAD_SHARE = 0.01
"""An expert is dead in a layer when its load is below this share of an even one."""


def layer_statistics(model: nn.Module) -> dict[str, Any] | None:
    """Load, entropy, active and dead experts by layer, over the last training pass's tokens without padding.

    Returns:
        `load` [layer][expert]: each expert's share of the routing weight, sums to 1 a layer; `entropy`, `active`:
        means [layer]; `dead`: number of experts [layer] with next to no load. None without routers to speak of.
    """
    log = find_log(model)
    if log is None or not log.records:
        return None
    experts = max(record.router.num_experts for record in log.records)
    layers = sorted({layer_index(record.name) for record in log.records})
    rows: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    with torch.no_grad():
        for record in log.records:
            routing = record.routing
            tokens = routing.weights.detach().flatten(0, -2)
            mask = log.mask.reshape(-1) if log.mask is not None and log.mask.numel() == len(tokens) else None
            used = (tokens > 0).sum(-1, keepdim=True).to(tokens)
            values = torch.cat([tokens, entropy_of(routing).detach().reshape(-1, 1), used], dim=-1)
            mean = masked_mean(values, mask)
            mean = torch.cat([mean[:-2], mean.new_zeros(experts - tokens.shape[-1]), mean[-2:]])
            rows[layer_index(record.name)].append(mean)
        table = torch.stack([torch.stack(rows[layer]).mean(0) for layer in layers]).float().cpu()
    sums = table[:, :-2].sum(-1, keepdim=True)
    load = table[:, :-2] / torch.where(sums > 0, sums, torch.ones_like(sums))
    counts = experts_by_layer(log.records)
    dead = [
        int((load[place, : counts[layer]] < DEAD_SHARE / counts[layer]).sum()) for place, layer in enumerate(layers)
    ]
    return {
        "layers": len(layers),
        "experts": experts,
        "load": rounded(load.tolist()),
        "entropy": rounded(table[:, -2].tolist()),
        "active": rounded(table[:, -1].tolist()),
        "dead": dead,
    }


def layer_index(name: str) -> int:
    """The layer a projection belongs to: the first number in its dotted name; 0 without one."""
    match = re.search(r"\.(\d+)\.", f".{name}.")
    return int(match.group(1)) if match else 0


def experts_by_layer(records: list[Record]) -> dict[int, int]:
    """The largest number of experts of each layer's projections."""
    counts: dict[int, int] = {}
    for record in records:
        layer = layer_index(record.name)
        counts[layer] = max(counts.get(layer, 0), record.router.num_experts)
    return counts


def rounded(values: Any) -> Any:
    """Nested lists of numbers to four places: enough for a picture, a third of the bytes."""
    return [rounded(value) for value in values] if isinstance(values, list) else round(values, 4)
