"""What the tests share: a tiny tokenizer and tiny random models, a private MOLE_HOME, and the embedded model.

def test_something(tiny_model, tiny_tokenizer):
    model = tiny_model("qwen3")                     # fresh, seeded, in eval mode: 2 layers, hidden width 32

def test_a_run(home, tiny_folder):                  # $MOLE_HOME is this test's own folder; the base is on disk
def test_of_auto(auto_dtype):                       # auto_dtype("float32") or ("bfloat16"): what it takes on a CPU
def test_the_real_one(embedded):                    # Base of SmolLM2-135M-Instruct, shared: leave it as it was
def test_a_real_run(embedded_home):                 # `home` in which smollm2-135m is already converted
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from browsing import browser, open_page, page, pytest_runtest_makereport, windows
from serving import shared_studio, studio, studio_with_model

__all__ = [
    "browser", "open_page", "page", "pytest_runtest_makereport", "shared_studio", "studio", "studio_with_model",
    "windows",
]  # fmt: skip

ENVIRONMENT = {
    "MOLE_COMPILE": "0",  # tests that want compiled functions say so: making them takes long
    "OMP_NUM_THREADS": "1",  # torch's threads wait for each other by spinning, in the way of what runs beside them
}
"""The environment of the tests and of all that they start, unless a test says otherwise."""
for _number, _handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(_number) is signal.SIG_IGN:  # `nohup make test &` would hand it on to all that the tests start
        signal.signal(_number, _handler)
SLOWEST_FIRST = ("reliability", "security", "ui", "unit", "parity")
"""The folders in the order in which workers take their files, so that no long file begins when the others end."""

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CORPUS = [
    "Convert 3 km to metres. Sort these words: pear, apple, fig. Is the tone of this sentence friendly or rude?",
    "The quick brown fox jumps over the lazy dog; 0 1 2 3 4 5 6 7 8 9 are the digits of every number.",
    "user assistant system question answer yes no true false: what is the capital of France? Paris.",
] * 4


def pytest_configure(config: pytest.Config) -> None:
    """Set the environment before any test module imports torch."""
    patch = pytest.MonkeyPatch()
    config.add_cleanup(patch.undo)
    for name, value in ENVIRONMENT.items():
        patch.setenv(name, value)


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """Bytes never name a test: what gzip and zip write changes with the time, and workers must agree on names."""
    return argname if isinstance(val, bytes) else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the folders in order."""
    here = Path(__file__).parent
    place = {folder: number for number, folder in enumerate(SLOWEST_FIRST)}
    items.sort(key=lambda item: place.get(item.path.relative_to(here).parts[0], len(place)))


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all workers of this session, to keep in it what is made once."""
    folder = tmp_path_factory.getbasetemp()
    return folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder


@pytest.fixture(scope="session")
def functions_home(shared_folder: Path) -> Path:
    """A $MOLE_HOME for compiled functions, which are named by their content: $MOLE_TEST_CACHE between sessions."""
    folder = Path(os.environ.get("MOLE_TEST_CACHE") or shared_folder / "functions")
    (folder / "compiled").mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Any:
    """A byte-level BPE of about 400 tokens with a ChatML template: any text round-trips; eos is <|im_end|>."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token="<|endoftext|>",
        chat_template=CHATML,
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


