"""Finds base models: on the hub, in a local folder, in a `.gguf` file, or the embedded default. No torch.

Every model becomes a local folder of safetensors before it is loaded, so that loading never waits for the network,
never runs code and never unpickles.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mole.core import files, limits
from mole.core.errors import ModelError, brief
from mole.core.paths import local_path, models_dir
from mole.core.text import one_line
from mole.models.gguf import EMBEDDED, HUB_SECONDS, convert_embedded, convert_gguf, within
from mole.models.weights import check_model

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
HUB_FILES = (".json", ".safetensors", ".model", ".txt", ".jinja")
DUPLICATES = ("consolidated.safetensors",)
"""Copies of the same weights in the format of the authors' own code."""
QUANTISATION = ("quantization_config", "compression_config")
"""The parts of a `config.json` whose names of modules transformers, or the method's library, matches as patterns."""
PROSE = ("dataset", "meta", "version", "quantizer", "tokenizer")
"""The ends of keys there whose texts are no names."""
HARMLESS = re.compile(r"[^*+?{}|]*(\*[^*+?{}|)]*){0,2}")
"""A name or a pattern, such as `re:.*lm_head`, that Python's `re` matches in at most the square of a name's length."""
MOST_NAMES = 2000
"""Names in one list there; transformers compares each with every module."""
PICKLED = (".bin", ".pt", ".pth", ".ckpt")
SAMPLED = 1 << 20
"""Bytes at either end of a weight file that its fingerprint covers."""


@dataclass(frozen=True)
class Source:
    """A model that exists.

    Attributes:
        kind: embedded, folder, gguf or hub.
        name: as requested.
        location: a path, or the hub id of a model that must be downloaded first.
        revision, files: what to download from the hub.
    """

    kind: str
    name: str
    location: str
    revision: str | None = None
    files: tuple[str, ...] = ()


def resolve(name: str) -> Source:
    """Find a model by hub id, folder, `.gguf` file or `smollm2-135m`, without loading it.

    The hub's local cache is tried before the hub, which must answer within seconds. Raises `ModelError` if it is not
    found.
    """
    if name == EMBEDDED:
        return Source("embedded", name, str(models_dir() / EMBEDDED))
    path = local_path(name)
    if os.path.isdir(path):
        check_folder(path)
        return Source("folder", name, str(path))
    if os.path.isfile(path):
        if path.suffix.lower() != ".gguf":
            raise ModelError(f"{name} is a file, but no .gguf; give the folder that holds its config.json.")
        return Source("gguf", name, str(path))
    if not HUB_ID.fullmatch(name) or path.suffix.lower() == ".gguf":
        raise ModelError(f"There is no model at {name}: no such folder, and no such .gguf file.")
    return cached_from_hub(name) or find_on_hub(name)


def check_folder(folder: Path) -> None:
    """Check that a folder holds a model in safetensors. Raises `ModelError` naming what is missing."""
    if not (folder / "config.json").is_file():
        hint = " It contains an adapter: give its base model." if (folder / "adapter_config.json").is_file() else ""
        raise ModelError(f"The folder {folder} contains no model: it has no config.json.{hint}")
    for path in folder.iterdir():
        if not path.is_file() and not path.is_dir() and os.path.exists(path):  # opening a pipe would block
            raise ModelError(f"The folder {folder} contains {path.name}, which is a pipe or a device. Remove it.")
    missing = [shard for shard in shards(folder) if not (folder / shard).is_file()]
    if missing:
        raise ModelError(f"The model in {folder} is incomplete: {missing[0]} is missing. Download it again.")
    if any(folder.glob("*.safetensors")):
        return
    pickled = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLED)
    if pickled:
        raise ModelError(pickled_only(str(folder), pickled[0]))
    raise ModelError(f"The folder {folder} has a config.json but no weights (*.safetensors).")


