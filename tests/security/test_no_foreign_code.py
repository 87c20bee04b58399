"""No code from outside ever runs: each of these would leave a mark on the disk if a single line of it did."""

from __future__ import annotations

import json
import pickle
import re
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from mole import models, runs
from mole.config import ModelConfig, RunConfig
from mole.core import checkpoint
from mole.core.errors import CheckpointError, DataError, InputError
from mole.data import Example, encode_example, read_examples

ROOT = Path(__file__).resolve().parents[2]
PICKLES = ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "rng_state_0.pth", "adapter_model.bin",
           "pytorch_model.bin")  # fmt: skip
ENDLESS = "{% for i in range(10**12) %}{% endfor %}"


class Marks:
    """Something that, when it is unpickled, writes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


@pytest.fixture
def mark(tmp_path: Path) -> Any:
    """The file that code from outside would write; afterwards it is not there."""
    path = tmp_path / "code-was-run"
    pickle.loads(pickle.dumps(Marks(path)))
    assert path.exists(), "the attack itself works"
    path.unlink()
    yield path
    assert not path.exists(), "code from outside was run"


@pytest.fixture
def base(tiny_folder: Path, tmp_path: Path) -> Path:
    """A base model of one's own to spoil."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "base"))


@pytest.fixture
def adapter(tiny_adapter: Path, tmp_path: Path) -> Path:
    """An adapter of one's own to spoil."""
    return Path(shutil.copytree(tiny_adapter, tmp_path / "adapter"))


def change(path: Path, **values: Any) -> None:
    """Put other values into a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}), encoding="utf-8")


def script(mark: Path, *classes: str) -> str:
    """A module that leaves its mark when it is imported."""
    made = "".join(f"\nclass {name}: pass\n" for name in classes)
    return f"import pathlib; pathlib.Path({str(mark)!r}).touch()\n{made}"


def refused(attempt: Callable[[], Any], kinds: type[Exception] | tuple[type[Exception], ...] = InputError) -> str:
    """The one line with which it is refused."""
    with pytest.raises(kinds) as caught:
        attempt()
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000
    return str(caught.value)


# ---------------------------------------------------------------------------------------------------------
# In the sources


def test_no_source_trusts_remote_code_or_reads_a_pickle() -> None:
    """By eye too: what would run something is not in this project's sources at all."""
    forbidden = re.compile(
        r"trust_remote_code\s*=\s*(?!False)|weights_only\s*=\s*False|\bpickle\b\s*[.(]|\btorch\.load\(|allow_pickle|joblib|"
        r"import (pickle|dill|cloudpickle|shelve|marshal)|\beval\((?!\))|\bexec\(|os\.system\(|shell\s*=\s*True|"
        r"yaml\.(unsafe_|full_)?load\((?!text, loader\))"
    )
    for path in [*(ROOT / "mole").rglob("*.py"), *(ROOT / "app").rglob("*.py")]:
        found = [
            line.strip()
            for line in path.read_text(encoding="utf-8").splitlines()
            if forbidden.search(line) and "nn.Module" not in line
        ]
        assert not found, (path, found)


def test_every_load_says_that_it_trusts_no_code() -> None:
    calls = 0
    for path in [*(ROOT / "mole").rglob("*.py"), *(ROOT / "app").rglob("*.py")]:
        text = path.read_text(encoding="utf-8")
        for found in re.finditer(r"\bAuto\w+\.from_(pretrained|config)\(", text):
            call = text[found.start() : found.start() + 400]
            assert "trust_remote_code=False" in call or "M.from_pretrained" in call, (path, call[:80])
            calls += 1
    assert calls >= 4


# ---------------------------------------------------------------------------------------------------------
# A base model's folder


