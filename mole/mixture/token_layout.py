"""Which tokens of a forward pass a projection sees: what the recorder needs to put a routing into the right rows, and
the losses to leave padding out.

Most projections of a language model see all tokens, in their order. Others do not: those of an image encoder, or of the
encoder of an encoder-decoder, see another sequence; the experts of a mixture-of-experts base see tokens gathered from
all rows; an output head may see the last tokens only.
"""

from __future__ import annotations

import inspect
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

READ = ("input_ids", "inputs_embeds")
WRITTEN = ("decoder_input_ids", "decoder_inputs_embeds", "labels")
"""The inputs that hold the model's tokens: `READ`, and in an encoder-decoder before them `WRITTEN`."""
EXPERTS = re.compile(r"(^|\.)experts\.")
"""In the names of a mixture-of-experts base's own experts."""
ALTERNATIVE = re.compile(r"\.\d+\..*\.\d+(\.|$)")
"""In the names of a layer's parts that stand beside each other."""
ENCODED = re.compile(r"(?i)(cross|encdec|encoder_)_?att[a-z]*\.(.*\.)?(k|v|kv|key|value|key_value|c_attn)(_proj)?$")
"""The names of the keys and values of cross-attention, which are made of the encoder's tokens."""


class TokenLayout(NamedTuple):
    """The tokens of a forward pass.

    Attributes:
        rows: batch rows, B.
        length: tokens of a row, T.
        kept: `logits_to_keep`: how many of a row's last tokens the output head sees, 0 for all; or their positions.
        cached: tokens of a row that were read before, from a cache.
        flat: whether there are no rows: all projections are called with `(T, in)`.
    """

    rows: int
    length: int
    kept: int | Tensor = 0
    cached: int = 0
    flat: bool = False

    def is_of(self, shape: tuple[int, ...], name: str) -> bool:
        """Whether the projection `name`, called with `shape + (in,)`, sees all tokens in their order.

        `(B, T)` and `(B·T,)` do, also with dimensions of 1 between; but several parts of a layer that get `(N,)` may
        have been given tokens that belong to each of them. `(B, cached + T)` is of projections behind a cache, as of
        DeepSeek's latent attention, which see the tokens at the end of each row.
        """
        if shape == (self.rows, self.length):
            return True
        if len(shape) == 1:
            return shape[0] == self.rows * self.length and (self.flat or not ALTERNATIVE.search(name))
        sizes = [size for size in shape if size != 1]
        return any(
            sizes == [size for size in (self.rows, length) if size != 1]
            for length in {self.length, self.cached + self.length}
        )

    def of_first_row(self, shape: tuple[int, ...]) -> slice:
        """Where the tokens of the first row are among all that a projection called with `shape + (in,)` sees."""
        length = math.prod(shape) // self.rows
        return slice(length - self.length, length)

    def of_head(self, shape: tuple[int, ...]) -> slice | Tensor | None:
        """The positions of a row that an output head, called with `shape + (in,)`, sees; None if they are unknown."""
        if len(shape) != 2 or shape[0] != self.rows:
            return None
        if isinstance(self.kept, Tensor):  # `(k,)` or `(B, k)`, positions; or a mask, which flattens the rows
            known = self.kept.dtype != torch.bool and self.kept.shape[-1] == shape[1]
            return (self.kept[0] if self.kept.dim() == 2 else self.kept) if known else None
        return slice(self.length - shape[1], None) if shape[1] == self.kept else None


def token_layout(model: nn.Module, args: tuple[Any, ...], inputs: Mapping[str, Any]) -> TokenLayout | None:
    """The layout of a forward pass, from what `model` is called with; None if that does not tell."""
    if args:
        inputs = {**dict(zip(parameters(type(model).forward), args, strict=False)), **inputs}
    for name in (*WRITTEN, *READ) if is_encoder_decoder(model) else READ:
        value = inputs.get(name)
        if isinstance(value, Tensor) and value.dim() == (3 if name.endswith("embeds") else 2):
            kept = inputs.get("logits_to_keep")
            kept = kept if isinstance(kept, Tensor) else int(kept or 0)
            return TokenLayout(value.shape[0], value.shape[1], kept, cached_tokens(inputs.get("past_key_values")))
    return None