def shards(folder: Path) -> list[str]:
    """Names of the weight files listed in the folder's index; empty without an index. Raises `ModelError`."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return []
    try:
        names = sorted({str(shard) for shard in files.read_json(index, files.regular)["weight_map"].values()})
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ModelError(f"{index} is not an index of weights: {one_line(error)}.") from None
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ModelError(f"{index} names {brief(name)}, which is no safetensors file of this folder.")
    return names


def pickled_only(where: str, file: str) -> str:
    """The message for a model that has only pickled weights."""
    return (
        f"{where} has only pickled weights ({file}); loading them can run code, so only safetensors are loaded. If you "
        f"trust them, convert them once in Python: from transformers import AutoModelForCausalLM as M; "
        f"M.from_pretrained({where!r}).save_pretrained({where.rpartition('/')[2] + '-safetensors'!r})"
    )


def cached_from_hub(name: str) -> Source | None:
    """A hub model if all of its files are in the local cache, else None."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(name, local_files_only=True))
        check_folder(folder)
    except (LocalEntryNotFoundError, HFValidationError, ModelError):
        return None
    return Source("hub", name, str(folder))


def find_on_hub(name: str) -> Source:
    """Look up a model on the hub. Raises `ModelError` if it does not exist or the hub does not answer in time."""
    from huggingface_hub import HfApi, errors

    neither = f"There is no folder {name} here, and"
    try:
        info = within(HUB_SECONDS + 2, lambda: HfApi().model_info(name, timeout=HUB_SECONDS))
    except errors.OfflineModeIsEnabled:
        raise ModelError(
            f"{neither} the hub is disabled (HF_HUB_OFFLINE) and {name} is not in its cache. {instead()}"
        ) from None
    except errors.GatedRepoError:
        raise ModelError(
            f"{name} is gated: accept its terms at https://huggingface.co/{name}, then log in with `hf auth login`."
        ) from None
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        raise ModelError(f"{neither} no model {name} on the hub (a private one needs `hf auth login`).") from None
    except Exception as error:
        raise ModelError(f"{neither} the hub cannot be reached ({one_line(error)}). {instead()}") from None
    names = [file.rfilename for file in info.siblings or []]
    files = tuple(file for file in names if "/" not in file and file.endswith(HUB_FILES) and file not in DUPLICATES)
    if "config.json" not in files:
        raise ModelError(f"{name} on the hub is not a base model: it has no config.json.")
    if not any(file.endswith(".safetensors") for file in files):
        pickled = next((file for file in names if file.endswith(PICKLED)), None)
        raise ModelError(pickled_only(name, pickled) if pickled else f"{name} on the hub has no *.safetensors.")
    return Source("hub", name, name, revision=info.sha, files=files)


def instead() -> str:
    """Advice for working without the hub."""
    return f"Give a local folder, a .gguf file, or {EMBEDDED}, which is embedded."


def local_folder(source: Source, progress: bool = False, *, weights: bool = True) -> Path:
    """The model's folder of safetensors, downloaded or converted first if needed.

    Without `weights`, a hub model's weights are not downloaded, which is enough for a tokenizer. Raises `ModelError` if
    the download or conversion fails, if the model requires code from the hub, or if it claims to be larger than it is.
    """
    folder = fetched(source, progress, weights)
    check_config(folder, source.name)
    # Of a model that is partly downloaded, some weights may be there.
    check_model(folder, source.name, complete=all((folder / shard).is_file() for shard in shards(folder)))
    return folder


def check_config(folder: Path, name: str) -> None:
    """Check that a model names no compiled kernels on the hub, which transformers would download and run, and nothing
    that transformers would match with names as a pattern."""
    try:
        values = files.read_json(folder / "config.json", files.regular)
    except (OSError, ValueError):
        return  # reported when it is loaded
    for key, value in values.items() if isinstance(values, dict) else ():
        if key.endswith("_implementation") and "/" in str(value):
            raise ModelError(f"The model {name} needs code from the hub (config.json has {key}), which is never run.")
    check_quantisation(values, name)