def test_a_model_with_a_program_of_its_own(base: Path, mark: Path) -> None:
    """`auto_map` names the classes of a `.py` file beside the weights; transformers imports it where it is trusted."""
    for name in ("modeling_evil.py", "configuration_evil.py", "tokenization_evil.py", "__init__.py"):
        (base / name).write_text(script(mark, "Evil", "EvilConfig", "EvilTokenizer"), encoding="utf-8")
    places = {
        "AutoConfig": "configuration_evil.EvilConfig",
        "AutoModelForCausalLM": "modeling_evil.Evil",
        "AutoTokenizer": ["tokenization_evil.EvilTokenizer", "tokenization_evil.EvilTokenizer"],
    }
    change(base / "config.json", auto_map=places)
    change(base / "tokenizer_config.json", auto_map=places)
    models.load_base(ModelConfig(name=str(base), device="cpu"))  # a llama all the same, of transformers' own code
    change(base / "config.json", model_type="evil", architectures=["Evil"])
    assert "which is never run" in refused(lambda: models.load_base(ModelConfig(name=str(base), device="cpu")))


def test_a_tokenizer_with_a_program_of_its_own(base: Path, mark: Path) -> None:
    (base / "tokenization_evil.py").write_text(script(mark, "EvilTokenizer"), encoding="utf-8")
    places = {"AutoTokenizer": ["tokenization_evil.EvilTokenizer", None]}
    change(base / "tokenizer_config.json", auto_map=places, tokenizer_class="EvilTokenizer")
    (base / "tokenizer.json").unlink()
    refused(lambda: models.load_tokenizer(str(base)))


def test_a_gguf_file_beside_a_program(base: Path, mark: Path, home: Path) -> None:
    """What lies beside a `.gguf` file is not asked how to read it."""
    for name in ("modeling_evil.py", "tokenization_evil.py"):
        (base / name).write_text(script(mark, "Evil", "EvilTokenizer"), encoding="utf-8")
    change(base / "config.json", auto_map={"AutoModelForCausalLM": "modeling_evil.Evil"}, model_type="evil")
    change(base / "tokenizer_config.json", auto_map={"AutoTokenizer": ["tokenization_evil.EvilTokenizer", None]})
    for content in (b"GGUF\x03\0\0\0" + b"\0" * 64, b"", pickle.dumps(Marks(mark))):
        (base / "evil.gguf").write_bytes(content)
        refused(lambda: models.load_base(ModelConfig(name=str(base / "evil.gguf"), device="cpu")))


@pytest.mark.parametrize("where", ["evil/kernel", "evil/kernel@v1:module", "paged|evil/kernel"])
def test_a_model_that_asks_for_a_kernel_from_the_hub(base: Path, mark: Path, where: str) -> None:
    """Where the package `kernels` is installed, such a setting fetches compiled code and runs it."""
    change(base / "config.json", _attn_implementation=where, attn_implementation=where)
    assert "never run" in refused(lambda: models.load_base(ModelConfig(name=str(base), device="cpu")))


@pytest.mark.parametrize("also", [False, True])
def test_pickled_weights(base: Path, mark: Path, also: bool) -> None:
    """Alone they are refused; beside safetensors they are left alone."""
    for name in PICKLES:
        torch.save({"lm_head.weight": Marks(mark)}, base / name)
    if also:
        models.load_base(ModelConfig(name=str(base), device="cpu"))
        return
    (base / "model.safetensors").unlink()
    assert "only pickled weights" in refused(lambda: models.load_base(ModelConfig(name=str(base), device="cpu")))


def test_an_index_that_names_a_pickle(base: Path, mark: Path) -> None:
    torch.save({"lm_head.weight": Marks(mark)}, base / "evil.bin")
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "evil.bin", "model.norm.weight": "../base/evil.bin"}}
    for name in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        (base / name).write_text(json.dumps(index), encoding="utf-8")
    (base / "model.safetensors").rename(base / "other.safetensors")
    refused(lambda: models.load_base(ModelConfig(name=str(base), device="cpu")))


# ---------------------------------------------------------------------------------------------------------
# Adapters and checkpoints


@pytest.mark.parametrize("also", [False, True])
def test_an_adapter_with_pickled_weights(adapter: Path, tiny_folder: Path, mark: Path, also: bool) -> None:
    for name in PICKLES:
        torch.save({"base_model.model.x": Marks(mark)}, adapter / name)
    loaded = models.load_base(ModelConfig(name=str(tiny_folder), device="cpu"))
    if also:
        assert models.attach(loaded, adapter).router == "dynmole"
        return
    (adapter / "adapter_model.safetensors").unlink()
    assert "only pickled weights" in refused(lambda: models.attach(loaded, adapter))


