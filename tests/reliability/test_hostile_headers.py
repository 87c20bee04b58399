"""Headers of weight files, damaged everywhere: loaded, or refused in one line in little time and memory."""

from __future__ import annotations

import json
import random
import resource
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hostile import TIMES, answer, refusal

from mole.config import ModelConfig
from mole.core.errors import ModelError, MoleError
from mole.models import sizes, sources
from mole.models.adapter_files import AdapterFiles
from mole.models.gguf import write_converted
from mole.models.gguf_header import _Parser, check_gguf
from mole.models.loading import Base, load_base

CASES = 2_000 * TIMES
CONVERTED = 40 * TIMES
"""Damaged `.gguf` files with a header that holds together: so many are converted, which takes longer."""
SECONDS = 2.0
"""For one case."""
MEMORY = 512 << 20
"""Bytes that all cases together may add to the process; the headers claim up to 2⁶⁴."""
SIZES = [0, 1, 2, 3, 4, 5, 8, 9, 12, 13, 24, 31, 64, 255, 2**21, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 10**12,
         2**53, 2**63 - 1, 2**63, 2**64 - 1]  # fmt: skip
Draw = random.Random


@contextmanager
def little_memory() -> Iterator[None]:
    """Fail when what is within takes much memory."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    yield
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10) - before < MEMORY


def quick(action: Callable[[], Any]) -> Any:
    """What the action gives or is refused with, within the time for one case."""
    begun = time.process_time()
    found = answer(action, MoleError)
    assert time.process_time() - begun < SECONDS
    return found


def test_the_two_libraries_are_imported_before_time_is_measured(tiny_folder: Path, small_gguf: Path) -> None:
    assert isinstance(load_base(on_cpu(tiny_folder)), Base)
    write_converted(small_gguf, small_gguf.parent)
    assert isinstance(load_base(on_cpu(small_gguf.parent)), Base)


def on_cpu(folder: Path) -> ModelConfig:
    return ModelConfig(name=str(folder), device="cpu", dtype="float32")


# GGUF


@pytest.fixture(scope="module")
def small_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama of one layer with a tokenizer of a hundred tokens."""
    path = tmp_path_factory.mktemp("gguf") / "small.gguf"
    tokens = ["<|end|>", *map(chr, range(33, 127)), "Ġ", "Ċ", "he", "ll"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("small")
    for add, value in (
        (writer.add_block_count, 1), (writer.add_context_length, 64), (writer.add_embedding_length, 16),
        (writer.add_feed_forward_length, 16), (writer.add_head_count, 2), (writer.add_head_count_kv, 2),
        (writer.add_rope_dimension_count, 8), (writer.add_vocab_size, len(tokens)), (writer.add_bos_token_id, 0),
        (writer.add_eos_token_id, 0), (writer.add_tokenizer_model, "gpt2"), (writer.add_tokenizer_pre, "smollm"),
        (writer.add_token_list, tokens), (writer.add_token_types, [3] + [1] * (len(tokens) - 1)),
        (writer.add_token_merges, ["h e", "l l"]), (writer.add_layer_norm_rms_eps, 1e-5),
    ):  # fmt: skip
        add(value)  # type: ignore[operator]
    matrices = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    shapes = {"token_embd": (len(tokens), 16), "output_norm": (16,), "blk.0.attn_norm": (16,), "blk.0.ffn_norm": (16,)}
    for name, shape in {**shapes, **{f"blk.0.{name}": (16, 16) for name in matrices}}.items():
        writer.add_tensor(f"{name}.weight", np.full(shape, 0.1, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


class Places(_Parser):
    """Notes where each part of a header is: its offset and its bytes."""

    def exactly(self, size: int) -> bytes:
        self.parts = [*getattr(self, "parts", []), (self.file.tell(), size)]
        return super().exactly(size)


def damaged_gguf(good: bytes, parts: list[tuple[int, int]], draw: Draw) -> bytes:
    """The file with some of its numbers replaced, bytes of its header changed, lost or doubled, or cut off."""
    data, end = bytearray(good), sum(parts[-1])
    for _ in range(draw.choice([1, 1, 1, 2, 4])):
        way, at, size = draw.random(), draw.randrange(end), draw.randrange(64)
        if way < 0.6:
            at, size = draw.choice([part for part in parts if part[1] in (1, 2, 4, 8)])
            old = int.from_bytes(data[at : at + size], "little")
            new = draw.choice([*SIZES, old + 1, old - 1, old * 2, old ^ 1 << draw.randrange(8 * size)])
            data[at : at + size] = (new % (1 << 8 * size)).to_bytes(size, "little")
        elif way < 0.8:
            data[at] = draw.randrange(256)
        elif way < 0.85:
            return bytes(data[:at])
        elif way < 0.92:
            del data[at : at + size]
        else:
            data[at:at] = data[at : at + size]
    return bytes(data)


def test_a_gguf_header_is_believed_only_as_far_as_the_file_goes(small_gguf: Path, tmp_path: Path) -> None:
    with small_gguf.open("rb") as file:
        parser = Places(file)
        parser.header()
    good, draw, path = small_gguf.read_bytes(), random.Random(1), tmp_path / "damaged.gguf"
    sound = []
    with little_memory():
        for _ in range(CASES):
            path.write_bytes(damaged_gguf(good, parser.parts, draw))
            if quick(lambda: check_gguf(path)) is None:
                sound.append(path.read_bytes())
        assert CASES / 10 < len(sound) < CASES / 2, "values of the metadata may be anything"
        for content in sound[:CONVERTED]:
            path.write_bytes(content)
            quick(lambda: write_converted(path, tmp_path / "converted"))
            shutil.rmtree(tmp_path / "converted", ignore_errors=True)


def metadata(*entries: bytes) -> bytes:
    """A file that is nothing but metadata."""
    return b"GGUF" + (3).to_bytes(4, "little") + bytes(8) + len(entries).to_bytes(8, "little") + b"".join(entries)


def entry(name: str, kind: int, value: bytes) -> bytes:
    return len(name).to_bytes(8, "little") + name.encode() + kind.to_bytes(4, "little") + value


def array(kind: int, length: int, value: bytes = b"") -> bytes:
    return kind.to_bytes(4, "little") + length.to_bytes(8, "little") + value


ENDLESS = {
    "an array without end": metadata(entry("a", 9, array(0, 2**63))),
    "an array of arrays": metadata(entry("a", 9, array(9, 1, array(9, 1) * 100_000))),
    "an array as long as memory": metadata(entry("a", 9, array(0, 5_000_000, bytes(5_000_000)))),
    "many texts of nothing": metadata(entry("a", 9, array(8, 10**9, bytes(8_000)))),
    "a text without end": metadata(entry("a", 8, (2**64 - 1).to_bytes(8, "little"))),
    "metadata without end": metadata()[:16] + (2**64 - 1).to_bytes(8, "little"),
    "tensors without end": metadata()[:8] + (2**64 - 1).to_bytes(8, "little") + bytes(8),
}


@pytest.mark.parametrize("what", ENDLESS)
def test_a_gguf_file_cannot_keep_its_reader_busy(what: str, tmp_path: Path) -> None:
    (tmp_path / "endless.gguf").write_bytes(ENDLESS[what])
    with little_memory():
        assert isinstance(quick(lambda: write_converted(tmp_path / "endless.gguf", tmp_path / "to")), ModelError)


def test_a_gguf_file_without_some_weights_is_not_filled_up_at_random(small_gguf: Path, tmp_path: Path) -> None:
    content = small_gguf.read_bytes().replace(b"blk.0.ffn_up.weight", b"blk.0.ffn_xx.weight")
    (tmp_path / "holes.gguf").write_bytes(content)
    line = str(refusal(lambda: write_converted(tmp_path / "holes.gguf", tmp_path / "to"), MoleError))
    assert "incomplete: it has no weights for model.layers.0.mlp.up_proj.weight" in line


# Safetensors

DTYPES = ["F32", "F16", "BF16", "F64", "I64", "U8", "BOOL", "F8_E4M3", "F4", "I1", "X", "", None, 5, "F128", "C64"]
VALUES: list[Any] = [*SIZES, -1, 10**30, 1.5, None, "8", [], {}, [[1]], True]
SHAPES: list[Any] = [[0, 2**63], [2**32, 2**32], [2**21] * 3, [1] * 1000, [8] * 20, [2**63, 2]]
NAMES = ["", "x" * 100_000, "\u202e", "a\n", "__metadata__", "lm_head.weight", "../a"]


def damaged_safetensors(good: bytes, draw: Draw) -> bytes:
    """The file with parts of its header replaced, gone, added, doubled or damaged, or a wrong length of the header."""
    size = int.from_bytes(good[:8], "little")
    header, body = json.loads(good[8 : 8 + size]), good[8 + size :]
    for _ in range(draw.choice([1, 1, 2, 4])):
        damage_header(header, len(body), draw)
    text, way = json.dumps(header), draw.random()
    if way < 0.1 and header:  # a key twice
        name, value = draw.choice(list(header.items()))
        text = f"{text[:-1]}, {json.dumps(name)}: {json.dumps(value)}}}"
    data = bytearray(text.encode())
    for _ in range(3 if way > 0.9 else 0):
        data[draw.randrange(len(data))] = draw.randrange(256)
    size = draw.choice([0, 1, 2, len(data) - 1, len(data) + 1, *SIZES]) if 0.1 < way < 0.2 else len(data)
    whole = size.to_bytes(8, "little") + bytes(data) + body
    return whole[: draw.randrange(len(whole))] if 0.2 < way < 0.25 else whole + b"x" * (0.25 < way < 0.3)


def damage_header(header: dict[str, Any], body: int, draw: Draw) -> None:
    """Change one part of a header."""
    name, way = draw.choice([*header, "__metadata__"]), draw.random()
    tensor = header.get(name)
    if not isinstance(tensor, dict) or way < 0.05:
        header[name] = draw.choice(VALUES)
    elif way < 0.1:
        header.pop(name, None)
    elif way < 0.15:
        header[draw.choice(NAMES)] = tensor
    elif way < 0.35:
        tensor["dtype"] = draw.choice(DTYPES)
    elif way < 0.9:
        key = draw.choice(["shape", "data_offsets"])
        values, chosen = tensor.get(key), [*VALUES, 256, body, body + 1]
        if isinstance(values, list) and values and draw.random() < 0.7:
            values[draw.randrange(len(values))] = draw.choice(chosen)
        else:
            tensor[key] = draw.choice([*VALUES, *SHAPES, [0], [5, 3], [0, body]])
    elif tensor:
        tensor.pop(draw.choice(list(tensor)))


def damaged_in_place(weights: Path, seed: int) -> Iterator[None]:
    """Put `CASES` damaged versions of a safetensors file in its place, one after the other."""
    good, draw = weights.read_bytes(), random.Random(seed)
    with little_memory():
        for _ in range(CASES):
            weights.write_bytes(damaged_safetensors(good, draw))
            yield


def test_a_base_models_safetensors_header_is_checked_before_it_is_used(tiny_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "base"))
    weights = folder / "model.safetensors"
    for _ in damaged_in_place(weights, seed=2):
        quick(lambda: load_base(on_cpu(folder)))
        assert sizes.parameters([weights]) < 10**6
        sources.fingerprint(folder)


def test_an_adapters_safetensors_header_is_checked_before_it_is_used(tiny_adapter: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_adapter, tmp_path / "adapter"))
    for _ in damaged_in_place(folder / "adapter_model.safetensors", seed=3):
        quick(lambda: AdapterFiles.read(folder))


@pytest.mark.parametrize("shard", ["../other.safetensors", "/etc/passwd", "a/b.safetensors", "pickle.bin", "", "."])
def test_an_index_names_files_of_its_own_folder_only(tiny_folder: Path, tmp_path: Path, shard: str) -> None:
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "base"))
    shutil.copy(folder / "model.safetensors", tmp_path / "other.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": shard}}))
    line = str(refusal(lambda: load_base(on_cpu(folder)), MoleError))
    assert "model.safetensors.index.json" in line and "no safetensors file of this folder" in line


