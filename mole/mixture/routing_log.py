"""What the routers did: the log every adapted model keeps during a forward pass, and the losses over it.

`RoutingLog` is shared by all adapted projections of a model. Between the model's forward hooks each projection
adds sums of its `Routing` over the tokens, in training, and the `Routing` itself where traces listen; at the end
the log turns the sums into the auxiliary loss, adds it to the model's own loss, and hands the routings to the
traces. Nothing is kept on the modules, and nothing waits for the device.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mole.core.errors import MoleError
from mole.core.limits import DEAD_SHARE
from mole.mixture.losses import columns, has_losses, masked_sum, means_of, mixture_loss
from mole.mixture.routers import Router, Routing

if TYPE_CHECKING:
    from mole.mixture.trace import Trace

LOG_ATTRIBUTE = "_mole_routing_log"


class Record(NamedTuple):
    """One projection's decision in one forward pass: column `place` of a `routing (…, layers, E)`."""

    name: str
    routing: Routing
    place: int


class Sums(NamedTuple):
    """What `mole.mixture.losses.layout` names, summed over a projection's tokens in the last batch: `values (k,)`."""

    name: str
    router: Router[Any]
    values: Tensor


class Seen(NamedTuple):
    """What the log gets of a projection's routing.

    Attributes:
        whole: of `(…, layers, E)`, the projections that compute together, where traces listen.
        place: which of them it is.
        sums: in training, those over tokens `(k,)`; in a compiled graph what is to be summed, `(…, k)`.
    """

    whole: Routing | None
    place: int
    sums: Tensor | None


class RoutingLog:
    """The routing of the model's current forward pass, opened and closed by hooks on the base model.

    The hooks also see calls that go round a `PeftModel` (native `add_adapter`), and the recomputation of
    non-reentrant checkpointing finds the log closed, so that nothing is counted twice.
    """

    def __init__(self) -> None:
        self.records: list[Record] = []
        self.sums: list[Sums] = []
        self.traces: list[Trace] = []
        self.loss: Tensor | None = None
        self.parts: list[list[Sums]] | None = None
        """The passes so far of a batch that comes in parts; None when a pass is a batch."""
        self._mask: Tensor | None = None
        self._whole_mask = True
        """Whether the mask may still cover tokens of earlier passes."""
        self._open = False
        self._training = False
        self._grad = False

    def __deepcopy__(self, memo: dict[int, Any]) -> RoutingLog:
        """A copied model starts with an empty log: tensors of a forward pass belong to the original."""
        return RoutingLog()

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook: forget the last pass, note this one's padding."""
        self.records, self.sums, self.loss = [], [], None
        mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
        self._mask = mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None
        self._open, self._whole_mask = True, True
        self._training, self._grad = module.training, torch.is_grad_enabled()

    def see(self, router: Router[Any], routing: Routing, training: bool) -> list[Seen]:
        """What is wanted of the `routing (…, layers, E)` of projections that compute together, by projection.

        Whether a projection trains says the projection itself: when checkpointing computes it again, with the same
        operations as the first time, the log may have seen other passes.
        """
        count = routing.weights.shape[-2]
        whole = routing if self.traces else None
        sums = self.summed(columns(router, routing), 1).unbind(-2) if training else [None] * count
        return [Seen(whole, place, own) for place, own in enumerate(sums)]

    def summed(self, values: Tensor, kept: int = 0) -> Tensor:
        """The sum of `values (…, k)` over tokens without padding, all dimensions but k and the `kept` before it.

        Not in a compiled graph: that would save the mask for its backward (see `mole.mixture.losses.MaskedSum`).
        """
        if torch.compiler.is_compiling():
            return values
        tokens = values.shape[: -1 - kept]
        if self._mask is not None and self._whole_mask and len(tokens) == 2:
            self._mask, self._whole_mask = self._mask[:, -tokens[1] :], False
        fits = self._mask is not None and self._mask.numel() == tokens.numel()
        mask = self._mask.reshape(-1).to(values.device) if self._mask is not None and fits else None
        return masked_sum(values.flatten(0, len(tokens) - 1), mask)

    def add(self, name: str, router: Router[Any], seen: Seen) -> None:
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
        if seen.whole is not None:
            self.records.append(Record(name, seen.whole, seen.place))
        if seen.sums is not None:
            self.sums.append(Sums(name, router, seen.sums))

    def finish(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Forward hook: feed the traces, compute the auxiliary loss, add it to the output's own loss."""
        self._open = False
        for trace in self.traces:
            trace.extend(self.records)
        self.records = []
        if not self._training:
            self.sums = []
            return output
        self.sums = [
            sums if sums.values.dim() == 1 else sums._replace(values=self.summed(sums.values)) for sums in self.sums
        ]
        if self.parts is not None:
            self.parts.append(self.sums)
            return output
        self.count()
        return output if self.loss is None else with_added_loss(output, self.loss, kwargs)

    def count(self) -> None:
        """Turn the sums into the auxiliary loss; None when no router has one."""
        found = [sums for sums in self.sums if has_losses(sums.router)]
        if found:
            self.loss = mixture_loss([sums.router for sums in found], [sums.values for sums in found])

    def join(self) -> None:
        """Make one batch of the parts: its sums and auxiliary loss."""
        parts, self.parts = self.parts or [], None
        if parts:
            self.sums = [
                same[0]._replace(values=torch.stack([sums.values for sums in same]).sum(0))
                for same in zip(*parts, strict=True)
            ]
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
    if log is None or not log.sums:
        raise MoleError("There is no auxiliary loss: run a forward pass in training mode with a MoLE adapter first.")
    return log.loss if log.loss is not None else log.sums[0].values.new_zeros(())


# ---------------------------------------------------------------------------------------------------------
# Statistics for the event log


def layer_statistics(model: nn.Module) -> dict[str, Any] | None:
    """Load, entropy, active and dead experts by layer, over the last training pass's tokens without padding.

    Returns:
        `load` [layer][expert]: each expert's share of the routing weight, sums to 1 a layer; `entropy`, `active`:
        means [layer]; `dead`: number of experts [layer] with next to no load. None without routers to speak of.
    """
    log = find_log(model)
    if log is None or not log.sums:
        return None
    experts = max(sums.router.num_experts for sums in log.sums)
    layers = sorted({layer_index(sums.name) for sums in log.sums})
    rows: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    with torch.no_grad():
        for name, router, values in log.sums:
            mean = means_of(router, values)
            load = F.pad(mean["weights"], (0, experts - router.num_experts))
            rows[layer_index(name)].append(torch.cat([load, mean["entropy"], mean["active"]]))
        table = torch.stack([torch.stack(rows[layer]).mean(0) for layer in layers]).float().cpu()
    total = table[:, :-2].sum(-1, keepdim=True)
    load = table[:, :-2] / torch.where(total > 0, total, torch.ones_like(total))
    counts = experts_by_layer(log.sums)
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


def experts_by_layer(projections: list[Sums]) -> dict[int, int]:
    """The largest number of experts of each layer's projections."""
    counts: dict[int, int] = {}
    for name, router, _ in projections:
        layer = layer_index(name)
        counts[layer] = max(counts.get(layer, 0), router.num_experts)
    return counts


def rounded(values: Any) -> Any:
    """Nested lists of numbers to four places: enough for a picture, a third of the bytes."""
    return [rounded(value) for value in values] if isinstance(values, list) else round(values, 4)