def check_quantisation(config: Any, name: str) -> None:
    """Check that the quantisation in a `config.json` has no pattern that transformers would match for ages."""
    found: Counter[str] = Counter()
    for key, text in quantisation_texts(config):
        found[key] += 1
        if not HARMLESS.fullmatch(text) or len(text) > limits.NAME or found[key] > MOST_NAMES:
            raise ModelError(
                f"The model {name} is quantised in a way that is not supported: {key} in its config.json holds "
                f"{brief(text)}; only names of modules may stand there, at most {MOST_NAMES:,}, with at most two *."
            )


def quantisation_texts(config: Any) -> Iterator[tuple[str, str]]:
    """The texts in every `quantization_config` of a `config.json`, each with the key it belongs to, or as that key."""
    pending: list[tuple[Any, str, bool]] = [(config, "", False)]
    while pending:
        value, key, inside = pending.pop()
        if isinstance(value, dict):
            kept = [name for name in value if not (inside and name.endswith(PROSE))]
            if inside:
                yield from zip(kept, kept, strict=True)
            pending += [(value[name], name, inside or name in QUANTISATION) for name in kept]
        elif isinstance(value, list):
            pending += [(inner, key, inside) for inner in value]
        elif inside and isinstance(value, str):
            yield key, value


def fetched(source: Source, progress: bool, weights: bool) -> Path:
    """`local_folder` without its check."""
    if source.kind == "embedded":
        return convert_embedded(Path(source.location), progress)
    if source.kind == "gguf":
        gguf = Path(source.location).resolve()
        stat = gguf.stat()
        key = hashlib.sha256(f"{gguf}\n{stat.st_size}\n{stat.st_mtime_ns}".encode()).hexdigest()[:12]
        return convert_gguf(gguf, models_dir() / f"{gguf.stem}-{key}", progress)
    if not source.files:
        return Path(source.location)
    from huggingface_hub import snapshot_download

    try:
        files = [file for file in source.files if weights or not file.endswith(".safetensors")]
        return Path(snapshot_download(source.location, revision=source.revision, allow_patterns=files))
    except Exception as error:
        raise ModelError(f"{source.name} could not be downloaded: {one_line(error)}.") from error


def fingerprint(folder: Path) -> dict[str, str]:
    """A cheap fingerprint of a model: for its config and each weight file, a hash of its size, its beginning (with the
    shapes) and its end."""
    hashes = {}
    for path in sorted([*folder.glob("config.json"), *folder.glob("*.safetensors")]):
        with open(path, "rb", opener=files.regular) as file:
            size = file.seek(0, os.SEEK_END)
            digest = hashlib.sha256(str(size).encode())
            for start in sorted({0, max(0, size - SAMPLED)}):
                file.seek(start)
                digest.update(file.read(SAMPLED))
        hashes[path.name] = digest.hexdigest()
    return hashes


def pull(name: str, progress: bool = True) -> Path:
    """Download or convert a model, ready to load, and return its folder; progress goes to stderr.

    Raises `ModelError` if it cannot be found or downloaded.
    """
    return local_folder(resolve(name), progress)


def list_models() -> list[dict[str, Any]]:
    """The models on this machine: name, kind, path, size in bytes, and whether they are ready to load (`cached`)."""
    rows = [describe(EMBEDDED, "embedded", models_dir() / EMBEDDED)]
    for config in sorted(models_dir().glob("[!.]*/config.json")):
        if config.parent.name != EMBEDDED:
            rows.append(describe(config.parent.name, "gguf", config.parent))
    from huggingface_hub import constants, scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    with contextlib.suppress(CacheNotFound):
        for repo in sorted(scan_cache_dir(constants.HF_HUB_CACHE).repos, key=lambda repo: repo.repo_id):
            if repo.repo_type == "model" and cached_from_hub(repo.repo_id):
                rows.append(describe(repo.repo_id, "hub", repo.repo_path) | {"size": repo.size_on_disk})
    return rows


def describe(name: str, kind: str, path: Path) -> dict[str, Any]:
    """A row of `list_models`."""
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return {"name": name, "kind": kind, "path": str(path), "size": size, "cached": path.is_dir()}
