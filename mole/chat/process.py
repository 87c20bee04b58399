"""The process the studio's models live in: it loads them and generates the replies that it is asked for."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch

from mole.chat.generate import Step, stream
from mole.chat.messages import Opened, Part, ReplyJob, Stage
from mole.chat.model_cache import ModelCache
from mole.chat.reference import fit_map, reference_ids
from mole.chat.settings import ChatSettings
from mole.config import AdapterConfig, ModelConfig
from mole.core.child import memory_limit, serve
from mole.core.errors import ModelError
from mole.core.text import is_out_of_memory
from mole.mixture.aot_compile import prepare_kernels
from mole.mixture.routing_map import RoutingMap, hue_and_distance, strongest_share
from mole.mixture.steering import Steering
from mole.models.adapter_files import read_adapter_config
from mole.models.loading import Loaded, import_ahead

ENCODING_MEMORY = 2 << 30
"""Bytes that chat template and tokenizer may take for a conversation, which is at most a few hundred kB."""
NO_ADAPTER = "This is the base model without an adapter: it has no experts, so there is no routing to show."
ONE_EXPERT = "This adapter is plain LoRA: one expert per layer, always used, so there is no routing to show."
NO_ROUTER = "This adapter has no router, so there is no routing to show."


class Receiver(Protocol):
    """Who is sent a reply: the other end of a pipe."""

    def send(self, message: Any, /) -> None:
        """Take a message."""

    def poll(self) -> bool:
        """Whether the reply is to end."""


class ReplyGenerator:
    """Generates one reply after another, with the models in this process's memory.

    Args:
        own_process: whether it has this process for itself, and for a long time: then the memory for a conversation's
            template is limited, and kernels are compiled.
    """

    def __init__(self, own_process: bool = True) -> None:
        self.cache = ModelCache()
        self._own_process = own_process

    def answer(self, job: ReplyJob, connection: Receiver) -> None:
        """Generate a reply; sends its stages, an `Opened` and a `Part` for each step.

        Raises `MoleError`: what is wrong with the target, the settings or the conversation, or too little memory.
        """
        try:
            self._generate(job, connection)
            return
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
        # Only now: while it is handled, the error's traceback holds the model and what it has computed.
        self.cache.clear()
        raise ModelError(
            "There is not enough memory for this reply. Shorten the conversation, compare fewer models, or wait until "
            "a run that trains has ended."
        )

    def _generate(self, job: ReplyJob, connection: Receiver) -> None:
        config, steering = ModelConfig(device=job.device), Steering.from_dict(job.steering)
        settings = ChatSettings.from_dict(job.settings)
        if not self.cache.holds(job.target, config):
            connection.send(Stage.LOADING)
        with self.cache.use(job.target, config) as loaded:
            steps = stream(
                loaded, job.messages, settings,
                should_stop=connection.poll,  # while a reply is generated, nothing but `STOP` is sent to us
                steering=steering, encoding=encoding_stage(connection, loaded, self._own_process),
            )  # fmt: skip
            send_parts(steps, loaded, steering, job.with_trace, connection)
            if self._own_process:
                prepare_kernels(loaded.model)


def send_parts(
    steps: Iterator[Step], loaded: Loaded, steering: Steering, with_trace: bool, connection: Receiver
) -> None:
    """Send an `Opened`, and a `Part` for each step as it is generated."""
    texts, routing, started = list[str](), dict[str, Any](), 0.0
    for step in steps:
        if not texts:
            routing, started = describe_routing(loaded, step, steering), time.monotonic()
            on_gpu = loaded.model.device.type == "cuda"
            connection.send(Opened(routing, step.prompt_tokens, loaded.notice, on_gpu))
        texts += [text for _, text in step.tokens]
        trace = step.trace if with_trace and step.finished else None
        whole = trace.to_dict(texts, step.prompt_tokens) if trace is not None else None
        seconds = time.monotonic() - started
        packed = routing_bytes(step, routing, loaded.routing_map)
        connection.send(Part(step.text, len(step.tokens), packed, seconds, step.finished, whole))


@contextmanager
def encoding_stage(connection: Receiver, loaded: Loaded, limited: bool = True) -> Iterator[None]:
    """A block in which template and tokenizer turn the conversation into tokens, `limited` to `ENCODING_MEMORY`.

    For the first reply of an adapter the map of its routing is fitted after it: before the reply's routing overrides
    apply, so that a token has the same hue with and without them.
    """
    ids: list[int] = []
    connection.send(Stage.ENCODING)
    with memory_limit(ENCODING_MEMORY) if limited else nullcontext():
        yield
        if not loaded.routing_mapped and loaded.router not in ("none", "lora"):
            ids = reference_ids(loaded)
    connection.send(Stage.GENERATING)
    if ids:
        loaded.routing_map = fit_map(loaded, ids)
    loaded.routing_mapped = True


# ---------------------------------------------------------------------------------------------------------
# From the model to the page's bytes


def describe_routing(loaded: Loaded, step: Step, steering: Steering | None = None) -> dict[str, Any]:
    """The arguments of `RoutingRecords.new` for a reply.

    Args:
        loaded: the model that generates it.
        step: the first step of the reply.
        steering: the routing overrides of this reply.
    """
    trace = step.trace
    meta: dict[str, Any] = {"prompt": step.prompt_tokens, "router": loaded.router, "about": model_summary(loaded)}
    if trace is None or trace.experts < 2:
        note = NO_ADAPTER if loaded.adapter_dir is None else ONE_EXPERT if loaded.router == "lora" else NO_ROUTER
        return {"note": note, **meta}
    meta["about"] += f" · {trace.experts} experts · {trace.layers} layers"
    meta |= {"layers": trace.layers, "experts": trace.experts}
    meta |= routing_shape(loaded.adapter_dir, trace.layers, trace.experts, steering)
    return {"names": short_names(trace.modules), "layer_of": trace.layer_of, **meta}


def model_summary(loaded: Loaded) -> str:
    """A loaded target in a few words."""
    base = Path(loaded.base).name
    return f"{base}, base model" if loaded.adapter_dir is None else f"{loaded.router} on {base}"


def routing_shape(folder: Path | None, layers: int, experts: int, steering: Steering | None) -> dict[str, Any]:
    """What the adapter's config says about its routing, with this reply's overrides.

    Returns:
        `counts`: experts of each layer; `even`: the weight of each expert when all that take part share evenly, by
        layer; `muted`: the experts that take no part; `threshold`: DynMoLE's entropy threshold; `limit`: AdaMoLE's
        largest τ. The last two are None for other methods.
    """
    values = read_adapter_config(folder) if folder else {}
    allocation = AdapterConfig(num_experts=values.get("num_experts", experts))
    counts = allocation.experts_by_layer(layers)
    router = values.get("router")
    values = {**values, **(steering.settings if steering else {})}
    among = [steering.allowed_experts(count) if steering else range(count) for count in counts]
    return {
        "counts": counts,
        "even": [1 / max(len(allowed), 1) for allowed in among],
        "muted": sorted(set(range(experts)) - set().union(*among)),
        "threshold": values.get("entropy_threshold") if router == "dynmole" else None,
        "limit": (values.get("max_threshold") or 1 / min(counts)) if router == "adamole" else None,
    }


def short_names(modules: list[str]) -> list[str]:
    """The names of projections inside their layer: the last part of the name where it is unambiguous."""
    inside = [re.sub(r"^.*?\.\d+\.", "", f".{name}").lstrip(".") for name in modules]
    by_last_part: dict[str, set[str]] = {}
    for name in inside:
        by_last_part.setdefault(name.rsplit(".", 1)[-1], set()).add(name)
    return [name if len(by_last_part[last := name.rsplit(".", 1)[-1]]) > 1 else last for name in inside]


def routing_bytes(step: Step, described: dict[str, Any], routing_map: RoutingMap | None = None) -> dict[str, Any]:
    """A step's tokens and their routing as the arguments of `RoutingRecord.extend`; empty if there is no routing.

    Args:
        step: the step.
        described: what `describe_routing` returned for this reply.
        routing_map: gives the tokens their hues; without one they have none.
    """
    delta, experts = step.routing, described.get("experts", 0)
    if delta is None or not experts or not step.tokens:
        return {}

    def bytes_of(values: torch.Tensor, full: float = 1.0) -> bytes:
        return values.nan_to_num().mul(255 / full).clamp(0, 255).round().to(torch.uint8).numpy().tobytes()

    limit = described["limit"]
    places = None
    if routing_map is not None and step.trace is not None:
        places = routing_map.place(step.trace.modules, delta.projections)
    return {
        "tokens": [text for _, text in step.tokens],
        "weights": bytes_of(delta.weights),
        "entropy": bytes_of(delta.entropy),
        "active": bytes_of(delta.active, experts),
        "thresholds": b"" if limit is None or delta.threshold is None else bytes_of(delta.threshold, limit),
        "strongest": bytes_of(strongest_share(delta.projections)),
        "hues": b"" if places is None else hue_bytes(places),
        "projections": bytes_of(delta.projections),
    }


def hue_bytes(places: torch.Tensor) -> bytes:
    """Places on the map `(tokens, 2)` as two bytes each: hue, a circle of 256 steps, and distance from the centre."""
    hue, distance = hue_and_distance(places).unbind(-1)
    steps = torch.stack([(hue * 256).round() % 256, (distance * 255).round()], -1)
    return steps.to(torch.uint8).numpy().tobytes()


# ---------------------------------------------------------------------------------------------------------
# The process


def leave_a_core() -> None:
    """Leave one CPU core to the page, unless the person set the number of threads (`OMP_NUM_THREADS`).

    torch's threads wait for each other by spinning: one that has to wait for the page holds up all of them, and on two
    cores a reply takes twice as long.
    """
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(min(torch.get_num_threads(), max((os.cpu_count() or 2) - 1, 1)))


def main() -> None:
    """Answer the requests of the studio's engine."""
    import_ahead()
    leave_a_core()
    serve(ReplyGenerator().answer)


if __name__ == "__main__":
    main()
