"""Writes the conversation of `mole chat --replay` as a page of its own, with the studio's routing view."""

from __future__ import annotations

from app.services.conversation import Turn
from app.services.routing_stream import RoutingRecord, RoutingRecords
from app.views.replay import ReplayedReply, replay_page
from mole.chat.generate import Step
from mole.chat.process import describe_routing, routing_bytes
from mole.chat.reference import fit_map, reference_ids
from mole.core.thoughts import split_thought
from mole.models.loading import Loaded


class ReplayRecorder:
    """Records a conversation, and the routing of its last reply.

    Args:
        title: the target, as the page names it.
        loaded: the model; the map of its routing, from which tokens get their hues, is fitted now.
        system: the system prompt; empty for none.
    """

    def __init__(self, title: str, loaded: Loaded, system: str = "") -> None:
        self._title, self._loaded, self._system = title, loaded, system
        self._records = RoutingRecords(max_records=1)
        self._record: RoutingRecord | None = None
        self._turns: list[Turn] = []
        if loaded.router not in ("none", "lora"):
            loaded.routing_map, loaded.routing_mapped = fit_map(loaded, reference_ids(loaded)), True

    def begin(self, question: str) -> None:
        """Begin the reply to a question."""
        self._turns.append(Turn(question))
        self._record = None

    def add(self, step: Step) -> None:
        """Add a step of the reply."""
        if self._record is None:
            self._record = self._records.new(**describe_routing(self._loaded, step))
        if packed := routing_bytes(step, self._record.meta, self._loaded.routing_map):
            self._record.extend(**packed)
        thought, answer = split_thought(step.text)
        self._turns[-1] = Turn(self._turns[-1].user, answer, thought=thought)

    def page(self) -> str:
        """The page of the conversation so far."""
        record = self._record or RoutingRecord({"id": "", "experts": 0, "layers": 0, "counts": [], "prompt": 0})
        return replay_page([ReplayedReply(self._title, self._turns, record, self._system)])