def cached_tokens(cache: Any) -> int:
    """The tokens of a row in a cache; 0 if only the device knows."""
    count = cache.get_seq_length() if hasattr(cache, "get_seq_length") else 0
    return count if isinstance(count, int) else 0


@lru_cache(maxsize=64)
def parameters(forward: Callable[..., Any]) -> list[str]:
    """The names of the arguments of a model's `forward`, without the model."""
    return list(inspect.signature(forward).parameters)[1:]


def commonest_layout(shapes: Iterable[tuple[int, ...]]) -> TokenLayout | None:
    """The layout of most projections, called with `shapes + (in,)`: for a model whose inputs do not tell it."""
    counts = Counter(shape for shape in shapes if 1 <= len(shape) <= 2)
    if not counts:
        return None
    ((shape, _),) = counts.most_common(1)
    return TokenLayout(1, shape[0], flat=True) if len(shape) == 1 else TokenLayout(shape[0], shape[1])


# ---------------------------------------------------------------------------------------------------------
# Padding


def padding_masks(model: nn.Module, args: tuple[Any, ...], inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """The padding masks `(B, T)` of a forward pass, true for tokens: `encoder`, or the only one, and `decoder`."""
    mask = inputs.get("attention_mask", args[1] if len(args) > 1 else None)
    masks = {"encoder": mask}
    if is_encoder_decoder(model):
        masks["decoder"] = inputs.get("decoder_attention_mask")
        if masks["decoder"] is None and (labels := inputs.get("labels")) is not None:
            masks["decoder"] = labels != -100  # the labels, moved by one place, are the decoder's input
    elif isinstance(mask, Tensor) and (cached := cached_tokens(inputs.get("past_key_values"))):
        masks["encoder"] = mask[:, cached:]
    return {part: mask.bool() for part, mask in masks.items() if isinstance(mask, Tensor) and mask.dim() == 2}


def reads_decoder_tokens(name: str) -> bool:
    """Whether a projection of an encoder-decoder reads the decoder's tokens: its parts, without the keys and values of
    cross-attention."""
    return "decoder" in name.split(".") and not ENCODED.search(name)


# ---------------------------------------------------------------------------------------------------------
# What a model's structure tells


def token_projections(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Those of the projections `names` that may see the model's own tokens, in an order that can be known."""
    inside = names_inside(model, decoder_of(model))
    head = names_inside(model, output_embeddings(model)) or ()
    return [
        name
        for name in names
        if (inside is None or name in inside or name in head) and not EXPERTS.search(name) and not ENCODED.search(name)
    ]


def head_names(model: nn.Module) -> set[str]:
    """The names of the modules that come behind a language model's layers, which may see the last tokens only."""
    body = names_inside(model, getattr(model, "base_model", None))
    head = names_inside(model, output_embeddings(model)) or set()
    behind = set() if body is None else {name for name, _ in model.named_modules() if name not in body}
    return head | behind


def names_inside(model: nn.Module, part: Any) -> set[str] | None:
    """The names that the modules of a part have in the model; None for no part or the whole."""
    if not isinstance(part, nn.Module) or part is model:
        return None
    own = {id(module) for module in part.modules()}
    return {name for name, module in model.named_modules() if id(module) in own}


def decoder_of(model: Any) -> Any:
    """The part that reads a model's tokens, where others read another sequence; None if there are no others."""
    config = getattr(model, "config", None)
    text = getattr(config, "get_text_config", lambda: config)()
    if not hasattr(model, "get_decoder") or (text is config and not is_encoder_decoder(model)):
        return None
    part = model.get_decoder()
    inner = getattr(part, "get_decoder", lambda: part)()  # a language model that has an encoder itself
    return inner if isinstance(inner, nn.Module) else part


def is_encoder_decoder(model: Any) -> bool:
    """Whether a model reads one sequence and writes another."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def output_embeddings(model: Any) -> Any:
    """The output head of a language model, or None."""
    return model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
