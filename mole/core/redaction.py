"""Keeps secrets out of texts that are written or shown, and out of child processes. No torch."""

from __future__ import annotations

import os
import re

TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_TOKEN", "HUGGINGFACEHUB_API_TOKEN")
SHAPE = re.compile(r"\b(?:hf|api_org)_[A-Za-z0-9]{16,}|(?<=Bearer )[\w.~+/=-]{8,}")
"""Hub tokens, and the value of a bearer header."""
HIDDEN = "(hidden)"

INHERITED = {
    "PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "LANGUAGE", "TZ", "TERM", "TMPDIR", "TEMP", "TMP",
    "LD_LIBRARY_PATH", "LD_PRELOAD", "DYLD_LIBRARY_PATH", "PYTHONPATH", "PYTHONHOME", "PYTHONUNBUFFERED",
    "PYTHONHASHSEED", "PYTHONSAFEPATH", "PYTHONUTF8", "PYTHONIOENCODING", "PYTHONDONTWRITEBYTECODE", "VIRTUAL_ENV",
    "http_proxy", "https_proxy", "no_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "ALL_PROXY",
    "SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "MOLE_HOME", "SPACE_ID", "CC", "CXX",
    "MOLE_COMPILE", "MOLE_CPU_BFLOAT16", "MOLE_VISIBLE_GPUS",
    "CUBLAS_WORKSPACE_CONFIG", "TOKENIZERS_PARALLELISM", "BITSANDBYTES_NOWELCOME", "SYSTEMROOT",
    *TOKENS,
}  # fmt: skip
FAMILIES = (
    "LC_", "XDG_", "CONDA_", "HF_", "HUGGINGFACE_HUB_", "TRANSFORMERS_", "ACCELERATE_", "DATASETS_", "SAFETENSORS_",
    "TORCH", "PYTORCH_", "CUDA_", "NVIDIA_", "NCCL_", "GLOO_", "ROCM_", "ROCR_", "HIP_", "HSA_", "TRITON_", "OMP_",
    "MKL_", "KMP_", "GOMP_", "OPENBLAS_", "NUMEXPR_", "BNB_", "GGML_", "MALLOC_",
)  # fmt: skip
"""Prefixes of variables that configure libraries. The hub token is among `HF_`: gated models need it."""


def child_environment() -> dict[str, str]:
    """The environment of a child process: only the variables known to be needed."""
    return {name: value for name, value in os.environ.items() if name in INHERITED or name.startswith(FAMILIES)}


def redacted(text: str) -> str:
    """The text with hub tokens hidden."""
    for name in TOKENS:
        value = os.environ.get(name, "")
        if len(value) >= 8:
            text = text.replace(value, HIDDEN)
    return SHAPE.sub(HIDDEN, text)
