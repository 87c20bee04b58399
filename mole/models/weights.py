"""Checks the headers of safetensors files, and that a model's settings fit them, before a library reads them.

Loading allocates what `config.json` asks for, and building a model takes as long as it has layers: so both are held
against the weights that are there. No torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from mole.core import files
from mole.core.errors import ModelError, brief
from mole.core.text import one_line

MAX_HEADER = 32 << 20
"""Bytes of a header; a hundred thousand tensors take half of it."""
MAX_LAYERS = 4096
PACKING = 64
"""Weights that one stored element may stand for: a quantised model packs several into one number."""
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_decoder_layers", "decoder_layers")
WIDTHS = ("hidden_size", "n_embd", "d_model", "dim")
INNER = ("moe_intermediate_size", "intermediate_size", "n_inner", "ffn_dim")
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
HEADS = ("num_attention_heads", "n_head", "n_heads")


def shapes_in(path: Path) -> Iterator[list[int]]:
    """The shape of each tensor in a safetensors file, as its header says. Raises `ModelError`."""
    try:
        with open(path, "rb", opener=files.regular) as file:
            size = int.from_bytes(file.read(8), "little")
        if size > MAX_HEADER:
            raise ValueError(f"its header claims {size:,} bytes, and at most {MAX_HEADER:,} are read")
        with safe_open(path, framework="np") as weights:
            for name in weights.keys():  # noqa: SIM118
                yield weights.get_slice(name).get_shape()
    except (OSError, ValueError, SafetensorError) as error:
        raise ModelError(f"{path} cannot be loaded as safetensors: {one_line(error)}.") from None


def check_model(folder: Path, name: str, complete: bool = True) -> None:
    """Check that the settings of a model's folder ask for no larger model than its weights.

    Of a folder without weights (a tokenizer's), or without all of them (not `complete`), only the number of layers is
    checked. Raises `ModelError`.
    """
    try:
        settings = files.read_json(folder / "config.json", files.regular)
    except (OSError, ValueError):
        return  # reported when it is loaded
    weights = folder.glob("*.safetensors") if complete else ()
    shapes = [shape for path in weights for shape in shapes_in(path)]
    for part in _mappings(settings):
        check_claims(f"The model {name}", part, len(shapes), sum(map(math.prod, shapes)))


def check_claims(what: str, settings: Mapping[str, Any], tensors: int, elements: int) -> None:
    """Check sizes in settings (by the names of `config.json`) against the number of tensors and of their elements.

    Raises `ModelError`.
    """
    layers = _largest(settings, LAYERS)
    if layers > min(tensors or MAX_LAYERS, MAX_LAYERS):
        raise ModelError(f"{what} does not fit its own weights: {brief(layers)} layers, {tensors} tensors.")
    width, words = _largest(settings, WIDTHS), _largest(settings, ("vocab_size",))
    inner = next((value for key in INNER if (value := _largest(settings, (key,)))), 0)
    # Each of these products is the size of a matrix, or of the same matrix in all layers.
    rows = words + _largest(settings, ("n_positions",))
    rows += layers * _largest(settings, HEADS) * _largest(settings, ("head_dim",))
    weights = width * (rows + layers * max(_largest(settings, EXPERTS), 1) * inner)
    if elements and weights > elements * PACKING:
        raise ModelError(
            f"{what} does not fit its own weights: its sizes make {brief(weights)} weights, and it has {elements:,}."
        )


def _largest(settings: Mapping[str, Any], keys: tuple[str, ...]) -> int:
    values = [settings.get(key) for key in keys]
    return max((int(value) for value in values if isinstance(value, (int, float)) and value < math.inf), default=0)


def _mappings(value: Any, depth: int = 0) -> Iterator[dict[str, Any]]:
    """The mappings in a JSON value: a model that also sees images has its settings in a part of its config."""
    if isinstance(value, dict) and depth < 4:
        yield value
        for part in value.values():
            yield from _mappings(part, depth + 1)