# Settings that ask for more than the weights


def test_a_model_that_is_partly_downloaded_is_not_held_to_the_weights_that_are_there(
    tiny_folder: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "base"))
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "num_hidden_layers": 1_000}))
    source = sources.Source("folder", "partly", str(folder))
    refusal(lambda: sources.local_folder(source))
    shards = {"a": "model.safetensors", "b": "model-2.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    assert sources.local_folder(source, weights=False) == folder


CLAIMS: list[dict[str, Any]] = [
    {"num_hidden_layers": 10**9}, {"num_hidden_layers": 3_000}, {"num_hidden_layers": 1e9}, {"vocab_size": 10**12},
    {"hidden_size": 10**9}, {"intermediate_size": 10**11}, {"num_attention_heads": 2**31}, {"head_dim": 2**31},
    {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_positions": 10**9, "n_embd": 1024},
    {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "num_local_experts": 10**9},
    {"model_type": "gemma3", "text_config": {"num_hidden_layers": 10**9}},
]  # fmt: skip


@pytest.mark.parametrize("claim", CLAIMS, ids=str)
def test_a_config_asks_for_no_larger_model_than_its_weights(
    claim: dict[str, Any], tiny_folder: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "base"))
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, **claim}))
    with little_memory():
        found = quick(lambda: load_base(on_cpu(folder)))
    assert isinstance(found, ModelError) and "does not fit its own weights" in str(found)
