"""Checks the header of a `.gguf` file before a library reads it.

The `gguf` package believes every count: an array of 2⁶³ entries keeps it busy until memory ends. So each count is
held against the bytes that are there first. No torch.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from mole.core import files
from mole.core.errors import ModelError, brief
from mole.models.weights import check_claims

MAGIC = b"GGUF"
VERSIONS = (2, 3)
SCALARS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Number of a scalar type → its bytes."""
INTEGERS = {0: False, 1: True, 2: False, 3: True, 4: False, 5: True, 10: False, 11: True}
"""Number of an integer type → whether it is signed."""
TEXT, ARRAY = 8, 9
MAX_TEXT = 16 << 20
"""Bytes of a text; the longest is a chat template."""
MAX_NAME = 1024
MAX_ENTRIES = 1 << 22
"""Metadata and entries of arrays together, each of which becomes a Python object; large vocabularies have a million."""
MAX_TENSORS = 1 << 17
MAX_DIMS = 4
DEFAULT_ALIGNMENT = 32
CLAIMS = {
    "block_count": "num_hidden_layers",
    "vocab_size": "vocab_size",
    "ggml.tokens": "vocab_size",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.key_length": "head_dim",
    "rope.dimension_count": "head_dim",
    "expert_count": "num_experts",
    "expert_feed_forward_length": "moe_intermediate_size",
}
"""Sizes in the metadata, after the architecture's name, and what `config.json` calls them."""


@dataclass
class GgufHeader:
    """What a header says: integers and lengths of arrays by name, and the number of tensors and of their elements."""

    numbers: dict[str, int] = field(default_factory=dict)
    tensors: int = 0
    elements: int = 0


def check_gguf(path: Path) -> None:
    """Check that a `.gguf` file holds all that its header says, and a model no larger than its weights.

    Raises `ModelError`.
    """
    try:
        with open(path, "rb", opener=files.regular) as file:
            header = _Parser(file).header()
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read as a GGUF model: {error}.") from None
    claimed = dict.fromkeys(CLAIMS.values(), 0)
    for key, name in CLAIMS.items():
        claimed[name] = max(claimed[name], header.numbers.get(key, 0))
    check_claims(str(path), claimed, header.tensors, header.elements)


class _Parser:
    """Reads a header once from its beginning to its end; `ValueError` says what is wrong with it."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.size = file, os.fstat(file.fileno()).st_size
        self.found, self.entries = GgufHeader(), 0

    def header(self) -> GgufHeader:
        if self.file.read(4) != MAGIC:
            raise ValueError("it does not begin with GGUF")
        if (version := self.integer(4)) not in VERSIONS:
            raise ValueError(f"its version is {version}, not 2 or 3 (or its byte order is that of another machine)")
        tensors, metadata = self.integer(8), self.integer(8)
        if tensors > MAX_TENSORS:
            raise ValueError(f"it claims {tensors:,} tensors")
        self.count(metadata)
        for _ in range(metadata):
            self.entry()
        self.found.tensors = tensors
        self.check_tensors([self.tensor() for _ in range(tensors)])
        return self.found

    def entry(self) -> None:
        """A name with its value."""
        name = self.text(MAX_NAME).decode(errors="replace").partition(".")[2]
        kind = self.integer(4)
        if kind == ARRAY:
            self.array(name)
        elif kind == TEXT:
            self.text()
        elif kind in SCALARS:
            data = self.exactly(SCALARS[kind])
            if kind in INTEGERS:
                self.found.numbers[name] = int.from_bytes(data, "little", signed=INTEGERS[kind])
        else:
            raise ValueError(f"{brief(name)} has the unknown type {kind}")

    def array(self, name: str) -> None:
        kind, length = self.integer(4), self.integer(8)
        self.count(length)
        if kind == TEXT:
            for _ in range(length):
                self.text()
        elif kind in SCALARS:
            data = self.exactly(SCALARS[kind] * length)
            if kind in INTEGERS and length:  # a size for each layer
                wide = SCALARS[kind]
                parts = (data[at : at + wide] for at in range(0, len(data), wide))
                self.found.numbers[name] = max(int.from_bytes(part, "little", signed=INTEGERS[kind]) for part in parts)
        else:
            raise ValueError(f"{brief(name)} is an array of the type {kind}, which no model has")
        if name == "ggml.tokens":
            self.found.numbers[name] = length

    def tensor(self) -> tuple[int, int, int]:
        """Elements, bytes and offset of a tensor."""
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

        name = self.text(MAX_NAME).decode(errors="replace")
        if (dims := self.integer(4)) > MAX_DIMS:
            raise ValueError(f"the tensor {brief(name)} has {dims:,} dimensions")
        elements = math.prod(self.integer(8) for _ in range(dims))
        kind = self.integer(4)
        if kind not in set(GGMLQuantizationType):
            raise ValueError(f"the tensor {brief(name)} has the unknown type {kind}")
        block, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        return elements, -(-elements // block) * size, self.integer(8)

    def check_tensors(self, tensors: list[tuple[int, int, int]]) -> None:
        alignment = self.found.numbers.get("alignment", DEFAULT_ALIGNMENT)
        if not 0 < alignment <= 1 << 16:
            raise ValueError(f"its alignment is {alignment:,}")
        room = self.size - -(-self.file.tell() // alignment) * alignment
        if any(offset + size > room for _, size, offset in tensors) or sum(size for _, size, _ in tensors) > room:
            raise ValueError("it is shorter than its tensors: it was cut off, or its header is wrong")
        self.found.elements = sum(elements for elements, *_ in tensors)

    # Parts ---------------------------------------------------------------------------------------------------

    def count(self, entries: int) -> None:
        """Count what a list of so many entries will take."""
        self.entries += entries
        if self.entries > MAX_ENTRIES:
            raise ValueError(f"it claims more than {MAX_ENTRIES:,} entries")

    def integer(self, size: int) -> int:
        return int.from_bytes(self.exactly(size), "little")

    def text(self, longest: int = MAX_TEXT) -> bytes:
        length = self.integer(8)
        if length > longest:
            raise ValueError(f"it claims a text of {length:,} bytes")
        return self.exactly(length)

    def exactly(self, size: int) -> bytes:
        data: Any = self.file.read(size)
        if len(data) != size:
            raise ValueError("it ends within its header: it was cut off, or a length in it is wrong")
        return bytes(data)
