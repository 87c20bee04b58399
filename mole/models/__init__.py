"""Base models and adapters: where they come from, how large they are, and how they are loaded.

Importing the package does not import torch."""

from mole.core.devices import pick_device, pick_dtype
from mole.core.paths import models_dir
from mole.models.gguf import EMBEDDED, convert_embedded
from mole.models.loading import Base, Loaded, attach, load_base, load_tokenizer
from mole.models.sources import Source, list_models, pull, resolve

__all__ = [
    "EMBEDDED", "Base", "Loaded", "Source", "attach", "convert_embedded", "list_models", "load_base",
    "load_tokenizer", "models_dir", "pick_device", "pick_dtype", "pull", "resolve",
]  # fmt: skip
