"""The routing of all tokens of a batch, where `record_routing` keeps the first row's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mole.core.errors import ModelError
from mole.data import Collator
from mole.mixture.routing_log import RecordedRouting, find_log, layer_index, listening, log_owner
from mole.mixture.token_layout import TokenLayout, token_projections
from mole.mixture.trace import active_routers, token_columns
from mole.models.loading import Loaded
from mole.models.logits import base_model, only_positions

NO_ROUTER = "{target} has no routed adapter: an atlas is of a mixture of experts, with a router of several experts."


class Projection(NamedTuple):
    """An adapted projection.

    Attributes:
        name: full name.
        layer: index of its layer.
        kind: its name inside the layer, such as `self_attn.q_proj`.
        experts: number of its experts.
    """

    name: str
    layer: int
    kind: str
    experts: int


class BatchRouting(NamedTuple):
    """The routing of the tokens of a batch, padding left out, rows one after the other; on the CPU.

    Attributes:
        weights: `(tokens, projections, E)`; 0 for experts that a projection does not have.
        entropy: `(tokens, projections)`, normalised to 0…1.
    """

    weights: Tensor
    entropy: Tensor


class BatchRecorder:
    """Runs batches through a model and returns the routing of their tokens.

    It has the projections that see all tokens in their order: not those of an image encoder, not the experts of a
    mixture-of-experts base. Rows are padded on the right, so in a model that reads from left to right no token sees
    padding; a row's routing is the same in a batch as alone, up to the rounding of matrix products of another shape.

    Attributes:
        projections: those recorded, in the model's order; which they are is known after the first batch.
        experts: the largest number of experts, E.
    """

    def __init__(self, loaded: Loaded) -> None:
        """Raises `ModelError` if the target has no router that chooses among several experts."""
        adapted, owner = active_routers(loaded.model), log_owner(loaded.model)
        self._counts = {name: router.num_experts for name, router in adapted}
        if owner is None or max(self._counts.values(), default=0) < 2:
            raise ModelError(NO_ROUTER.format(target=loaded.name), field="target")
        self._loaded = loaded
        self._known = set(token_projections(owner, list(self._counts)))
        self._records: list[RecordedRouting] = []
        self._layout: TokenLayout | None = None
        self.projections: list[Projection] = []
        self.experts = max(self._counts.values())

    @property
    def width(self) -> int:
        """Numbers that are recorded of a token; before the first batch, at the most."""
        return (len(self.projections) or len(self._counts)) * (self.experts + 1)

    def extend(self, records: list[RecordedRouting]) -> None:
        """Called at the end of each forward pass."""
        log = find_log(self._loaded.model)
        self._records, self._layout = list(records), None if log is None else log.layout

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record inside the `with` block."""
        with listening(self._loaded.model, self):
            yield

    @torch.no_grad()
    def route(self, rows: Sequence[Sequence[int]]) -> BatchRouting:
        """The routing of some rows of token ids, in one forward pass. Call it inside `recording`."""
        ids = [{"input_ids": list(row), "labels": list(row)} for row in rows]
        batch = Collator(self._loaded.tokenizer.pad_token_id)(ids)
        self._records = []
        forward(self._loaded.model, batch["input_ids"], batch["attention_mask"])
        values = self._columns(*batch["input_ids"].shape)[batch["attention_mask"].flatten().bool()]
        self._records = []
        return BatchRouting(values[..., : self.experts], values[..., self.experts])

    def _columns(self, rows: int, length: int) -> Tensor:
        """The columns `(rows · length, projections, E + 1)` of the last pass, on the CPU in float32."""
        seen: dict[str, RecordedRouting] = {}
        layout = self._layout or TokenLayout(rows, length)
        for record in self._records:  # of one that is called several times, the first call
            if record.name in self._known and layout.is_of(record.routing.weights.shape[:-2], record.name):
                seen.setdefault(record.name, record)
        if not self.projections:
            self.projections = [project(name, self._counts[name]) for name in self._counts if name in seen]
        names = [projection.name for projection in self.projections]
        missing = [name for name in names if name not in seen]
        if missing or not names:
            what = f"{missing[0]} is not called in every pass" if missing else "no adapted projection sees all tokens"
            raise ModelError(f"The routing of {self._loaded.name} cannot be recorded in batches: {what}.")
        # All rows as one, so that none but the padding is left out.
        columns = token_columns([seen[name] for name in names], self.experts, TokenLayout(1, rows * length))
        return columns[..., : self.experts + 1].float().cpu()


def project(name: str, experts: int) -> Projection:
    """A projection, from its full name."""
    layer = layer_index(name)
    return Projection(name, layer, f".{name}".partition(f".{layer}.")[2] or name, experts)


def forward(model: Any, ids: Tensor, mask: Tensor) -> None:
    """One forward pass without a cache, and with the logits of one position only, if nothing routes there."""
    device, head = model.device, base_model(model).get_output_embeddings()
    inputs = {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
    if head is None or hasattr(head, "routers"):
        model(**inputs, use_cache=False)
        return
    with only_positions(head, torch.tensor([0], device=device)):
        model(**inputs, use_cache=False)