HOSTILE_ADAPTERS: dict[str, dict[str, Any]] = {
    "names a module to import": {"peft_type": "LORA", "megatron_config": {"x": 1}, "megatron_core": "evil_module"},
    "names its own classes": {"auto_mapping": {"base_model_class": "Evil", "parent_library": "evil_module"}},
    "wants a tokenizer's code": {
        "peft_type": "PROMPT_TUNING", "num_virtual_tokens": 2, "prompt_tuning_init": "TEXT",
        "prompt_tuning_init_text": "x", "tokenizer_name_or_path": "{folder}", "inference_mode": False,
        "tokenizer_kwargs": {"trust_remote_code": True},
    },
    "reads a pickle to begin with": {
        "peft_type": "MULTITASK_PROMPT_TUNING", "num_virtual_tokens": 2, "num_tasks": 1,
        "prompt_tuning_init": "AVERAGE_SOURCE_TASKS", "prompt_tuning_init_state_dict_path": "{folder}/evil.bin",
    },
    "caches a pickle": {
        "peft_type": "LORA", "r": 2, "target_modules": ["q_proj"], "init_lora_weights": "corda",
        "corda_config": {"cache_file": "{folder}/evil.bin", "covariance_file": "{folder}/evil.bin"},
    },
    "is made of others": {"peft_type": "XLORA", "hidden_size": 32, "adapters": {"0": "{folder}", "1": "evil/adapter"}},
    "is of no kind": {"peft_type": "os.system", "task_type": "__import__('os')"},
}  # fmt: skip