@pytest.fixture(scope="session")
def tiny_model(tiny_tokenizer: Any) -> Callable[..., Any]:
    """`tiny_model(arch="llama", layers=2, seed=0)`: a random llama, qwen3, gemma3, gpt2 or phi in eval mode."""
    import torch
    import transformers as hf

    shared: dict[str, Any] = {
        "vocab_size": len(tiny_tokenizer),
        "bos_token_id": tiny_tokenizer.bos_token_id,
        "eos_token_id": tiny_tokenizer.eos_token_id,
        "pad_token_id": tiny_tokenizer.pad_token_id,
    }
    width: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
    }
    grouped = {**width, "num_key_value_heads": 2, "head_dim": 8}
    gpt2 = {"n_embd": 32, "n_head": 4, "n_positions": 512, "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}

    def make(arch: str = "llama", layers: int = 2, seed: int = 0) -> Any:
        config: Any = {
            "llama": lambda: hf.LlamaConfig(**shared, **grouped, num_hidden_layers=layers),
            "qwen3": lambda: hf.Qwen3Config(**shared, **grouped, num_hidden_layers=layers),
            "gemma3": lambda: hf.Gemma3TextConfig(**shared, **grouped, num_hidden_layers=layers, sliding_window=64),
            "gpt2": lambda: hf.GPT2Config(**shared, **gpt2, n_layer=layers),
            "phi": lambda: hf.PhiConfig(**shared, **width, num_hidden_layers=layers),
        }[arch]()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return hf.AutoModelForCausalLM.from_config(config).eval()

    return make


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[..., Any], tiny_tokenizer: Any) -> Path:
    """A local base model folder (tiny llama, safetensors, tokenizer): what `model.name` may be in a run."""
    folder = tmp_path_factory.mktemp("base") / "tiny-llama"
    tiny_model("llama").save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def make_adapter(
    tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path, tiny_tokenizer: Any
) -> Callable[..., Path]:
    """`make_adapter(**settings)`: an adapter folder on `tiny_folder`, so strong that it changes the output."""
    import torch
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    from mole import MoleConfig

    def make(**settings: Any) -> Path:
        config = MoleConfig(r=2, lora_alpha=8, task_type="CAUSAL_LM", **settings)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_folder), config)
            for parameter in model.parameters():
                if parameter.requires_grad:
                    torch.nn.init.normal_(parameter, std=0.5)
        folder = tmp_path_factory.mktemp("adapters") / f"tiny-{config.router}"
        model.save_pretrained(str(folder))
        (folder / "chat_template.jinja").write_text(tiny_tokenizer.chat_template, encoding="utf-8")
        return folder

    return make


@pytest.fixture(scope="session")
def tiny_adapter(make_adapter: Callable[..., Path]) -> Path:
    """An adapter folder on `tiny_folder`: dynmole, 3 random experts of rank 2."""
    return make_adapter(router="dynmole", num_experts=3)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """This test's own $MOLE_HOME, also for the processes it starts."""
    folder = tmp_path / "mole-home"
    folder.mkdir()
    monkeypatch.setenv("MOLE_HOME", str(folder))
    return folder


@pytest.fixture
def auto_dtype(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """`auto_dtype("bfloat16")`: what `model.dtype` auto takes on a CPU, also in the processes that the test starts."""
    return lambda dtype: monkeypatch.setenv("MOLE_CPU_BFLOAT16", {"float32": "0", "bfloat16": "1"}[dtype])


@pytest.fixture(scope="session")
def embedded_folder(shared_folder: Path) -> Path:
    """The embedded model, converted once: in $MOLE_HOME/models when that was set outside, else for this session."""
    from mole import models

    outside = os.environ.get("MOLE_HOME")
    cache = Path(outside) / "models" if outside else shared_folder / "models"
    return models.convert_embedded(cache / models.EMBEDDED)


@pytest.fixture(scope="session")
def embedded(embedded_folder: Path) -> Any:
    """The real SmolLM2-135M-Instruct as a `models.Base` in float32 on the CPU; shared, so leave it as you found it."""
    from mole import models
    from mole.config import ModelConfig

    return models.load_base(ModelConfig(name=str(embedded_folder), dtype="float32", device="cpu"))


@pytest.fixture
def embedded_home(home: Path, embedded_folder: Path) -> Path:
    """`home` in which `smollm2-135m` is already converted."""
    from mole import models

    (home / "models").mkdir()
    (home / "models" / models.EMBEDDED).symlink_to(embedded_folder, target_is_directory=True)
    return home
