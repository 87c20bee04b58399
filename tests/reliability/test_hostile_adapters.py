"""Bad adapter folders: what is loaded is whole and finite; all else is refused in one line, and no code of it runs."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hostile import answer, attack, check_line, damaged, junk, mutated, nothing_written, real, refusal
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_hostile_data import as_json

from mole.chat.model_cache import cache_keys
from mole.config import ModelConfig
from mole.core import checkpoint
from mole.core.errors import DataError, MoleError
from mole.models import sizes
from mole.models.loading import Base, Loaded, attach, load_base
from mole.runs.targets import load_target, locate

CPU = ModelConfig(device="cpu", dtype="float32")
WEIGHTS, SETTINGS = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture
def folder(tmp_path: Path, tiny_adapter: Path) -> Path:
    """A good adapter to be spoiled."""
    return Path(shutil.copytree(tiny_adapter, tmp_path / "adapter"))


@pytest.fixture
def tensors(folder: Path) -> dict[str, Any]:
    return load_file(folder / WEIGHTS)


def load(folder: Path) -> Any:
    """The adapter, which then answers with finite numbers, or the line that refuses it."""
    found = answer(lambda: load_target(str(folder), CPU), MoleError)
    if isinstance(found, Loaded):
        with torch.no_grad():
            assert found.model(input_ids=torch.tensor([[5, 6, 7]])).logits.isfinite().all()
    return found


def refused(folder: Path, *words: str) -> None:
    line = str(refusal(lambda: load_target(str(folder), CPU), MoleError))
    for word in words:
        assert word in line


def test_the_good_one_loads(folder: Path) -> None:
    assert isinstance(load(folder), Loaded)


# Weights


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_single_weight_that_is_no_number_is_refused(folder: Path, tensors: dict[str, Any], value: float) -> None:
    name = sorted(tensors)[-1]
    tensors[name].view(-1)[3] = value
    save_file(tensors, folder / WEIGHTS)
    refused(folder, name, "not finite")


SPOILERS: dict[str, Callable[[dict[str, Any], str], Any]] = {
    "missing": lambda tensors, name: tensors.pop(name),
    "all missing": lambda tensors, name: tensors.clear(),
    "one too many": lambda tensors, name: tensors.update({"base_model.model.extra.weight": torch.ones(2)}),
    "another name": lambda tensors, name: tensors.update({name.replace("mole", "mule"): tensors.pop(name)}),
    "transposed": lambda tensors, name: tensors.update({name: tensors[name].T.contiguous()}),
    "flat": lambda tensors, name: tensors.update({name: tensors[name].reshape(-1)}),
    "empty": lambda tensors, name: tensors.update({name: torch.zeros(0, 0)}),
    "a number": lambda tensors, name: tensors.update({name: torch.tensor(1.0)}),
    "a row too many": lambda tensors, name: tensors.update({name: torch.cat([tensors[name], tensors[name][:1]])}),
}


@pytest.mark.parametrize("how", SPOILERS)
def test_weights_that_do_not_fit_are_refused(folder: Path, tensors: dict[str, Any], how: str) -> None:
    name = next(name for name in sorted(tensors) if "mole_studio_A" in name)
    SPOILERS[how](tensors, name)
    save_file(tensors, folder / WEIGHTS)
    refused(folder)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_weights_of_another_precision_load(folder: Path, tensors: dict[str, Any], dtype: Any) -> None:
    save_file({name: tensor.clamp(-9, 9).to(dtype) for name, tensor in tensors.items()}, folder / WEIGHTS)
    assert isinstance(load(folder), Loaded)


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.complex64])
def test_weights_that_are_no_fractions_are_refused(folder: Path, tensors: dict[str, Any], dtype: Any) -> None:
    save_file({name: tensor.to(dtype) for name, tensor in tensors.items()}, folder / WEIGHTS)
    refused(folder)


@pytest.mark.parametrize(
    "content",
    [b"", b"\x00" * 8, b"\xff" * 8, (2**40).to_bytes(8, "little") + b"{}", (2).to_bytes(8, "little") + b"[]",
     (9).to_bytes(8, "little") + b'{"a": 1} ', b"PK\x03\x04" + b"\x00" * 60, pickle.dumps({"a": 1})],
)  # fmt: skip
def test_a_file_that_is_no_safetensors_is_refused(folder: Path, content: bytes) -> None:
    (folder / WEIGHTS).write_bytes(content)
    refused(folder)
    assert sizes.parameters([folder / WEIGHTS]) == 0


class Trap:
    """Makes a file when it is unpickled."""

    def __reduce__(self) -> Any:
        return os.system, ("touch ran",)


def test_pickled_weights_are_refused_unread(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    (folder / WEIGHTS).unlink()
    for name in ("adapter_model.bin", "training_args.bin", "optimizer.pt"):
        (folder / name).write_bytes(pickle.dumps(Trap()))
    refused(folder, "pickled")
    assert not (folder / "ran").exists()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, tiny_adapter: Path) -> Path:
    """One folder for many cases."""
    return Path(shutil.copytree(tiny_adapter, tmp_path_factory.mktemp("spoiled") / "adapter"))


@attack(60)
@given(data=st.data())
def test_damaged_bytes_of_weights_are_refused_or_load_whole(shared: Path, tiny_adapter: Path, data: Any) -> None:
    shutil.copytree(tiny_adapter, shared, dirs_exist_ok=True)
    content = (shared / WEIGHTS).read_bytes()
    head = 8 + int.from_bytes(content[:8], "little")
    (shared / WEIGHTS).write_bytes(data.draw(damaged(content[:head])) + content[head:])
    found = load(shared)
    assert sizes.parameters([shared / WEIGHTS]) >= 0
    assert isinstance(found, (Loaded, MoleError))


# Settings


@attack(60)
@given(data=st.data())
def test_hostile_settings_are_refused_or_load_whole(shared: Path, tiny_adapter: Path, data: Any) -> None:
    shutil.copytree(tiny_adapter, shared, dirs_exist_ok=True)
    good = json.loads((tiny_adapter / SETTINGS).read_text())
    (shared / SETTINGS).write_text(as_json(data.draw(mutated(good))))
    with nothing_written(shared):
        found = load(shared)
    if isinstance(found, Loaded):
        assert isinstance(found.router, str)
    answer(lambda: cache_keys(str(shared), CPU), MoleError)


HOSTILE: dict[str, Any] = {
    "r": [10**9, 10**12, -1, 0, 10**400, "8", None, 2.5, [2], True],
    "num_experts": [10**9, [10**9, 3], -3, [], [[3]], "3", None, {"a": 1}],
    "lambda_hidden": [10**12],
    "lora_alpha": [1e308, -1, "nan", None],
    "peft_type": ["LORA", "MOLE", "NOTHING", "", None, 5, ["MOLE_STUDIO"], "../MOLE_STUDIO", "XLORA", "PROMPT_TUNING"],
    "base_model_name_or_path": [
        "", None, 5, ["a"], {"a": 1}, "/etc/passwd", "/dev/zero", "../..", "~nobody-here", "a\x00b", "x" * 5000,
        "\ud800", "/", ".", "pickle.pkl", "no such model at all",
    ],
    "auto_mapping": [{"base_model_class": "system", "parent_library": "os"}, {"base_model_class": "x"}, "os", 5],
    "target_modules": ["(a+)+$", "[", "*", [], None, 5, ["nothing"], {"a": 1}, "x" * 9999, ["embed_tokens"], ["model"]],
    "task_type": ["os.system", 5, None, "SEQ_CLS"],
    "router": ["none", 5, None, [1], {"a": 1}, "topk", "../x", "lora"],
    "trust_remote_code": [True], "auto_map": [{"AutoModel": "evil.py--Evil"}], "custom_code": ["import os"],
    "layers_to_transform": [[10**9], "x"], "modules_to_save": [["lm_head"], ["model"], ["e"], "x", 5],
    "layers_pattern": ["(a+)+$", "[", [5], "layers"], "bias": ["all", "lora_only", "x", 5, None],
    "trainable_token_indices": [[10**9], [-1], [0], [0] * 20_000, "x", 5, {"lm_head": [0]}, {"(a+)+$": [0]}, {"a": 1}],
    "target_parameters": [["weight"], "x"], "inference_mode": ["x", 5], "peft_version": [5, "99.0"],
    "entropy_index": [0, -1, 1e308, "x"], "revision": ["x", 5, "../.."],
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_every_hostile_value_is_refused_or_loads_whole(
    name: str, folder: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    good = json.loads((folder / SETTINGS).read_text())
    for value in HOSTILE[name]:
        (folder / SETTINGS).write_text(json.dumps({**good, name: value}) if value != 10**400 else "{}")
        with nothing_written(folder, home):
            load(folder)


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"5", b"null", b"\xff\xfe", b"{", b"[" * 200_000, b'{"r":' * 99_999,
     b'{"r": ' + b"9" * 5000 + b"}"],
)  # fmt: skip
def test_settings_that_are_none_are_refused(folder: Path, content: bytes) -> None:
    (folder / SETTINGS).write_bytes(content)
    refused(folder)


# The folder itself


def test_code_beside_the_weights_is_never_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("adapter_model.py", "configuration.py", "modeling.py", "__init__.py", "handler.py"):
        (folder / name).write_text("open('ran', 'w')")
    monkeypatch.chdir(folder)
    load(folder)
    assert not (folder / "ran").exists()


def test_links_and_pipes_in_a_folder(folder: Path, tmp_path: Path) -> None:
    weights = (folder / WEIGHTS).rename(tmp_path / "elsewhere.safetensors")
    for target in ("/dev/zero", "/etc/passwd", "/proc/self/environ", "/", str(folder), "nowhere", WEIGHTS):
        (folder / WEIGHTS).symlink_to(target)
        refused(folder)
        (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).symlink_to(weights)  # as the hub's cache does
    assert isinstance(load(folder), Loaded)
    (folder / WEIGHTS).unlink()
    os.mkfifo(folder / WEIGHTS)
    refused(folder)
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).mkdir()
    refused(folder)


@pytest.mark.parametrize(
    "template",
    [
        b"", b"{% for", b"{{ 1/0 }}", b"{{ messages[99].x.y }}", b"\xff\xfe", b"{{ ''.__class__.__mro__ }}",
        b"{{ raise_exception('no') }}", b"{{ (messages * 2)[0]['role'] + 1 }}", b"{{ '%s' % (1, 2) }}",
        b"{{ 9 | nope }}",
    ],
)  # fmt: skip
def test_a_hostile_chat_template_is_refused_in_one_line(folder: Path, template: bytes) -> None:
    from mole.data import render_prompt

    (folder / "chat_template.jinja").write_bytes(template)
    found = load(folder)
    if isinstance(found, Loaded):
        text = answer(lambda: render_prompt([{"role": "user", "content": "Hi"}], found.tokenizer))
        assert isinstance(text, (str, DataError))
        assert "class" not in str(text)[:6]


@attack(60)
@given(data=st.data())
def test_a_manifest_of_any_content_is_verified_or_refused(shared: Path, tiny_adapter: Path, data: Any) -> None:
    shutil.copytree(tiny_adapter, shared, dirs_exist_ok=True)
    (shared / checkpoint.MANIFEST).unlink(missing_ok=True)
    good = {"version": 1, "step": 3, "files": {WEIGHTS: {"sha256": "0", "size": 1}}, "meta": {}}
    values = data.draw(mutated(good))
    if isinstance(values, dict):
        with contextlib.suppress(TypeError, ValueError):
            values["checksum"] = checkpoint._checksum(values)
    (shared / checkpoint.MANIFEST).write_text(as_json(values))
    try:
        check_line(str(refusal(lambda: checkpoint.verify(shared), MoleError)))
        refused(shared)
    finally:
        (shared / checkpoint.MANIFEST).unlink()


def test_a_refused_adapter_leaves_the_next_one_unharmed(folder: Path, tiny_adapter: Path, tensors: Any) -> None:
    base: Base = load_base(ModelConfig(name=locate(str(folder))[0], device="cpu", dtype="float32"))
    tensors[sorted(tensors)[0]].fill_(float("nan"))
    save_file(tensors, folder / WEIGHTS)
    refusal(lambda: attach(base, folder), MoleError)
    with torch.no_grad():
        logits = attach(base, tiny_adapter).model(input_ids=torch.tensor([[5, 6]])).logits
    assert logits.isfinite().all()


@attack(40)
@given(junk)
def test_any_json_as_settings_is_refused(shared: Path, value: Any) -> None:
    (shared / SETTINGS).write_text(as_json(value if value != real(value) or not isinstance(value, str) else {}))
    assert isinstance(load(shared), MoleError)