@pytest.mark.parametrize("kind", HOSTILE_ADAPTERS)
def test_an_adapter_whose_settings_would_run_something(
    kind: str, adapter: Path, tiny_folder: Path, mark: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether it is refused or loads without that: nothing it names is imported, unpickled or fetched."""
    (adapter / "evil_module.py").write_text(script(mark, "Evil"), encoding="utf-8")
    torch.save({"prompt_embeddings": Marks(mark)}, adapter / "evil.bin")
    monkeypatch.syspath_prepend(str(adapter))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    text = json.dumps(HOSTILE_ADAPTERS[kind]).replace("{folder}", str(adapter))
    change(adapter / "adapter_config.json", **json.loads(text))
    loaded = models.load_base(ModelConfig(name=str(tiny_folder), device="cpu"))
    try:
        models.attach(loaded, adapter)
    except InputError as error:
        assert "\n" not in str(error)
    else:
        assert kind == "names its own classes"


def test_a_checkpoint_with_pickles(home: Path, tiny_folder: Path, mark: Path, tmp_path: Path) -> None:
    """Added to a checkpoint they make it a broken one; with a manifest that lists them they are not looked at."""
    from mole.training.trainer import train

    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps({"prompt": f"a {n}", "completion": f"b {n}"}) for n in range(12)))
    run = runs.create(
        RunConfig.from_dict(
            {
                "name": "spoilt",
                "model": {"name": str(tiny_folder), "device": "cpu", "dtype": "float32"},
                "data": {"path": str(rows), "eval_fraction": 0.1, "max_length": 32},
                "adapter": {"num_experts": 2, "r": 2, "target_modules": ["q_proj"]},
                "training": {"max_steps": 2, "save_steps": 1, "per_device_train_batch_size": 2, "save_total_limit": 9},
            }
        )
    )
    run.append_event("queued", 0)
    train(run)
    for number, folder in checkpoint.steps(run.checkpoints_dir):
        for name in PICKLES:
            torch.save(Marks(mark), folder / name)
        with pytest.raises(CheckpointError, match="not in its manifest"):
            checkpoint.verify(folder)
        if number == 1:
            manifest = checkpoint.read_manifest(folder)
            (folder / checkpoint.MANIFEST).unlink()
            checkpoint._seal(folder, 1, manifest.meta)
        else:
            shutil.rmtree(folder)
    shutil.rmtree(run.adapter_dir)
    train(run, resume=True)
    started = [event["resumed_from"] for event in run.events() if event["type"] == "started"]
    assert started == [None, "step-1"]


# ---------------------------------------------------------------------------------------------------------
# Data


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".pkl", ".pickle", ".pt", ".arrow", ".py", ".h5", ""])
def test_files_of_other_kinds_are_not_opened(tmp_path: Path, mark: Path, suffix: str) -> None:
    path = tmp_path / f"rows{suffix}"
    if suffix == ".npy":
        numpy.save(path, numpy.array([Marks(mark)], dtype=object), allow_pickle=True)
    else:
        path.write_bytes(pickle.dumps(Marks(mark)))
    assert "known suffixes" in refused(lambda: read_examples(str(path)), DataError)


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv", ".parquet"])
def test_a_pickle_that_is_called_a_data_file(tmp_path: Path, mark: Path, suffix: str) -> None:
    path = tmp_path / f"rows{suffix}"
    path.write_bytes(pickle.dumps(Marks(mark)))
    refused(lambda: read_examples(str(path)), DataError)


@pytest.mark.parametrize("name", ["evil", "owner/evil", "./evil"])
def test_a_data_set_with_a_script(
    tmp_path: Path, mark: Path, home: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder in reach of a hub id's name is not taken for the data set, and its script not for a program."""
    folder = tmp_path / name
    folder.mkdir(parents=True)
    (folder / "evil.py").write_text(script(mark), encoding="utf-8")
    (folder / "rows.jsonl").write_text('{"text": "x"}\n', encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "is a folder" in refused(lambda: read_examples(name), DataError)


@pytest.mark.parametrize("name", ["pandas", "json", "text", "imagefolder", "webdataset", "generator", "cache"])
def test_the_names_of_the_library_s_own_readers_are_no_data_sets(name: str, tmp_path: Path, mark: Path) -> None:
    """Some of those read pickles, and look for files in the folder they are started in."""
    (tmp_path / "rows.pkl").write_bytes(pickle.dumps(Marks(mark)))
    refused(lambda: read_examples(name), DataError)


# ---------------------------------------------------------------------------------------------------------
# Chat templates


HOSTILE_TEMPLATES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ ''['__class__'] }}{{ (''|attr('__class__')).__mro__ }}",
    "{{ cycler.__init__.__globals__.os.popen('touch MARK').read() }}",
    "{{ lipsum.__globals__['os'].system('touch MARK') }}",
    "{{ self._TemplateReference__context.environment.from_string('x') }}",
    "{{ raise_exception.__globals__ }}",
    "{{ messages.append(1) }}{{ messages[0].update({'x': 1}) }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}{{ os }}",
    "{{ ('x' * 10).format.__globals__ }}{{ '{0.__class__.__base__}'.format('') }}",
    "{{ '%s' | format(messages.__class__.__base__.__subclasses__) }}",
    "{{ raise_exception('no') }}",
    "{{ 1 / 0 }}",
    "{{ ",
    ENDLESS,
]


@pytest.mark.parametrize("template", HOSTILE_TEMPLATES, ids=lambda text: text[:30])
@pytest.mark.parametrize("place", ["tokenizer_config.json", "chat_template.jinja"])
def test_a_hostile_chat_template(base: Path, mark: Path, template: str, place: str) -> None:
    """It runs in a sandbox that has no way out and no endless `range`; its failing is the row's, in one line."""
    template = template.replace("MARK", str(mark))
    (base / "chat_template.jinja").unlink(missing_ok=True)
    if place == "tokenizer_config.json":
        change(base / place, chat_template=template)
    else:
        (base / place).write_text(template, encoding="utf-8")
    tokenizer = models.load_tokenizer(str(base))
    example = Example(messages=({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}))
    told: list[str] = []
    worker = threading.Thread(
        target=lambda: told.append(refused(lambda: encode_example(example, tokenizer, 64), DataError)), daemon=True
    )
    worker.start()
    worker.join(120)
    assert told, "a template that should fail at once took for ever, or did not fail"
