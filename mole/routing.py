"""What the routers did: the log every adapted model keeps during a forward pass, and the recorder people use.

`RoutingLog` is shared by all adapted projections of a model. Between the model's forward hooks each projection
adds its `Routing`; at the end the log turns them into the auxiliary loss, adds it to the model's own loss, and
hands them to the traces that listen. Nothing is kept on the modules, and nothing waits for the device.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mole.errors import MoleError
from mole.losses import has_losses, masked_mean, mixture_loss
from mole.routers import Router, Routing

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
        self._open = False
        self._training = False
        self._grad = False

    def __deepcopy__(self, memo: dict[int, Any]) -> RoutingLog:
        """A copied model starts with an empty log: tensors of a forward pass belong to the original."""
        return RoutingLog()

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
        if self.traces or self._training:
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
        records = [record for record in self.records if has_losses(record.router)]
        if not records:
            return output
        routers, routings = [r.router for r in records], [r.routing for r in records]
        self.loss = mixture_loss(routers, routings, self.mask)
        return with_added_loss(output, self.loss, kwargs)


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
# Recording


class RoutingDelta(NamedTuple):
    """The routing of some tokens, a value for every layer.

    Attributes:
        weights: `(tokens, layers, E)`, mean over the layer's projections, 0 for experts a layer does not have.
        entropy: `(tokens, layers)`, mean over the layer's projections.
        active: `(tokens, layers)`, mean number of experts with a weight above 0.
    """

    weights: Tensor
    entropy: Tensor
    active: Tensor


class Trace:
    """The routing of every token of the first batch row, over all forward passes while it listened.

    Attributes:
        router: the method's name, `"none"` for a model without adapter.
        modules: full names of the adapted projections.
        experts: the largest number of experts.
        layers: number of layers with adapted projections.
    """

    def __init__(self, model: nn.Module) -> None:
        adapted = adapted_projections(model)
        self.router = adapted[0][1].params.name if adapted else "none"
        self.modules = [name for name, _ in adapted]
        self.experts = max((router.num_experts for _, router in adapted), default=0)
        places = [layer_index(name) for name in self.modules]
        self._layers = sorted(set(places))
        self._layer_of = torch.tensor([self._layers.index(place) for place in places], dtype=torch.long)
        self._place = {name: place for place, name in enumerate(self.modules)}
        self._weights: list[Tensor] = []
        self._entropy: list[Tensor] = []

    @property
    def layers(self) -> int:
        return len(self._layers)

    def __len__(self) -> int:
        return sum(chunk.shape[0] for chunk in self._weights)

    def extend(self, records: list[Record]) -> None:
        """Add a forward pass: the first batch row's tokens, kept on the model's device."""
        if not records:
            return
        weights, entropy = [], []
        for record in sorted(records, key=lambda record: self._place[record.name]):
            row = first_row(record.routing)
            weights.append(nn.functional.pad(row.weights.detach(), (0, self.experts - row.weights.shape[-1])))
            entropy.append(row.entropy.detach())
        self._weights.append(torch.stack(weights, 1))
        self._entropy.append(torch.stack(entropy, 1))

    @property
    def weights(self) -> Tensor:
        """`(tokens, modules, E)` of everything recorded, on the CPU."""
        return self._joined(self._weights, (0, len(self.modules), self.experts))

    @property
    def entropy(self) -> Tensor:
        """`(tokens, modules)` of everything recorded, on the CPU."""
        return self._joined(self._entropy, (0, len(self.modules)))

    @staticmethod
    def _joined(chunks: list[Tensor], empty: tuple[int, ...], skip: int = 0) -> Tensor:
        kept, start = [], 0
        for chunk in chunks:
            if start + chunk.shape[0] > skip:
                kept.append(chunk[max(skip - start, 0) :].float().cpu())
            start += chunk.shape[0]
        return torch.cat(kept) if kept else torch.zeros(empty)

    def since(self, start: int) -> RoutingDelta:
        """The routing of the tokens from `start` on, by layer."""
        weights = self._joined(self._weights, (0, len(self.modules), self.experts), start)
        entropy = self._joined(self._entropy, (0, len(self.modules)), start)
        active = (weights > 0).sum(-1).float()
        return RoutingDelta(self._by_layer(weights), self._by_layer(entropy), self._by_layer(active))

    def _by_layer(self, values: Tensor) -> Tensor:
        """Mean of `values (tokens, modules, …)` over each layer's projections → `(tokens, layers, …)`."""
        counts = torch.bincount(self._layer_of, minlength=self.layers).clamp(min=1)
        sums = values.new_zeros(values.shape[0], self.layers, *values.shape[2:]).index_add(1, self._layer_of, values)
        return sums / counts.view(-1, *[1] * (values.dim() - 2))

    def to_dict(self, tokens: list[str], prompt_tokens: int) -> dict[str, Any]:
        """The trace as JSON-ready values: the format `mole chat --trace` writes."""
        delta = self.since(0)
        return {
            "router": self.router,
            "experts": self.experts,
            "layers": self.layers,
            "modules": self.modules,
            "tokens": tokens,
            "prompt_tokens": prompt_tokens,
            "weights": delta.weights.tolist(),
            "entropy": delta.entropy.tolist(),
            "active": delta.active.tolist(),
        }


@contextmanager
def record_routing(model: nn.Module) -> Iterator[Trace]:
    """Record what the routers do in every forward pass or `generate` inside the `with` block.

    Recording changes nothing of what the model computes. A model without an adapter of ours gives an empty trace.
    """
    trace, log = Trace(model), find_log(model)
    if log is None:
        yield trace
        return
    log.traces.append(trace)
    try:
        yield trace
    finally:
        log.traces.remove(trace)


def adapted_projections(model: nn.Module) -> list[tuple[str, Router[Any]]]:
    """The names and active routers of the adapted projections, in the model's order."""
    found = []
    for module in model.modules():
        routers, active = getattr(module, "routers", None), getattr(module, "active_adapters", [])
        if isinstance(routers, dict):
            names = [name for name in active if name in routers]
            if names:
                found.append((str(module.name), routers[names[-1]]))
    return found


def layer_index(name: str) -> int:
    """The layer a projection belongs to: the first number in its dotted name; 0 without one."""
    match = re.search(r"\.(\d+)\.", f".{name}.")
    return int(match.group(1)) if match else 0


def first_row(routing: Routing) -> Routing:
    """The first batch row `(length, E)` of a routing; one without a batch dimension as it is."""
    if routing.weights.dim() == 2:
        return routing
    return Routing(*(None if tensor is None else tensor[0] for tensor in routing))  # type: ignore[arg-type]


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
            values = torch.cat([tokens, routing.entropy.detach().reshape(-1, 1), used], dim=-1)
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
